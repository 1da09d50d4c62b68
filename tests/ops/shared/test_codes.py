"""How codes are stored: packing, ranges, and which scale belongs to which value."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.ops.shared.codes import (
    CODE_RANGES,
    FP8_DTYPES,
    SMALLEST_SCALE,
    WIDTH_STEPS,
    code_range,
    code_width,
    dynamic_scale,
    expand_scale,
    from_codes,
    nearest_level,
    pack_codes,
    pack_indices,
    pack_int4,
    pack_signs,
    stored_width,
    to_codes,
    unpack_codes,
    unpack_indices,
    unpack_int4,
    unpack_signs,
)

from ..cuda_double import needs_gpu


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


@given(
    bits=st.sampled_from(list(WIDTH_STEPS)),
    rows=st.integers(0, 5),
    blocks=st.integers(1, 4),
    steps=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_packing_of_every_width_is_undone_by_unpacking(
    bits: int, rows: int, blocks: int, steps: int, seed: int
) -> None:
    block, (low, high) = WIDTH_STEPS[bits] * steps, code_range(torch.uint8, bits)
    shape = (2, rows, blocks * block)
    codes = torch.randint(int(low), int(high) + 1, shape, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits, block)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, blocks * stored_width(block, torch.uint8, bits))
    assert packed.shape[-1] * 8 == codes.shape[-1] * bits
    assert code_width(packed, bits) == codes.shape[-1]
    assert torch.equal(unpack_codes(packed, bits, block), codes.to(torch.int8))
    assert torch.equal(unpack_indices(packed, bits, block), (codes - int(low)).to(torch.uint8))
    assert torch.equal(pack_indices(codes - int(low), bits, block), packed)


def test_byte_i_of_int2_holds_four_codes() -> None:
    codes = torch.tensor([-2, 1, -1, 0, 0, 1, -2, -1])  # indices 0 3 1 2 2 3 0 1
    assert pack_codes(codes, 2, 8).tolist() == [0 | 1 << 2 | 2 << 4 | 0 << 6, 3 | 2 << 2 | 3 << 4 | 1 << 6]
    assert pack_codes(codes, 2, 4).tolist() == [0 | 3 << 2 | 1 << 4 | 2 << 6, 2 | 3 << 2 | 0 << 4 | 1 << 6]


def test_int3_has_its_high_bits_behind_its_low_ones() -> None:
    indices = torch.tensor([0, 7, 1, 6, 2, 5, 3, 4, 4, 3, 5, 2, 6, 1, 7, 0])
    low, high = indices % 4, indices // 4
    expected = [sum(int(low[i + k * 4]) << 2 * k for k in range(4)) for i in range(4)]
    expected += [sum(int(high[i + k * 2]) << k for k in range(8)) for i in range(2)]
    assert pack_indices(indices, 3, 16).tolist() == expected


@pytest.mark.parametrize(("bits", "width"), [(4, 7), (3, 12), (3, 4), (2, 6)])
def test_rows_that_fill_no_bytes_are_refused(bits: int, width: int) -> None:
    with pytest.raises(
        ValueError, match=f"int{bits} codes has a multiple of {WIDTH_STEPS[bits]} channels, not {width}"
    ):
        to_codes(torch.zeros(3, width), torch.uint8, width, bits)
    with pytest.raises(ValueError, match=f"int{bits} codes"):
        from_codes(torch.zeros((3, width), dtype=torch.uint8), width, torch.float32, bits)


def test_what_is_no_format_is_refused() -> None:
    packed, levels = torch.zeros((3, 5), dtype=torch.uint8), torch.arange(8.0)
    assert code_width(packed.view(torch.int8), 3) == 5 and code_range(torch.int8, 3) == (-128, 127)
    with pytest.raises(ValueError, match="5 bytes are no row of int3 codes"):
        code_width(packed, 3)
    for bits in (1, 5, 8):
        with pytest.raises(ValueError, match=f"2, 3 or 4 bits, not {bits}"):
            code_range(torch.uint8, bits)
    with pytest.raises(ValueError, match=r"levels of int3 codes are float32 \(8,\), not torch.float64 \(8,\)"):
        to_codes(torch.zeros(3, 8), torch.uint8, 8, 3, levels.double())
    with pytest.raises(ValueError, match=r"levels of int2 codes are float32 \(4,\), not torch.float32 \(8,\)"):
        from_codes(packed, 20, torch.float32, 2, levels)
    with pytest.raises(ValueError, match=r"of 2 to 4 bits in uint8, not torch\.int8"):
        to_codes(torch.zeros(3, 8), torch.int8, 8, 3, levels)


@given(bits=st.sampled_from(list(WIDTH_STEPS)), seed=st.integers(0, 1000))
def test_a_value_goes_to_the_nearest_level(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(2**bits, generator=generator).sort().values
    values = torch.randn((5, 16), generator=generator) * 2
    distances = (values.double().unsqueeze(-1) - levels.double()).abs()
    chosen = nearest_level(values, levels)
    assert (distances.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - distances.amin(-1)).max() < 1e-6
    packed = to_codes(values, torch.uint8, 16, bits, levels)
    assert torch.equal(from_codes(packed, 16, torch.float32, bits, levels), levels[chosen])
    assert torch.equal(
        to_codes(levels.repeat(8), torch.uint8, 8, bits, levels), pack_indices(torch.arange(2**bits).repeat(8), bits, 8)
    )


def test_between_two_levels_the_lower_one_is_taken() -> None:
    levels = torch.tensor([-3.0, -1.0, 0.0, 4.0])
    values = torch.tensor([-2.0, -0.5, 2.0, -1e9, 1e9, float("inf"), -float("inf"), float("nan")])
    assert nearest_level(values, levels).tolist() == [0, 1, 2, 0, 3, 3, 0, 3]
    assert nearest_level(values.nextafter(torch.tensor(9.0)), levels).tolist()[:3] == [1, 2, 3]


@pytest.mark.parametrize("bits", WIDTH_STEPS)
def test_evenly_spaced_levels_are_whole_codes(bits: int) -> None:
    low, high = code_range(torch.uint8, bits)
    levels, values = torch.arange(low, high + 1), torch.randn(7, 64) * 4
    codes = to_codes(values, torch.uint8, 64, bits)
    assert torch.equal(to_codes(values, torch.uint8, 64, bits, levels), codes)
    assert torch.equal(from_codes(codes, 64, torch.float32, bits, levels), from_codes(codes, 64, torch.float32, bits))


@pytest.mark.parametrize("bits", WIDTH_STEPS)
def test_ranges_of_packed_codes(bits: int) -> None:
    low, high = code_range(torch.uint8, bits)
    assert (low, high) == (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    values = torch.tensor([[-1e9, 1e9, low, high, float("-inf"), float("inf"), 0.5, -0.5]])
    decoded = from_codes(to_codes(values, torch.uint8, 8, bits), 8, torch.float32, bits)
    assert decoded.tolist() == [[low, high, low, high, low, high, 0, 0]]
    assert code_range(torch.uint8) == CODE_RANGES[torch.uint8]


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


def test_signs_are_packed_by_bits() -> None:
    signs = torch.rand((2, 3, 32), generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_signs(signs)
    assert packed.shape == (2, 3, 4) and torch.equal(unpack_signs(packed), signs * 2.0 - 1)
    assert packed[0, 0, 1] == sum(2**bit for bit in range(8) if signs[0, 0, 1 + 4 * bit])
