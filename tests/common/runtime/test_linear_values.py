"""Which values scales, zero points and codes may have."""

import pytest
import torch

from octavo.common.runtime.linear_values import are_deq_scales, are_offsets, are_scales, is_finite

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 12_345, 99_999):
        values = torch.randn(100_000).to(dtype).view(500, 200)
        assert is_finite(values)
        values.view(-1)[place] = bad
        assert not is_finite(values) and not is_finite(values.T)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    assert not is_finite(torch.tensor([float("inf"), float("-inf"), 1.0]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sum_that_overflows_is_no_fault(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((4096,), torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_of_fp8_that_are_nan_are_found(code: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(20_000).view(20_000, 256)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    assert is_finite(codes.view(torch.float8_e4m3fn))
    codes[19_999, 3] = code
    assert not is_finite(codes.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("bad", [0.0, -1e-3, float("nan"), float("inf"), 1e37])
def test_scales(bad: float) -> None:
    assert are_scales(torch.tensor([[1e-9], [3.0]]))
    assert not are_scales(torch.tensor([[1e-9], [bad]]))


@pytest.mark.parametrize("bad", [128.0, -129.0, 0.5, float("nan"), float("inf")])
def test_offsets(bad: float) -> None:
    assert are_offsets(torch.tensor([-128.0, 0.0, 127.0])) and are_offsets(torch.tensor([-128, 127], dtype=torch.int8))
    assert not are_offsets(torch.tensor([0.0, bad]))
    assert not are_offsets(torch.tensor([0.0, 8.0]), (-8, 7))


def test_bits_of_deq_scales_in_int64_are_those_of_a_positive_float32() -> None:
    bits = torch.tensor([0.25, 3e38]).view(torch.int32).long()
    assert are_deq_scales(bits) and are_deq_scales(torch.tensor([0.25]))
    for bad in (bits + 2**32, -bits, torch.tensor([0, 1]), torch.tensor([float("inf")]).view(torch.int32).long()):
        assert not are_deq_scales(bad)
    assert not are_deq_scales(torch.tensor([0.25, float("inf")]))
