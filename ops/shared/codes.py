"""How codes are stored, and how scales belong to them: `x = (code - zero) * scale`, everywhere.

int8 codes are int8 tensors, fp8 codes float8_e4m3fn or float8_e5m2 tensors. Codes of 4, 3 and 2 bits lie in uint8
tensors, as indices: the code plus `2 ** (bits - 1)`. A block of n codes takes n * bits / 8 bytes; it is a whole row of
head_dim in the KV cache and 32 codes in the weights of linears.

int4, -8 to 7: byte i holds the indices i and i + n / 2, from the low bits up.
int2, -2 to 1: byte i holds the indices i, i + n / 4, i + n / 2 and i + 3 n / 4, from the low bits up.
int3, -4 to 3: n / 4 bytes with the low two bits of each index, as int2, then n / 8 bytes of high bits: bit k of byte i
is that of index i + k * n / 8.

With a codebook, `levels`, an index stands for its level, and `code` in the formula is that level.
"""

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
CODE_RANGES = {
    torch.int8: (-128.0, 127.0),
    torch.uint8: (-8.0, 7.0),
    torch.float8_e4m3fn: (-448.0, 448.0),
    torch.float8_e5m2: (-57344.0, 57344.0),
}
"""Smallest and largest code by the dtype of the tensor that holds the codes; uint8 as int4. See `code_range`."""
INT8_MIN, INT8_MAX = -128, 127
WIDTH_STEPS = {4: 2, 3: 8, 2: 4}
"""Bits of the codes that uint8 tensors hold; the number of codes in a block is a multiple of these."""
SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""Floor of every scale, as in msmodelslim: a channel that is always zero keeps a usable scale."""

LARGEST_ZERO = 32768.0
"""Zeros in float16 stay near or below it, so that none is infinite: where the values of a group are nearly the same,
its scale is larger than their range needs, by less than float16 loses of such values."""


def _checked_bits(bits: int) -> int:
    if bits not in WIDTH_STEPS:
        raise ValueError(f"uint8 tensors hold codes of 2, 3 or 4 bits, not {bits}")
    return bits


def code_range(dtype: torch.dtype, bits: int = 4) -> tuple[float, float]:
    """Smallest and largest code of a tensor of `dtype`; `bits` counts for uint8 only.

    Raises:
        ValueError: uint8 and bits other than 2, 3 and 4.
    """
    if dtype != torch.uint8:
        return CODE_RANGES[dtype]
    half = float(2 ** (_checked_bits(bits) - 1))
    return -half, half - 1


def stored_width(width: int, dtype: torch.dtype, bits: int = 4) -> int:
    """Number of elements of `dtype` that a row of `width` codes takes; `bits` counts for uint8 only.

    Raises:
        ValueError: uint8, and the codes of the row do not fill whole bytes as their packing wants it.
    """
    if dtype != torch.uint8:
        return width
    if width % WIDTH_STEPS[_checked_bits(bits)]:
        raise ValueError(f"a row of int{bits} codes has a multiple of {WIDTH_STEPS[bits]} channels, not {width}")
    return width * bits // 8


def code_width(codes: torch.Tensor, bits: int = 4) -> int:
    """Number of codes in the last dimension; `bits` counts for uint8 only.

    Raises:
        ValueError: uint8, and no whole number of codes fits.
    """
    size = codes.shape[-1]
    if codes.dtype != torch.uint8:
        return size
    if size * 8 % (_checked_bits(bits) * WIDTH_STEPS[bits]):
        raise ValueError(f"{size} bytes are no row of int{bits} codes")
    return size * 8 // bits


def _pack_fields(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 `[..., n]` of values of 1, 2 or 4 bits, as `[..., n * bits / 8]`."""
    packed, *others = fields.unflatten(-1, (8 // bits, -1)).unbind(-2)
    for number, part in enumerate(others, 1):
        packed = packed | part << number * bits
    return packed


def _unpack_fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_pack_fields`."""
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)], dim=-1)


def pack_indices(indices: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Indices `[..., N]` from 0 to `2 ** bits - 1`, of any dtype, as uint8 `[..., N * bits / 8]`, in blocks of `block`.

    Raises:
        ValueError: bits other than 2, 3 and 4, or a block of a number of codes that cannot be packed.
    """
    block_bytes = stored_width(block, torch.uint8, bits)
    blocks = indices.to(torch.uint8).unflatten(-1, (indices.shape[-1] // block, block))
    if bits == 3:
        packed = torch.cat((_pack_fields(blocks & 3, 2), _pack_fields(blocks >> 2, 1)), dim=-1)
    else:
        packed = _pack_fields(blocks, bits)
    return packed.reshape(*indices.shape[:-1], indices.shape[-1] // block * block_bytes)


def unpack_indices(packed: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """The inverse of `pack_indices`, as uint8 `[..., N]`."""
    block_bytes = stored_width(block, torch.uint8, bits)
    blocks = packed.unflatten(-1, (packed.shape[-1] // block_bytes, block_bytes))
    if bits == 3:
        low, high = blocks.split((block // 4, block // 8), dim=-1)
        indices = _unpack_fields(low, 2) | _unpack_fields(high, 1) << 2
    else:
        indices = _unpack_fields(blocks, bits)
    return indices.flatten(-2)


def pack_signs(is_positive: torch.Tensor) -> torch.Tensor:
    """Signs, bool `[..., N]`, as uint8 `[..., N / 8]`: bit k of byte i is that of value i + k * N / 8."""
    return _pack_fields(is_positive.to(torch.uint8), 1)


def unpack_signs(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_signs`: float32 `[..., N]` of 1 and -1."""
    return _unpack_fields(packed, 1).float() * 2 - 1


def pack_codes(codes: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Codes `[..., N]` from `-2 ** (bits - 1)` on, of any signed dtype, as uint8 `[..., N * bits / 8]`."""
    return pack_indices(codes + 2 ** (bits - 1), bits, block)


def unpack_codes(packed: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """The inverse of `pack_codes`, as int8 `[..., N]`."""
    return unpack_indices(packed, bits, block).to(torch.int8) - 2 ** (bits - 1)


def pack_int4(codes: torch.Tensor, block: int) -> torch.Tensor:
    """Codes `[..., N]` from -8 to 7, of any signed dtype, as uint8 `[..., N / 2]`, in blocks of `block` codes."""
    return pack_codes(codes, 4, block)


def unpack_int4(packed: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse of `pack_int4`, as int8 `[..., N]`."""
    return unpack_codes(packed, 4, block)


def check_levels(dtype: torch.dtype, bits: int, levels: torch.Tensor | None) -> None:
    """Raise ValueError unless `levels` is None or a codebook for codes of `bits` in a tensor of `dtype`."""
    if levels is None:
        return
    if dtype != torch.uint8:
        raise ValueError(f"a codebook is for codes of 2 to 4 bits in uint8, not {dtype}")
    if levels.dtype != torch.float32 or levels.shape != (2 ** _checked_bits(bits),):
        raise ValueError(
            f"the levels of int{bits} codes are float32 ({2**bits},), not {levels.dtype} {tuple(levels.shape)}"
        )


def nearest_level(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the level nearest to each value, the lower one of two as near; int64. NaN takes the last.

    Args:
        x: float32, any shape.
        levels: float32 `[N]`, ascending; borders are the middles of neighbours, rounded to float32.
    """
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def to_codes(
    x: torch.Tensor, dtype: torch.dtype, block: int, bits: int = 4, levels: torch.Tensor | None = None
) -> torch.Tensor:
    """Values in units of codes, float32 `[..., N]`, rounded to codes as a tensor of `dtype`, halves to even.

    Values beyond the range take its end, so that fp8 codes are never infinite; NaN stays NaN in fp8. With `levels`,
    float32 `[2 ** bits]`, values go to the nearest level.

    Raises:
        ValueError: bits, block or levels that do not belong to the dtype.
    """
    check_levels(dtype, bits, levels)
    if levels is not None:
        return pack_indices(nearest_level(x, levels), bits, block)
    low, high = code_range(dtype, bits)
    if dtype in FP8_DTYPES:
        return x.clamp(low, high).to(dtype)
    rounded = x.round().clamp(low, high)
    return pack_codes(rounded, bits, block) if dtype == torch.uint8 else rounded.to(torch.int8)


def from_codes(
    codes: torch.Tensor, block: int, dtype: torch.dtype, bits: int = 4, levels: torch.Tensor | None = None
) -> torch.Tensor:
    """Codes `[..., N]`, or with `levels` their levels, as float values; float tensors, which are no codes, as they are.

    Raises:
        ValueError: bits, block or levels that do not belong to the codes.
    """
    check_levels(codes.dtype, bits, levels)
    if levels is not None:
        return levels[unpack_indices(codes, bits, block).int()].to(dtype)
    return (unpack_codes(codes, bits, block) if codes.dtype == torch.uint8 else codes).to(dtype)


def dynamic_scale(extent: torch.Tensor, span: float) -> torch.Tensor:
    """The scale at which values of a float32 `extent` fill `span` units of codes, the same on every device.

    By a number that is no tensor, PyTorch divides on GPUs through its reciprocal, which is off by a bit now and then.
    """
    return (extent / extent.new_full((), span)).clamp_min(SMALLEST_SCALE)


def scale_for_zero(scale: torch.Tensor, farthest: torch.Tensor, zero_dtype: torch.dtype) -> torch.Tensor:
    """A float32 scale, raised where the zero of values up to `farthest` would be too large for float16."""
    return torch.maximum(scale, farthest / LARGEST_ZERO) if zero_dtype == torch.float16 else scale


def expand_scale(scale: torch.Tensor, tokens: int, width: int, token_group: int = 1) -> torch.Tensor:
    """A scale or zero `[..., T, W]` for each of `tokens` x `width` values, as `[..., tokens or 1, width or 1]`.

    Args:
        scale: T is 1 (for all tokens) or `ceil(tokens / token_group)`; W is 1 (for all channels) or a divisor of
            `width`, the number of groups of channels.
        token_group: consecutive tokens that share a row; the last group may be shorter.

    Raises:
        ValueError: neither fits.
    """
    rows, num_groups = (1, 1, *scale.shape)[-2:]
    if width % num_groups or rows not in (1, -(-tokens // token_group)):
        raise ValueError(
            f"a scale {tuple(scale.shape)} does not belong to {tokens} tokens in groups of {token_group} and "
            f"{width} channels"
        )
    if rows > 1 and token_group > 1:
        scale = scale.repeat_interleave(token_group, dim=-2)[..., :tokens, :]
    return scale.repeat_interleave(width // num_groups, dim=-1) if 1 < num_groups < width else scale
