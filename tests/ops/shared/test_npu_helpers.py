"""Contract tests of the NPU kernels: the calls they make, against torch_npu's own schemas and models of its ops.

No NPU runs here. Kernels are reached as on one, through the dispatcher's key for it, with tensors on the CPU. This file
tests what they share; `test_npu_codec.py`, `test_npu_linear.py` and `test_npu_attention.py` test them.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.ops import attention, decode, encode, encode_token, linear_fp8, linear_fp8_block, linear_w8a8, report

from ..npu_double import OPS, TorchNpu, fetch_wheel, installed_double, on_npu, read_schemas

KERNELS = ("attention", "encode", "encode_token", "linear_w8a8", "linear_w8a8_dynamic", "linear_weight_only")
"""Ops that call torch_npu."""


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> TorchNpu:
    return installed_double(monkeypatch)


def test_the_wheel_registers_every_op_that_is_called() -> None:
    assert set(read_schemas(fetch_wheel())) == set(OPS)


@pytest.mark.parametrize(
    "arguments",
    [
        {"head_dim": 64},  # no such argument
        {"scale": "0.1"},  # no float
        {"atten_mask": True},  # no tensor
        {"sparse_mode": 0.5},  # no integer
    ],
)
def test_the_double_refuses_what_the_schema_does_not_declare(npu: TorchNpu, arguments: dict[str, object]) -> None:
    q = torch.zeros(1, 1, 1, 32, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="npu_fused_infer_attention_score"):
        npu.npu_fused_infer_attention_score(q, q, q, num_heads=1, input_layout="BNSD", **arguments)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file')", "ImportError: libhccl.so: cannot open"),
        ("raise RuntimeError('Two accelerators cannot be used at the same time')", "RuntimeError: Two accelerators"),
        ("raise OSError('libatb.so\\nsource set_env.sh')", r"OSError: libatb.so\)"),
    ],
)
def test_a_torch_npu_that_cannot_be_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, reason: str
) -> None:
    (tmp_path / "torch_npu.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    parts = torch.ones(1), torch.zeros(1), torch.zeros(4, dtype=torch.int32), torch.ones(4)
    with pytest.raises(RuntimeError, match=reason) as caught:
        on_npu(linear_w8a8, torch.ones(2, 32).half(), torch.ones(4, 32, dtype=torch.int8), *parts)
    assert "\n" not in str(caught.value)


def test_importing_and_reporting_does_not_import_torch_npu(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text("raise SystemExit('imported')")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import octavo.ops as ops; print(ops.report())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if "NPU" in line}
    assert set(lines) == {*KERNELS, "attention_lse", "decode", "linear_fp8", "linear_fp8_block"}
    assert all("torch_npu, contract-tested: " in lines[name] for name in KERNELS)


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("attention", "scales in groups"),
        ("attention", "int4"),
        ("encode", "packing of 2 to 4 bits, codebooks"),
        ("encode_token", "2 to 4 bits, float16 scales"),
        ("attention_lse", "reference"),
        ("decode", "reference"),
        ("linear_fp8", "none: raises"),
        ("linear_fp8_block", "none: raises"),
    ],
)
def test_the_report_names_what_the_reference_serves(monkeypatch: pytest.MonkeyPatch, op: str, words: str) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    line = next(line for line in report().splitlines() if line.startswith(f"{op} ") and "NPU" in line)
    assert words in line


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_raises_in_one_line(npu: TorchNpu, dtype: torch.dtype) -> None:
    x = torch.ones(1, 2, 3, 32).half()
    codes, scale = torch.zeros(x.shape).to(dtype), torch.ones(1, 2, 3, 1)
    calls = [
        lambda: on_npu(encode, x, scale[0, :, :1], None, codes),
        lambda: on_npu(encode_token, x, codes, scale),
        lambda: on_npu(decode, codes, scale, None),
        lambda: on_npu(attention, x, codes, codes, 1.0, key_scale=scale, value_scale=scale),
        lambda: on_npu(linear_fp8, x, codes[0, 0], torch.ones(3), None, None),
        lambda: on_npu(linear_fp8_block, x, codes[0, 0], torch.ones(3, 1), None),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="Atlas A2 and A3") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert npu.calls == []
