"""How codes are stored, and how scales belong to them: `x = (code - zero) * scale`, everywhere.

int8 codes are int8 tensors, fp8 codes float8_e4m3fn or float8_e5m2 tensors. int4 codes, -8 to 7, lie two in a uint8:
byte i of a block of n codes holds `code[i] + 8` in its low and `code[i + n / 2] + 8` in its high half. A block is a
whole row of head_dim in the KV cache and 32 codes in the weights of linears.
"""

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
CODE_RANGES = {
    torch.int8: (-128.0, 127.0),
    torch.uint8: (-8.0, 7.0),
    torch.float8_e4m3fn: (-448.0, 448.0),
    torch.float8_e5m2: (-57344.0, 57344.0),
}
"""Smallest and largest code by the dtype of the tensor that holds the codes; uint8 is int4, two in a byte."""
INT8_MIN, INT8_MAX = -128, 127
INT4_OFFSET = 8
SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""Floor of every scale, as in msmodelslim: a channel that is always zero keeps a usable scale."""


def pack_int4(codes: torch.Tensor, block: int) -> torch.Tensor:
    """Codes `[..., N]` from -8 to 7, of any dtype, as uint8 `[..., N / 2]`, in blocks of `block` codes."""
    low, high = (codes + INT4_OFFSET).to(torch.uint8).unflatten(-1, (-1, 2, block // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def unpack_int4(packed: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse of `pack_int4`, as int8 `[..., N]`."""
    halves = packed.unflatten(-1, (-1, block // 2))
    both = torch.stack((halves & 15, halves >> 4), dim=-2).to(torch.int8) - INT4_OFFSET
    return both.flatten(-3)


def code_width(codes: torch.Tensor) -> int:
    """Number of codes in the last dimension."""
    return codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1)


def to_codes(x: torch.Tensor, dtype: torch.dtype, block: int) -> torch.Tensor:
    """Values in units of codes, float32 `[..., N]`, rounded to codes as a tensor of `dtype`, halves to even.

    Values beyond the range take its end, so that fp8 codes are never infinite; NaN stays NaN in fp8.
    """
    low, high = CODE_RANGES[dtype]
    if dtype in FP8_DTYPES:
        return x.clamp(low, high).to(dtype)
    rounded = x.round().clamp(low, high)
    return pack_int4(rounded, block) if dtype == torch.uint8 else rounded.to(torch.int8)


def from_codes(codes: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes `[..., N]` as float values in units of codes; float tensors, which are no codes, as they are."""
    return (unpack_int4(codes, block) if codes.dtype == torch.uint8 else codes).to(dtype)


def dynamic_scale(extent: torch.Tensor, span: float) -> torch.Tensor:
    """The scale at which values of a float32 `extent` fill `span` units of codes, the same on every device.

    By a number that is no tensor, PyTorch divides on GPUs through its reciprocal, which is off by a bit now and then.
    """
    return (extent / extent.new_full((), span)).clamp_min(SMALLEST_SCALE)


def expand_scale(scale: torch.Tensor, tokens: int, width: int, token_group: int = 1) -> torch.Tensor:
    """A scale or zero `[..., T, W]` for each of `tokens` x `width` values, as `[..., tokens or 1, width or 1]`.

    Args:
        scale: T is 1 (for all tokens) or `ceil(tokens / token_group)`; W is 1 (for all channels) or a divisor of
            `width`, the number of groups of channels.
        token_group: consecutive tokens that share a row; the last group may be shorter.

    Raises:
        ValueError: neither fits.
    """
    rows, columns = (1, 1, *scale.shape)[-2:]
    if width % columns or rows not in (1, -(-tokens // token_group)):
        raise ValueError(
            f"a scale {tuple(scale.shape)} does not belong to {tokens} tokens in groups of {token_group} and "
            f"{width} channels"
        )
    if rows > 1 and token_group > 1:
        scale = scale.repeat_interleave(token_group, dim=-2)[..., :tokens, :]
    return scale.repeat_interleave(width // columns, dim=-1) if 1 < columns < width else scale
