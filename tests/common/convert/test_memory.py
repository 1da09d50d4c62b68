"""A conversion holds a layer or two of its model at a time, and a rewriting a tensor, however many there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ...support import convert_flags, save_source, tiny_llama

LAYERS = 24
SHAPE = {"hidden_size": 384, "intermediate_size": 1152, "num_attention_heads": 6, "head_dim": 64}
KINDS = {"W8A8": ("--scheme", "int8-token"), "W4A16": ("--w_bit", "4", "--a_bit", "16", "--anti_method", "m1")}
MOST_LAYERS = 6
"""Decoder layers in float32 that a conversion may hold: the one in work, its codes, and what is made on the way."""
MOST_LAYERS_REWRITTEN = 2
"""The same of a rewriting, of which a layer's largest tensor is the third part."""
RETURNED_AT_ONCE = 2**18
"""Bytes from which on glibc gives memory back that is freed. It raises that to 32 MB by itself, beside which layers of
this size would not be seen."""

CHILD = """
import json, sys
from octavo.common.convert.api import main
from octavo.models.llama3 import ARCHITECTURE
from octavo.rewrite import main as rewrite

def peak():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(fields["VmHWM"].split()[0])

peaks = []
for argv in json.loads(sys.argv[1]):
    assert (rewrite(argv[1:]) if argv[0] == "rewrite" else main(ARCHITECTURE, argv)) == 0
    peaks.append(peak())
print(json.dumps(peaks))
"""


def peaks(*conversions: list[str]) -> list[int]:
    """The most bytes that were resident in a process up to the end of each of some conversions, one after another.

    One whose flags come behind "rewrite" is a rewriting.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(RETURNED_AT_ONCE)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(conversions)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def large_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 80 MB in bf16, in several files."""
    model = tiny_llama(num_hidden_layers=LAYERS, initializer_range=0.02, **SHAPE).bfloat16()
    directory = save_source(tmp_path_factory.mktemp("large"), model, max_shard_size="20MB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_peak_is_that_of_a_few_layers(source: Path, large_source: Path, tmp_path: Path) -> None:
    """What tiny models take is taken off, so that libraries do not count."""
    sources = {"tiny": source, "large": large_source}
    found = peaks(
        *(
            convert_flags(directory, tmp_path / f"{size} {kind}", *flags)
            for size, directory in sources.items()
            for kind, flags in KINDS.items()
        )
    )
    growth = found[-1] - found[len(KINDS) - 1]
    in_float32 = 2 * sum(file.stat().st_size for file in large_source.glob("*.safetensors"))
    assert growth < MOST_LAYERS * in_float32 / LAYERS, f"{growth / 1e6:.0f} MB"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_peak_of_a_rewriting_is_that_of_a_tensor(source: Path, large_source: Path, tmp_path: Path) -> None:
    own = {"tiny": tmp_path / "tiny", "large": tmp_path / "large"}
    for size, directory in (("tiny", source), ("large", large_source)):
        peaks(convert_flags(directory, own[size], "--is_dynamic", "True"))
    found = peaks(
        *(
            ["rewrite", "--model_path", str(path), "--format", "compressed-tensors", "--save_directory", f"{path} out"]
            for path in own.values()
        )
    )
    growth = found[1] - found[0]
    in_float32 = 2 * sum(file.stat().st_size for file in large_source.glob("*.safetensors"))
    assert growth < MOST_LAYERS_REWRITTEN * in_float32 / LAYERS, f"{growth / 1e6:.0f} MB"
