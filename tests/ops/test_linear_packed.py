"""Linears over packed weights: the same numbers as from codes as they are stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops.linear.packed import Packed, _pack_panels_reference, pack_weight, unpack
from octavo.ops.linear.packed_cpu import (
    linear_float_cpu,
    linear_packed_cpu,
    linear_packed_reference,
    linear_w8a8_packed_cpu,
)
from octavo.ops.linear.reference import linear_w8a8_dynamic_reference, linear_w8a8_reference
from octavo.ops.shared.codes import expand_scale, pack_int4

from ..tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("build")

ROWS = st.sampled_from([*range(1, 41), 100, 300])
COLUMNS = st.sampled_from([1, 3, 16, 17, 33, 64, 130])
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BIASES = st.sampled_from([None, *FLOAT_DTYPES])


def bias_of(out_features: int, dtype: torch.dtype | None) -> torch.Tensor | None:
    return None if dtype is None else torch.randn(out_features).to(dtype)


def random_codes(out_features: int, in_features: int, bits: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (out_features, in_features), dtype=torch.int8)


def random_weight(
    out_features: int, in_features: int, bits: int, group: int, affine: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Packed]:
    """A weight in float64 and its packed codes."""
    codes = random_codes(out_features, in_features, bits)
    scale = (torch.rand(out_features, in_features // group) * 0.01).to(dtype)
    zero = (3 * torch.randn_like(scale.float())).to(dtype) if affine else None
    values = codes.double()
    if zero is not None:
        values = values - expand_scale(zero.double(), out_features, in_features)
    values = values * expand_scale(scale.double(), out_features, in_features)
    return values, pack_weight(codes, scale, zero, bits)


def expected_of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: int) -> torch.Tensor:
    """The formula in float64, over the codes that float32 gives."""
    grouped = x.float().reshape(x.shape[0], -1, group)
    scale = (grouped.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).eps)
    rows = ((grouped / scale).round().double() * scale.double()).reshape(x.shape)
    return rows @ weight.T if bias is None else rows @ weight.T + bias.double()


def error_of(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative."""
    return float((output.double() - expected).norm() / expected.norm())


