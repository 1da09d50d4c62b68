"""Contract tests of the NPU kernels: the calls they make, against torch_npu's own schemas and models of its ops.

No NPU runs here. Kernels are reached as on one, through the dispatcher's key for it, with tensors on the CPU.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.ops import encode, encode_token, linear_w8a8, report
from octavo.ops.codec.reference import encode_reference, encode_token_reference
from octavo.ops.codes import SMALLEST_SCALE
from octavo.ops.linear.npu import linear_w8a8_npu
from octavo.ops.linear.reference import linear_w8a8_reference

from ..tolerances import TOLERANCES
from .npu_double import OPS, TorchNpu, fetch_wheel, installed_double, on_npu, read_schemas, relative_rmse

FLOATS = (torch.float16, torch.bfloat16)


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> TorchNpu:
    return installed_double(monkeypatch)


def assert_same_codes(codes: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (codes.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= TOLERANCES["codes"]


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


@pytest.mark.parametrize("dtype", [torch.float32, *FLOATS])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("width", [1, 32], ids=["head", "channel"])
def test_encode(npu: TorchNpu, dtype: torch.dtype, affine: bool, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 5, 3, 32), generator=generator).to(dtype).transpose(1, 2)
    scale = torch.rand((3, 1, width), generator=generator) * 0.03 + 0.005  # some values clip
    zero = torch.randint(-90, 90, (3, 1, width), generator=generator).float() if affine else None
    codes, expected = (torch.full((2, 3, 8, 32), 99, dtype=torch.int8) for _ in range(2))
    on_npu(encode, x, scale, zero, codes[:, :, 2:7])
    encode_reference(x, scale, zero, expected[:, :, 2:7])
    assert npu.ops() == ["npu_quantize"]
    assert_same_codes(codes, expected)


def test_encode_refuses_scales_per_token(npu: TorchNpu) -> None:
    x = torch.zeros(1, 2, 3, 32)
    with pytest.raises(ValueError, match="per head or channel"):
        on_npu(encode, x, torch.ones(1, 2, 3, 1), None, x.to(torch.int8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_encode_token(npu: TorchNpu, dtype: torch.dtype) -> None:
    x = torch.randn((2, 3, 5, 32), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1, 2] = 0
    codes, expected = (torch.full((2, 3, 8, 32), 99, dtype=torch.int8) for _ in range(2))
    scale, expected_scale = (torch.full((2, 3, 8, 1), 7.0) for _ in range(2))
    on_npu(encode_token, x, codes[:, :, :5], scale[:, :, :5])
    encode_token_reference(x, expected[:, :, :5], expected_scale[:, :, :5])
    assert npu.ops() == ["npu_dynamic_quant"]
    assert_same_codes(codes, expected)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert scale[0, 1, 2] == SMALLEST_SCALE


def linear_arguments(rows: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x `[*rows, 96]` on the grid of its codes, so that no rounding of x is tested; 40 outputs."""
    generator = torch.Generator().manual_seed(1)
    input_scale, input_offset = torch.tensor([2.0**-5]), torch.tensor([-17.0])
    x = (torch.randint(-100, 100, (*rows, 96), generator=generator) * input_scale).to(dtype)
    weight = torch.randint(-127, 128, (40, 96), dtype=torch.int8, generator=generator)
    deq_scale = input_scale * (torch.rand(40, generator=generator) * 1e-3 + 1e-4)
    bias = torch.randint(-9999, 9999, (40,), dtype=torch.int32, generator=generator)
    return x, weight, input_scale, input_offset, bias - (input_offset * weight.sum(1)).int(), deq_scale


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [(7,), (2, 3), (0,)])
def test_linear(npu: TorchNpu, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    arguments = linear_arguments(rows, dtype)
    result = on_npu(linear_w8a8, *arguments)
    expected = linear_w8a8_reference(*arguments)
    assert result.shape == expected.shape and result.dtype == dtype
    if result.numel():
        assert npu.ops() == ["npu_quantize", "npu_quant_matmul"]
        assert relative_rmse(result, expected) <= TOLERANCES[f"npu rmse {str(dtype)[6:]}"]


def test_linear_with_the_offset_negated_fails(npu: TorchNpu) -> None:
    x, weight, scale, offset, bias, deq_scale = linear_arguments((7,), torch.float16)
    expected = linear_w8a8_reference(x, weight, scale, offset, bias, deq_scale)
    result = linear_w8a8_npu(x, weight, scale, -offset, bias, deq_scale)
    assert relative_rmse(result, expected) > 100 * TOLERANCES["npu rmse float16"]


def test_linear_limits(npu: TorchNpu) -> None:
    x, *others = linear_arguments((2,), torch.float16)
    with pytest.raises(ValueError, match=r"float16 or bfloat16, not torch.float32"):
        linear_w8a8_npu(x.float(), *others)
    with pytest.raises(ValueError, match="65535"):
        linear_w8a8_npu(x, torch.zeros((1, 65536), dtype=torch.int8), *others[1:])
    with pytest.raises(ValueError, match="K and V in float16 or bfloat16"):
        on_npu(encode_token, x.float().view(1, 1, 2, 96), x.to(torch.int8).view(1, 1, 2, 96), x.new_zeros(1, 1, 2, 1))


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
    with pytest.raises(RuntimeError, match=reason) as caught:
        on_npu(linear_w8a8, *linear_arguments((2,), torch.float16))
    assert "\n" not in str(caught.value)


def test_importing_and_reporting_does_not_import_torch_npu(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text("raise SystemExit('imported')")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import octavo.ops as ops; print(ops.report())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "NPU" in line]
    assert len(lines) == 4 and all("torch_npu, contract-tested: " in line for line in lines)


def test_the_report_names_what_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    line = next(line for line in report().splitlines() if line.startswith("attention") and "NPU" in line)
    assert "several queries over codes, and a mask at decode, by the reference" in line
