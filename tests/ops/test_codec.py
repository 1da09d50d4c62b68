"""The codec on the CPU writes the codes of its reference, bit for bit."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import decode, encode, encode_token
from octavo.ops.codec.reference import decode_reference, encode_reference, encode_token_reference
from octavo.ops.shared.codes import FP8_DTYPES, WIDTH_STEPS, stored_width

pytestmark = pytest.mark.usefixtures("build")
TOKENS, CAPACITY = 33, 64


def values_and_storage(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cache hands to the codec: values that are a transposed view, and codes that are a slice of storage."""
    values = (torch.randn(2, TOKENS, 3, width) * 3).to(dtype).transpose(1, 2)
    return values, torch.zeros((2, 3, CAPACITY, width), dtype=torch.int8)


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([1, 5, 16, 64, 77, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    form=st.sampled_from(["per channel", "per head", "scalar"]),
    has_zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_static_codes_are_those_of_the_reference(
    width: int, dtype: torch.dtype, form: str, has_zero: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    values, storage = values_and_storage(width, dtype)
    expected = storage.clone()
    shape = {"per channel": (3, 1, width), "per head": (3, 1, 1), "scalar": ()}[form]
    scale = torch.rand(shape) * 0.05 + 0.01
    zero = torch.randn(shape) * 10 if has_zero else None
    encode(values, scale, zero, storage[:, :, 5 : 5 + TOKENS])
    encode_reference(values, scale, zero, expected[:, :, 5 : 5 + TOKENS])
    assert torch.equal(storage, expected)  # also where nothing was to be written


@settings(max_examples=40, deadline=None)
@given(
    width=st.sampled_from([1, 5, 16, 64, 77, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_codes_and_scales_per_token_are_those_of_the_reference(width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    values, storage = values_and_storage(width, dtype)
    scales = torch.zeros(2, 3, CAPACITY, 1)
    expected, expected_scales = storage.clone(), scales.clone()
    encode_token(values, storage[:, :, 5 : 5 + TOKENS], scales[:, :, 5 : 5 + TOKENS])
    encode_token_reference(values, expected[:, :, 5 : 5 + TOKENS], expected_scales[:, :, 5 : 5 + TOKENS])
    assert torch.equal(storage, expected)
    assert torch.equal(scales, expected_scales)


CODE_DTYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
FORMATS = ((torch.int8, 4), (torch.uint8, 4), (torch.uint8, 3), (torch.uint8, 2), *((dtype, 4) for dtype in FP8_DTYPES))
"""dtype of the tensor of codes, and bits."""
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of one dtype and the same bits, but for NaN, of which one is as good as the other."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    return one.dtype == other.dtype and torch.equal(one.float().nan_to_num(1e9), other.float().nan_to_num(1e9))


def storage_of(codes: torch.dtype, width: int, bits: int = 4) -> torch.Tensor:
    """Storage of 2 sequences, 3 heads and CAPACITY tokens that holds something already."""
    stored = torch.randint(0, 256 if codes == torch.uint8 else 100, (2, 3, CAPACITY, stored_width(width, codes, bits)))
    return stored.to(torch.uint8).view(codes)


def codebook(bits: int) -> torch.Tensor:
    """Ascending levels, of which two are equal; a strided view."""
    levels = (torch.randn(2**bits) * 2).sort().values
    levels[1] = levels[0]
    return levels.repeat_interleave(3)[::3]


def padded_width(width: int, codes: torch.dtype, bits: int) -> int:
    """The smallest width from `width` on that codes can have."""
    step = WIDTH_STEPS[bits] if codes == torch.uint8 else 1
    return -(-width // step) * step


def values_of(width: int, dtype: torch.dtype, special: float | None) -> torch.Tensor:
    """A transposed view `[2, 3, TOKENS, width]`, with one special value where asked for."""
    values = (torch.randn(2, TOKENS, 3, width) * 3).to(dtype).transpose(1, 2)
    if special is not None:
        values[1, 2, 5, width // 2] = special
    return values


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def window(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :, 5 : 5 + TOKENS]


def divisor(width: int, groups: int) -> int:
    return groups if width % groups == 0 else 1


class Case:
    """Random arguments that both forms of encoding share."""

    def __init__(
        self,
        codes: tuple[torch.dtype, int],
        width: int,
        dtype: torch.dtype,
        has_position: bool,
        special: float | None,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.bits = codes[1]
        self.width = padded_width(width, *codes)
        self.values = values_of(self.width, dtype, special)
        self.position = torch.tensor([seed % (CAPACITY - TOKENS + 1)]) if has_position else None
        self.storage = storage_of(codes[0], self.width, self.bits)
        self.view: Callable[[torch.Tensor], torch.Tensor] = unchanged if has_position else window


cases = st.builds(
    Case,
    codes=st.sampled_from(FORMATS),
    width=st.sampled_from([1, 5, 16, 64, 77, 96, 128, 600]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    has_position=st.booleans(),
    special=st.sampled_from([None, None, None, float("nan"), float("inf"), -float("inf")]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=80, deadline=None)
@given(
    case=cases,
    form=st.sampled_from(["channel", "head", "groups", "tokens", "number"]),
    zero_form=st.sampled_from(["none", "same", "head"]),
    has_levels=st.booleans(),
    part_dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_every_static_form_is_that_of_the_reference(
    case: Case, form: str, zero_form: str, has_levels: bool, part_dtype: torch.dtype
) -> None:
    groups = divisor(case.width, 4)
    shapes = {
        "channel": (3, 1, case.width),
        "head": (3, 1, 1),
        "groups": (3, 1, groups),
        "tokens": (2, 3, TOKENS, groups),
        "number": (),
    }
    is_packed = case.storage.dtype == torch.uint8
    scale = (torch.rand(shapes[form]) + 0.2 if is_packed else torch.rand(shapes[form]) * 0.05 + 0.01).to(part_dtype)
    zero_shape = shapes["head" if zero_form == "head" else form]
    zero = None if zero_form == "none" else (torch.randn(zero_shape) * (1 if is_packed else 10)).to(part_dtype)
    levels = codebook(case.bits) if has_levels and is_packed else None
    expected = case.storage.clone()
    encode(case.values, scale, zero, case.view(case.storage), case.position, case.bits, levels)
    encode_reference(case.values, scale, zero, case.view(expected), case.position, case.bits, levels)
    assert equal(case.storage, expected)


@settings(max_examples=80, deadline=None)
@given(
    case=cases,
    groups=st.sampled_from([1, 1, 2, 4, 16]),
    scale_dtype=st.sampled_from([torch.float32, torch.float16]),
    zero_dtype=st.sampled_from([None, torch.float32, torch.float16]),
)
def test_every_dynamic_form_is_that_of_the_reference(
    case: Case, groups: int, scale_dtype: torch.dtype, zero_dtype: torch.dtype | None
) -> None:
    groups = divisor(case.width, groups)
    scale = torch.ones((2, 3, CAPACITY, groups), dtype=scale_dtype)
    zero = None if zero_dtype is None else torch.ones((2, 3, CAPACITY, groups), dtype=zero_dtype)
    expected = [None if part is None else part.clone() for part in (case.storage, scale, zero)]
    views = [None if part is None else case.view(part) for part in (case.storage, scale, zero)]
    encode_token(case.values, *views, case.position, case.bits)
    expected_views = [None if part is None else case.view(part) for part in expected]
    encode_token_reference(case.values, *expected_views, case.position, case.bits)
    for part, expected_part in zip((case.storage, scale, zero), expected, strict=True):
        assert part is None or equal(part, expected_part)


@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from([*FORMATS, *FORMATS[1:4], *((dtype, 4) for dtype in FLOAT_DTYPES)]),
    width=st.sampled_from([1, 5, 16, 64, 77, 128, 192]),
    token_group=st.sampled_from([1, 4, 32, 100]),
    scale_form=st.sampled_from(["none", "channel", "token", "groups", "number"]),
    zero_form=st.sampled_from(["none", "channel", "token", "groups"]),
    part_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    has_levels=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_decoded_values_are_those_of_the_reference(
    form: tuple[torch.dtype, int],
    width: int,
    token_group: int,
    scale_form: str,
    zero_form: str,
    part_dtype: torch.dtype,
    has_levels: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    dtype, bits = form
    width = padded_width(width, dtype, bits)
    codes = storage_of(dtype, width, bits) if dtype in CODE_DTYPES else torch.randn(2, 3, CAPACITY, width).to(dtype)
    codes = codes[:, 1:, 3:50]
    rows = -(-codes.shape[2] // token_group)
    shapes = {
        "channel": (2, 1, width),
        "token": (2, 2, rows, 1),
        "groups": (2, 2, rows, divisor(width, 4)),
        "number": (1,),
    }
    scale = None if scale_form == "none" else torch.rand(shapes[scale_form]).to(part_dtype)
    zero = None if zero_form == "none" else (torch.randn(shapes[zero_form]) * 3).to(part_dtype)
    levels = codebook(bits) if has_levels and dtype == torch.uint8 else None
    expected = decode_reference(codes, scale, zero, token_group, bits, levels).float()
    assert equal(decode(codes, scale, zero, token_group, bits, levels), expected)


@pytest.mark.parametrize("codes", [torch.int8, torch.uint8])
@pytest.mark.parametrize("value", [5.0, -5.0, 6e4, 1e-3, 0.0])
@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-4, 1e-2])
def test_zeros_in_float16_of_nearly_equal_values_are_finite(codes: torch.dtype, value: float, spread: float) -> None:
    values = value * (1 + spread * torch.rand(1, 2, 3, 32))
    storage = torch.empty((1, 2, 3, 32 if codes == torch.int8 else 16), dtype=codes)
    scale, zero = torch.empty((2, 1, 2, 3, 4), dtype=torch.float16)
    encode_token(values, storage, scale, zero)
    expected = [torch.empty_like(part) for part in (storage, scale, zero)]
    encode_token_reference(values, *expected)
    assert all(torch.equal(*pair) for pair in zip((storage, scale, zero), expected, strict=True))
    assert ((decode(storage, scale, zero) - values).abs() <= abs(value) * (2**-10 + spread)).all()


@pytest.mark.parametrize("bits", WIDTH_STEPS)
def test_columns_of_a_strided_scale_are_groups_too(bits: int) -> None:
    codes = storage_of(torch.uint8, 128, bits)
    scale = torch.rand(2, 3, 4, CAPACITY).transpose(2, 3)
    zero = torch.rand(2, 3, CAPACITY, 8)[..., ::2]
    assert torch.equal(decode(codes, scale, zero, 1, bits), decode_reference(codes, scale, zero, 1, bits))


@pytest.mark.parametrize("bits", WIDTH_STEPS)
def test_ties_between_levels_go_to_the_lower_one(bits: int) -> None:
    levels = torch.arange(2.0**bits) ** 2 - 3
    middles = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([middles, middles.nextafter(torch.tensor(1e9)), levels, torch.tensor([-1e9, 1e9])])
    values = torch.cat([values, torch.zeros(-len(values) % 8)]).view(1, 1, 1, -1)
    codes = storage_of(torch.uint8, values.shape[-1], bits)[:1, :1, :1]
    encode(values, torch.ones(()), None, codes, bits=bits, levels=levels)
    decoded = decode(codes, None, None, bits=bits, levels=levels).flatten()
    count = len(middles)
    assert torch.equal(decoded[:count], levels[:-1])
    assert torch.equal(decoded[count : 2 * count], levels[1:])
    assert torch.equal(decoded[2 * count : 3 * count + 1], levels)
    assert decoded[3 * count + 1 : 3 * count + 3].tolist() == [levels[0], levels[-1]]


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_codes_are_those_of_pytorch(codes: torch.dtype) -> None:
    every = torch.arange(256).to(torch.uint8).view(codes).float()
    every = every[every.isfinite()].sort().values.unique()
    middles = (every[1:] + every[:-1]) / 2  # ties
    values = torch.cat([every, middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9))])
    values = torch.cat([values, torch.tensor([1e9, -1e9, float("inf"), -float("inf"), float("nan"), -0.0, 1e-40])])
    written = torch.empty((1, 1, 1, len(values)), dtype=torch.uint8).view(codes)
    encode(values.view(1, 1, 1, -1), torch.ones(1, 1, 1), None, written)
    largest = torch.finfo(codes).max
    expected = values.clamp(-largest, largest).to(codes)
    assert torch.equal(written.flatten().view(torch.uint8), expected.view(torch.uint8))


def test_codes_whose_channels_are_strided_are_written() -> None:
    values, storage = torch.randn(1, 2, 3, 16), torch.zeros((1, 2, 16, 9), dtype=torch.int8).transpose(2, 3)
    expected, scale = torch.zeros((1, 2, 9, 16), dtype=torch.int8), torch.rand(2, 1, 16)
    encode(values, scale, None, storage, position=torch.tensor([4]))
    encode_reference(values, scale, None, expected, position=torch.tensor([4]))
    assert torch.equal(storage, expected)


def test_halves_go_to_even_and_the_ends_are_clamped() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0, 0.0]).view(1, 1, 1, 8)
    codes = torch.empty((1, 1, 1, 8), dtype=torch.int8)
    encode(values, torch.ones(1, 1, 1), None, codes)
    assert codes.flatten().tolist() == [0, 2, 2, 0, -2, 127, -128, 0]


def test_codes_times_scale_are_within_half_a_step() -> None:
    values = torch.randn(1, 2, 9, 64)
    codes, scale = torch.empty((1, 2, 9, 64), dtype=torch.int8), torch.empty(1, 2, 9, 1)
    encode_token(values, codes, scale)
    assert ((codes * scale - values).abs() <= scale * 0.5001).all()


def test_zeros_keep_a_usable_scale() -> None:
    codes, scale = torch.empty((1, 1, 2, 16), dtype=torch.int8), torch.empty(1, 1, 2, 1)
    encode_token(torch.zeros(1, 1, 2, 16), codes, scale)
    assert not codes.any()
    assert (scale > 0).all()


def test_no_tokens_are_no_work() -> None:
    codes = torch.empty((1, 2, 0, 16), dtype=torch.int8)
    encode(torch.empty(1, 2, 0, 16), torch.ones(2, 1, 16), None, codes)
    encode_token(torch.empty(1, 2, 0, 16), codes, torch.empty(1, 2, 0, 1))


def test_codes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="codes must be int8"):
        encode(torch.randn(1, 2, 3, 16), torch.ones(2, 1, 16), None, torch.empty((1, 2, 4, 16), dtype=torch.int8))


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    values, codes = torch.randn(1, 2, 3, 16), torch.zeros((1, 2, 8, 16), dtype=torch.int8)
    scale, at = torch.ones(2, 1, 16), torch.tensor([6])
    scales = torch.ones(1, 2, 3, 1)
    refused = [
        (IndexError, "3 tokens from position 6 on", lambda: encode(values, scale, None, codes, position=at)),
        (IndexError, "position -1", lambda: encode(values, scale, None, codes, position=torch.tensor([-1]))),
        (ValueError, "must be uint8 (1, 2, 3, 8)", lambda: encode(values, scale, None, codes[:, :, :3].byte())),
        (ValueError, "2 channels, not 15", lambda: encode(values[..., 1:], scale, None, codes[:, :, :3].byte())),
        (
            ValueError,
            "scale (2, 1, 3) does not belong",
            lambda: encode(values, torch.ones(2, 1, 3), None, codes[:, :, :3]),
        ),
        (ValueError, "does not broadcast", lambda: encode(values, torch.ones(3, 1, 1), None, codes[:, :, :3])),
        (ValueError, "scale (1, 2, 4, 1)", lambda: encode_token(values, codes[:, :, :3], torch.ones(1, 2, 4, 1))),
        (ValueError, "not torch.bfloat16", lambda: encode_token(values, codes[:, :, :3], scales.bfloat16())),
        (ValueError, "zero (1, 2, 1, 1)", lambda: encode_token(values, codes[:, :, :3], scales, scales[:, :, :1])),
        (ValueError, "does not belong to 8 tokens", lambda: decode(codes, torch.ones(1, 2, 8, 5), None)),
        (ValueError, "in groups of 4", lambda: decode(codes, torch.ones(1, 2, 3, 1), None, 4)),
    ]
    for error, reason, call in refused:
        with pytest.raises(error, match=re.escape(reason)):
            call()


def test_bits_and_levels_that_do_not_fit_are_refused_with_the_reason() -> None:
    values, scale = torch.randn(1, 2, 3, 12), torch.ones(2, 1, 12)
    codes, packed, levels = (torch.zeros((1, 2, 3, n), dtype=torch.uint8) for n in (12, 3, 4))
    refused = [
        ("a multiple of 8 channels, not 12", lambda: encode(values, scale, None, packed, bits=3)),
        ("2, 3 or 4 bits, not 5", lambda: encode(values, scale, None, packed, bits=5)),
        ("2, 3 or 4 bits, not 1", lambda: encode_token(values, packed, torch.ones(1, 2, 3, 1), bits=1)),
        ("2, 3 or 4 bits, not 8", lambda: decode(packed, None, None, bits=8)),
        ("4 bytes are no row of int3 codes", lambda: decode(levels, None, None, bits=3)),
        ("must be uint8 (1, 2, 3, 3)", lambda: encode(values, scale, None, codes, bits=2)),
        ("in uint8, not torch.int8", lambda: encode(values, scale, None, codes.char(), levels=torch.ones(256))),
        ("are float32 (4,)", lambda: encode(values, scale, None, packed, bits=2, levels=torch.ones(16))),
        ("are float32 (4,)", lambda: decode(packed, scale, None, bits=2, levels=torch.ones(4).double())),
    ]
    for reason, call in refused:
        with pytest.raises(ValueError, match=re.escape(reason)):
            call()
    encode(values, scale, None, codes.char(), bits=99)  # which counts for uint8 only


def test_opcheck() -> None:
    values, codes = torch.randn(1, 2, 3, 16), torch.zeros((1, 2, 3, 16), dtype=torch.int8)
    packed = torch.zeros((1, 2, 9, 8), dtype=torch.uint8)
    scale, zero = torch.zeros(1, 2, 9, 4), torch.zeros((1, 2, 9, 4), dtype=torch.float16)
    ops = torch.ops.octavo
    torch.library.opcheck(ops.encode.default, (values, torch.ones(2, 1, 16), None, codes))
    torch.library.opcheck(ops.encode.default, (values, torch.ones(2, 1, 1), None, packed, torch.tensor([2])))
    torch.library.opcheck(ops.encode_token.default, (values, codes, torch.zeros(1, 2, 3, 1)))
    torch.library.opcheck(ops.encode_token.default, (values, packed, scale, zero, torch.tensor([2])))
    torch.library.opcheck(ops.decode.default, (packed, torch.rand(1, 2, 3, 4), None, 4))
    for bits in WIDTH_STEPS:
        storage, levels = storage_of(torch.uint8, 16, bits)[:1, :2], torch.rand(2**bits).sort().values
        appended = {"position": torch.tensor([2]), "bits": bits}
        torch.library.opcheck(ops.encode.default, (values, torch.ones(2, 1, 1), None, storage), appended)
        arguments = (values, torch.ones(2, 1, 1), None, storage, torch.tensor([2]), bits, levels)
        torch.library.opcheck(ops.encode.default, arguments)
        scales = torch.zeros(1, 2, CAPACITY, 4)
        torch.library.opcheck(ops.encode_token.default, (values, storage, scales), appended)
        torch.library.opcheck(ops.decode.default, (storage, torch.rand(2, 1, 4), None, 1, bits, levels))