@settings(max_examples=25, deadline=None)
@given(
    rows=ROWS,
    in_features=st.sampled_from([1, 7, 32, 77, 256, 576, 1000]),
    out_features=COLUMNS,
    dtype=st.sampled_from(FLOAT_DTYPES),
    bias_dtype=BIASES,
    seed=st.integers(0, 1000),
)
def test_one_group_is_dynamic_w8a8_bit_for_bit(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, seed: int
) -> None:
    torch.manual_seed(seed)
    x, codes = torch.randn(rows, in_features).to(dtype), random_codes(out_features, in_features, 8)
    scale, bias = torch.rand(out_features) * 0.01, bias_of(out_features, bias_dtype)
    output = linear_packed_cpu(x, pack_weight(codes, scale, None, 8), bias)
    assert torch.equal(output, linear_w8a8_dynamic_reference(x, codes, scale, bias))


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, in_features=st.sampled_from([1, 77, 256, 576]), out_features=COLUMNS, seed=st.integers(0, 1000))
def test_static_w8a8_bit_for_bit(rows: int, in_features: int, out_features: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, codes = torch.randn(rows, in_features), random_codes(out_features, in_features, 8)
    scale, offset, deq_scale = torch.rand(1) * 0.05 + 0.005, torch.tensor([-7.0]), torch.rand(out_features) * 0.01
    quant_bias = torch.randint(-10000, 10000, (out_features,), dtype=torch.int32)
    output = linear_w8a8_packed_cpu(x, pack_weight(codes, deq_scale, None, 8), scale, offset, quant_bias)
    assert torch.equal(output, linear_w8a8_reference(x, codes, scale, offset, quant_bias, deq_scale))


@settings(max_examples=40, deadline=None)
@given(
    rows=ROWS,
    bits=st.sampled_from([4, 8]),
    groups=st.sampled_from([(32, 32), (64, 64), (128, 128), (128, 32), (384, 32), (384, 384)]),
    out_features=COLUMNS,
    affine=st.booleans(),
    scale_dtype=st.sampled_from([torch.float32, torch.float16]),
    bias_dtype=BIASES,
    seed=st.integers(0, 1000),
)
def test_groups(
    rows: int,
    bits: int,
    groups: tuple[int, int],
    out_features: int,
    affine: bool,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight, packed = random_weight(out_features, 384, bits, groups[0], affine, scale_dtype)
    x, bias = torch.randn(rows, 384), bias_of(out_features, bias_dtype)
    expected = expected_of(x, weight, bias, groups[1])
    assert error_of(linear_packed_cpu(x, packed, bias, groups[1]), expected) < TOLERANCES["linear"]
    assert error_of(linear_packed_reference(x, packed, bias, groups[1]), expected) < TOLERANCES["linear"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_panels(bits: int, threads: int) -> None:
    _, packed = random_weight(1040, 512, bits, 32)
    x = torch.randn(3, 512)
    expected, before = linear_packed_reference(x, packed, None, 32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = linear_packed_cpu(x, packed, None, 32)
    finally:
        torch.set_num_threads(before)
    assert error_of(output, expected.double()) < TOLERANCES["linear"]


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_nan_is_of_its_row(rows: int) -> None:
    _, packed = random_weight(40, 96, 4, 32, affine=True)
    x = torch.randn(rows, 96)
    whole = linear_packed_cpu(x, packed, None, 32)
    x[0, 70] = float("nan")
    output = linear_packed_cpu(x, packed, None, 32)
    assert output[0].isnan().all()
    assert torch.equal(output[1:], whole[1:])


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_extreme_rows(value: float) -> None:
    _, packed = random_weight(33, 64, 8, 32)
    x = torch.full((2, 64), value)
    output, expected = linear_packed_cpu(x, packed, None, 32).double(), linear_packed_reference(x, packed, None, 32)
    assert (output - expected).norm() <= TOLERANCES["linear"] * expected.double().norm()


def test_sums_of_the_largest_depth_are_exact() -> None:
    codes = torch.full((17, 131071), -128, dtype=torch.int8)
    x = torch.full((1, 131071), 127.0)
    output = linear_packed_cpu(x, pack_weight(codes, torch.ones(17), None, 8))
    assert torch.equal(output, torch.full((1, 17), float(-128 * 127 * 131071)))


def test_no_rows() -> None:
    _, packed = random_weight(33, 64, 4, 32)
    assert linear_packed_cpu(torch.empty(2, 0, 64), packed).shape == (2, 0, 33)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 32), (40, 96), (16, 64), (130, 1024)])
def test_unpack_gives_back_what_was_stored(bits: int, out_features: int, in_features: int) -> None:
    codes, scale = random_codes(out_features, in_features, bits), torch.rand(out_features, in_features // 32).half()
    stored = codes if bits == 8 else pack_int4(codes, 32)
    packed = pack_weight(stored, scale, scale + 1, bits)
    assert torch.equal(packed.codes, pack_weight(codes, scale, None, bits).codes)
    panels = torch.empty_like(packed.codes)
    _pack_panels_reference(stored, bits, panels)
    assert torch.equal(packed.codes, panels)
    for got, put in zip(unpack(packed), (stored, scale, scale + 1), strict=True):
        assert torch.equal(got, put)


@pytest.mark.parametrize("in_features", [1, 30, 77])
def test_any_depth_is_packed(in_features: int) -> None:
    codes = random_codes(20, in_features, 8)
    packed = pack_weight(codes, torch.ones(20), None, 8)
    panels = torch.empty_like(packed.codes)
    _pack_panels_reference(codes, 8, panels)
    assert torch.equal(packed.codes, panels)
    assert torch.equal(unpack(packed)[0], codes)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([*range(1, 10), 13]),
    in_features=st.sampled_from([1, 7, 16, 31, 32, 77, 256, 576]),
    out_features=COLUMNS,
    dtype=st.sampled_from(FLOAT_DTYPES),
    bias_dtype=BIASES,
    seed=st.integers(0, 1000),
)
def test_float_weights(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features).to(dtype)
    bias = bias_of(out_features, bias_dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert error_of(linear_float_cpu(x, weight, bias), expected) < TOLERANCES["linear"]


def test_what_does_not_go_together_is_refused() -> None:
    codes, scale = random_codes(8, 96, 8), torch.ones(8, 2)
    with pytest.raises(ValueError, match="groups of a multiple of 32 channels"):
        pack_weight(codes, scale, None, 8)
    with pytest.raises(ValueError, match="not 3 in"):
        pack_weight(codes, scale, None, 3)
    with pytest.raises(ValueError, match="weight_zero"):
        pack_weight(codes, torch.ones(8, 3), torch.ones(8, 1), 8)
    packed = pack_weight(codes, torch.ones(8, 3), None, 8)
    for wrong, words in (((95, 32), "does not belong"), ((96, 96), "does not divide"), ((96, 33), "multiple of 32")):
        with pytest.raises(ValueError, match=words):
            linear_packed_cpu(torch.ones(1, wrong[0]), packed, None, wrong[1])
    with pytest.raises(ValueError, match="bias"):
        linear_packed_cpu(torch.ones(1, 96), packed, torch.ones(7), 32)
