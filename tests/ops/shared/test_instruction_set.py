"""OCTAVO_ISA: kernels of the instruction set that it names, or one error; the `build` fixture has all ops tried."""

import ctypes
import platform
from pathlib import Path

import pytest

from octavo.ops.shared import instruction_set
from octavo.ops.shared.compile import compile_shared
from octavo.ops.shared.instruction_set import ISA_FLAGS, chosen_isa, cpu_flags

from .test_compile import cpu_lines, output_of, start

EXTENSIONS = """
__attribute__((visibility("default"))) int extensions(void *arguments) {
    int found = 0;
#ifdef __AVX2__
    found |= 1;
#endif
#ifdef __FMA__
    found |= 2;
#endif
#ifdef __F16C__
    found |= 4;
#endif
#ifdef __AVX512F__
    found |= 8;
#endif
    return found;
}
"""


def extensions(isa: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bits of the extensions that a kernel may use: AVX2, FMA, F16C, AVX-512."""
    monkeypatch.setenv("OCTAVO_ISA", isa)
    return ctypes.CDLL(str(compile_shared("tiny", EXTENSIONS))).extensions(None)


@pytest.fixture
def avx2_machine() -> None:
    if "avx2" not in (cpu_flags() or ()):
        pytest.skip("this machine has no AVX2")


@pytest.mark.usefixtures("avx2_machine")
def test_kernels_use_what_is_named_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    has_avx512 = "avx512f" in (cpu_flags() or ())
    assert extensions("generic", monkeypatch) == 0
    assert extensions("avx2", monkeypatch) == 7
    assert extensions("native", monkeypatch) == extensions("", monkeypatch) == (15 if has_avx512 else 7)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("avx2_machine")
@pytest.mark.parametrize("isa", [isa for isa in ISA_FLAGS if isa != "native"])
def test_the_report_names_it(tmp_path: Path, isa: str) -> None:
    lines = cpu_lines(output_of(start(tmp_path, OCTAVO_ISA=isa)))
    assert lines and all(f"C kernel (OCTAVO_ISA={isa})" in line for line in lines)


def test_an_unknown_one_is_one_error(tmp_path: Path) -> None:
    _, errors = start(tmp_path, OCTAVO_ISA="avx3").communicate()
    assert errors.splitlines()[-1] == (
        "ValueError: OCTAVO_ISA=avx3 is none of native, avx2, generic; leave it out for this machine's own"
    )
    assert "references run instead" not in errors and not list(tmp_path.iterdir())


def test_one_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_ISA", "avx2")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(instruction_set, "cpu_flags", lambda: {"sse2", "avx2", "bmi2"})
    with pytest.raises(ValueError, match="this processor has no f16c, fma; leave it out"):
        chosen_isa()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ValueError, match="is for x86-64, and this is aarch64"):
        chosen_isa()
