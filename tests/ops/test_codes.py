"""How codes are stored: packing, ranges, and which scale belongs to which value."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.ops.codes import (
    CODE_RANGES,
    FP8_DTYPES,
    SMALLEST_SCALE,
    code_width,
    dynamic_scale,
    expand_scale,
    from_codes,
    pack_int4,
    to_codes,
    unpack_int4,
)

from .cuda_double import needs_gpu


@given(rows=st.integers(0, 5), blocks=st.integers(1, 4), half=st.integers(1, 20), seed=st.integers(0, 1000))
def test_packing_is_undone_by_unpacking(rows: int, blocks: int, half: int, seed: int) -> None:
    block = 2 * half
    codes = torch.randint(-8, 8, (rows, blocks * block), generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(codes, block)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, blocks * half)
    assert code_width(packed) == codes.shape[-1]
    assert torch.equal(unpack_int4(packed, block), codes.to(torch.int8))


def test_byte_i_of_a_block_holds_the_codes_i_and_i_plus_half() -> None:
    codes = torch.tensor([[-8, -1, 0, 7, 1, 2, 3, 4]])
    assert pack_int4(codes, 8).tolist() == [[0 | 9 << 4, 7 | 10 << 4, 8 | 11 << 4, 15 | 12 << 4]]
    assert pack_int4(codes, 4).tolist() == [[0 | 8 << 4, 7 | 15 << 4, 9 | 11 << 4, 10 | 12 << 4]]


@pytest.mark.parametrize("dtype", CODE_RANGES)
def test_values_beyond_the_range_take_its_ends(dtype: torch.dtype) -> None:
    low, high = CODE_RANGES[dtype]
    values = torch.tensor([[-1e9, 1e9, low, high, float("-inf"), float("inf"), 0.0, 1.0]])
    decoded = from_codes(to_codes(values, dtype, 8), 8, torch.float32)
    assert decoded.tolist() == [[low, high, low, high, low, high, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_halves_go_to_even(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert from_codes(to_codes(values, dtype, 6), 6, torch.float32).tolist() == [[0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_nan_stays_nan_in_fp8_and_no_code_is_infinite(dtype: torch.dtype) -> None:
    values = torch.tensor([float("nan"), float("inf"), 1.0])
    decoded = from_codes(to_codes(values, dtype, 3), 3, torch.float32)
    assert decoded.isnan().tolist() == [True, False, False]
    assert not decoded.isinf().any()


@pytest.mark.parametrize("tokens", [1, 7, 8, 9])
@pytest.mark.parametrize("token_group", [1, 4])
@pytest.mark.parametrize("columns", [1, 2, 6])
def test_a_value_gets_the_scale_of_its_groups(tokens: int, token_group: int, columns: int) -> None:
    rows, width = -(-tokens // token_group), 6
    scale = torch.rand(2, 3, rows, columns)
    expanded = expand_scale(scale, tokens, width, token_group).expand(2, 3, tokens, width)
    for token in range(tokens):
        for channel in range(width):
            expected = scale[:, :, token // token_group, channel // (width // columns)]
            assert torch.equal(expanded[:, :, token, channel], expected)


def test_one_row_is_for_all_tokens() -> None:
    scale = torch.rand(3, 1, 6)
    assert expand_scale(scale, 100, 6, 4).shape == (3, 1, 6)
    assert expand_scale(torch.tensor(2.0), 5, 6).expand(5, 6).eq(2).all()


@pytest.mark.parametrize(("shape", "token_group"), [((3, 5, 1), 1), ((3, 7, 1), 4), ((3, 1, 5), 1)])
def test_a_scale_that_fits_nowhere_is_refused(shape: tuple[int, ...], token_group: int) -> None:
    with pytest.raises(ValueError, match="does not belong to 7 tokens"):
        expand_scale(torch.ones(shape), 7, 6, token_group)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("span", [127.0, 448.0, 15.0, 255.0])
def test_scales_are_quotients_rounded_once(span: float, device: str) -> None:
    extent = torch.rand(10_000, generator=torch.Generator().manual_seed(0)).bfloat16().float() * 4
    expected = (extent.double() / span).float().clamp_min(SMALLEST_SCALE)
    assert torch.equal(dynamic_scale(extent.to(device), span).cpu(), expected)
    assert (extent * (1 / torch.tensor(span)) != expected).any(), "what GPUs give by a number that is no tensor"
    assert float(dynamic_scale(torch.zeros(()), span)) == SMALLEST_SCALE
