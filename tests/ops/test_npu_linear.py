"""Contract tests of the linear ops on an NPU."""

import gc
from collections.abc import Callable

import pytest
import torch

from octavo.ops import linear_w8a8, linear_w8a8_dynamic, linear_weight_only
from octavo.ops.linear import npu as kernels
from octavo.ops.linear.npu import linear_w8a8_npu
from octavo.ops.linear.reference import (
    WEIGHT_BLOCK,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)
from octavo.ops.shared.codes import pack_int4

from ..metrics import relative_rmse
from ..tolerances import TOLERANCES
from .npu_double import TorchNpu, installed_double, on_npu

FLOATS = (torch.float16, torch.bfloat16)
OUTPUTS, DEPTH = 40, 96


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> TorchNpu:
    return installed_double(monkeypatch)


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES[f"npu rmse {str(dtype)[6:]}"]


def static_arguments(rows: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x `[*rows, 96]` on the grid of its codes, so that no rounding of x is tested; 40 outputs."""
    generator = torch.Generator().manual_seed(1)
    input_scale, input_offset = torch.tensor([2.0**-5]), torch.tensor([-17.0])
    x = (torch.randint(-100, 100, (*rows, DEPTH), generator=generator) * input_scale).to(dtype)
    weight = torch.randint(-127, 128, (OUTPUTS, DEPTH), dtype=torch.int8, generator=generator)
    deq_scale = input_scale * (torch.rand(OUTPUTS, generator=generator) * 1e-3 + 1e-4)
    bias = torch.randint(-9999, 9999, (OUTPUTS,), dtype=torch.int32, generator=generator)
    return x, weight, input_scale, input_offset, bias - (input_offset * weight.sum(1)).int(), deq_scale


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [(7,), (2, 3), (0,)])
def test_static(npu: TorchNpu, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    arguments = static_arguments(rows, dtype)
    result = on_npu(linear_w8a8, *arguments)
    expected = linear_w8a8_reference(*arguments)
    assert result.shape == expected.shape and result.dtype == dtype
    if result.numel():
        assert npu.ops() == ["npu_quantize", "npu_quant_matmul"]
        assert relative_rmse(result, expected) <= tolerance(dtype)


def test_static_with_the_offset_negated_fails(npu: TorchNpu) -> None:
    x, weight, scale, offset, bias, deq_scale = static_arguments((7,), torch.float16)
    expected = linear_w8a8_reference(x, weight, scale, offset, bias, deq_scale)
    result = linear_w8a8_npu(x, weight, scale, -offset, bias, deq_scale)
    assert relative_rmse(result, expected) > 100 * tolerance(torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, *FLOATS])
@pytest.mark.parametrize("rows", [(7,), (2, 3), (0,)])
def test_dynamic(npu: TorchNpu, dtype: torch.dtype, bias_dtype: torch.dtype | None, rows: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((*rows, DEPTH), generator=generator).to(dtype)
    x[:1] = 0
    weight = torch.randint(-127, 128, (OUTPUTS, DEPTH), dtype=torch.int8, generator=generator)
    scale = torch.rand(OUTPUTS, generator=generator) * 1e-2
    bias = None if bias_dtype is None else torch.randn(OUTPUTS, generator=generator).to(bias_dtype)
    result = on_npu(linear_w8a8_dynamic, x, weight, scale, bias)
    expected = linear_w8a8_dynamic_reference(x, weight, scale, bias)
    assert result.shape == expected.shape and result.dtype == dtype
    if result.numel():
        assert npu.ops() == ["npu_dynamic_quant", "npu_quant_matmul"]
        assert relative_rmse(result, expected) <= tolerance(dtype)
        assert torch.equal(result[:1], expected[:1])


def weight_only_arguments(
    bits: int, group: int, affine: bool, dtype: torch.dtype, outputs: int = OUTPUTS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Zeros are whole, as in checkpoints; scales are exact in the dtype of x."""
    generator = torch.Generator().manual_seed(2)
    reach = 1 << (bits - 1)
    weight = torch.randint(-reach, reach, (outputs, DEPTH), dtype=torch.int8, generator=generator)
    shape = (outputs, DEPTH // group)
    scale = (torch.rand(shape, generator=generator) * 1e-2 + 1e-3).to(dtype).float()
    zero = torch.randint(-reach, reach, shape, generator=generator).float() if affine else None
    x = torch.randn((7, DEPTH), generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    return x, weight if bits == 8 else pack_int4(weight, WEIGHT_BLOCK), scale, zero, bias


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, DEPTH], ids=["group", "channel"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("outputs", [OUTPUTS, 36])
def test_weight_only(npu: TorchNpu, dtype: torch.dtype, bits: int, group: int, affine: bool, outputs: int) -> None:
    arguments = weight_only_arguments(bits, group, affine, dtype, outputs)
    for bias in (arguments[-1], arguments[-1].to(dtype), None):
        result = on_npu(linear_weight_only, *arguments[:-1], bias)
        expected = linear_weight_only_reference(*arguments[:-1], bias)
        assert result.shape == expected.shape and result.dtype == dtype
        assert relative_rmse(result, expected) <= tolerance(dtype)
    packing = ["npu_convert_weight_to_int4pack"] if bits == 4 else []  # once
    assert npu.ops() == packing + ["npu_weight_quant_batchmatmul"] * 3
    matrix = npu.calls[-1][1]["weight"]
    if bits == 4:
        is_transposed = group == DEPTH or outputs == 36
        assert matrix.shape == ((DEPTH // 8, outputs) if is_transposed else (DEPTH, outputs // 8))
    else:
        assert matrix.data_ptr() == arguments[1].data_ptr()


def test_weight_only_with_zeros_of_the_wrong_sign_fails(npu: TorchNpu) -> None:
    x, weight, scale, zero, bias = weight_only_arguments(4, 32, True, torch.float16)
    expected = linear_weight_only_reference(x, weight, scale, zero, bias)
    result = on_npu(linear_weight_only, x, weight, scale, -zero, bias)
    assert relative_rmse(result, expected) > 100 * tolerance(torch.float16)


def test_weight_only_of_a_view(npu: TorchNpu) -> None:
    x, *others = weight_only_arguments(8, 32, True, torch.float16)
    x = torch.stack((x, x), dim=-1).flatten(1)[:, ::2]
    expected = linear_weight_only_reference(x, *others)
    assert relative_rmse(on_npu(linear_weight_only, x, *others), expected) <= tolerance(torch.float16)


def write(weight: torch.Tensor) -> None:
    weight.fill_(0x88)


def replace(weight: torch.Tensor) -> None:
    weight.data = torch.full_like(weight, 0x88)


@pytest.mark.parametrize("change", [write, replace])
def test_an_int4_weight_that_changes_is_packed_anew(npu: TorchNpu, change: Callable[[torch.Tensor], None]) -> None:
    x, weight, scale, _, _ = weight_only_arguments(4, 32, False, torch.float16)
    assert on_npu(linear_weight_only, x, weight, scale, None, None).any()
    change(weight)
    assert not on_npu(linear_weight_only, x, weight, scale, None, None).any()


def test_packed_int4_weights_live_as_long_as_their_weight(npu: TorchNpu) -> None:
    gc.collect()
    before = len(kernels._INT4_PACKS)
    with torch.inference_mode():
        x, weight, scale, _, _ = weight_only_arguments(4, 32, False, torch.float16)
        for _ in range(2):
            on_npu(linear_weight_only, x, weight, scale, None, None)
    assert npu.ops().count("npu_convert_weight_to_int4pack") == 1 and len(kernels._INT4_PACKS) == before + 1
    npu.calls.clear()
    del weight
    gc.collect()
    assert len(kernels._INT4_PACKS) == before


def test_limits(npu: TorchNpu) -> None:
    x, *others = static_arguments((2,), torch.float16)
    wide = torch.zeros((1, 65536), dtype=torch.int8)
    wide_x, one = x.new_zeros((2, 65536)), torch.ones(1, 1)
    calls = {
        r"float16 or bfloat16, not torch.float32": [
            lambda: on_npu(linear_w8a8, x.float(), *others),
            lambda: on_npu(linear_w8a8_dynamic, x.float(), others[0], torch.ones(OUTPUTS), None),
            lambda: on_npu(linear_weight_only, x.float(), others[0], torch.ones(OUTPUTS, 1), None, None),
        ],
        "65535": [
            lambda: on_npu(linear_w8a8, wide_x, wide, *others[1:3], *(part[:1] for part in others[3:])),
            lambda: on_npu(linear_w8a8_dynamic, wide_x, wide, one[0], None),
            lambda: on_npu(linear_weight_only, wide_x, wide, one, None, None),
        ],
        "multiple of 32 channels, not 24": [
            lambda: on_npu(linear_weight_only, x, others[0], torch.ones(OUTPUTS, 4), None, None)
        ],
    }
    for reason, refused in calls.items():
        for call in refused:
            with pytest.raises(ValueError, match=reason) as caught:
                call()
            assert "\n" not in str(caught.value)
    assert npu.calls == []


def test_nothing_to_compute(npu: TorchNpu) -> None:
    x, weight, scale, zero, bias = weight_only_arguments(4, 32, True, torch.float16)
    assert on_npu(linear_weight_only, x[:0], weight, scale, zero, bias).shape == (0, OUTPUTS)
    assert npu.calls == []
