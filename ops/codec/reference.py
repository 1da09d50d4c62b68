"""The codec ops: float values to codes and back, `x = (code - zero) * scale`; `codes.py` says how codes are stored.

B batch, G KV heads, S new tokens, C capacity of a storage, D head_dim.
"""

import torch

from ..shared.codes import (
    FP8_DTYPES,
    code_range,
    dynamic_scale,
    expand_scale,
    from_codes,
    scale_for_zero,
    to_codes,
)
from .arguments import check_decode, check_encode, check_encode_token, check_position


def _written(storage: torch.Tensor, tokens: int, position: torch.Tensor | None, part: torch.Tensor) -> None:
    """Copy `part` `[B, G, S, *]` over `storage`: over all of it, or from the token `position` on."""
    if position is None:
        storage.copy_(part)
        return
    if position.device.type == "cpu":
        check_position(position, tokens, storage.shape[2])
    rows = position + torch.arange(tokens, device=part.device)
    if storage.dtype in FP8_DTYPES:  # which index_copy_ does not know
        storage, part = storage.view(torch.uint8), part.view(torch.uint8)
    storage.index_copy_(2, rows, part.to(storage.dtype))


def encode_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    position: torch.Tensor | None = None,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> None:
    """Write the codes of `x` by static scales: `round(x / scale + zero)`, clamped to the range of the code.

    With `levels`, the code is the index of the level nearest to `x / scale + zero`, the lower one of two as near.

    Args:
        x: values of shape `[B, G, S, D]`, any float dtype.
        scale: float32, `[G, 1, D]` per channel, `[G, 1, D / n]` per group of n channels, `[G, 1, 1]` per head; anything
            that `expand_scale` takes.
        zero: zero points in units of codes, of the shape of `scale`; None for a symmetric codec, as fp8 is.
        codes: `[B, G, S, D]` int8 or fp8, or `[B, G, S, D * bits / 8]` uint8; may be a strided view; overwritten.
        position: int64 `[1]`: `codes` is a storage of C tokens of which `position` to `position + S` are overwritten, a
            number that stays on the device; None: `codes` has S tokens.
        bits: of codes in uint8: 4, 3 or 2; other dtypes take no notice of it.
        levels: float32 `[2 ** bits]`, ascending: a codebook for codes in uint8; None: codes are whole numbers.

    Raises:
        ValueError: dtypes, shapes, devices, bits or levels that do not go together, or a D that the codes cannot have.
        IndexError: the tokens do not fit into the storage. What only `position` says is looked at on the CPU; on other
            devices, where nobody waits for it, tokens that do not fit are not written beyond the storage.
    """
    check_encode(x, scale, zero, codes, position, bits, levels)
    values = x.float()
    tokens, head_dim = values.shape[-2:]
    scaled = values / expand_scale(scale.float(), tokens, head_dim)
    if zero is not None:
        scaled = scaled + expand_scale(zero.float(), tokens, head_dim)
    _written(codes, tokens, position, to_codes(scaled, codes.dtype, head_dim, bits, levels))


def encode_token_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    bits: int = 4,
) -> None:
    """Write the codes of `x` and their scales, dynamic: per token and head, or per group of channels of them.

    Symmetric: `scale = max|x| / largest code`. With `zero`, affine: `scale = (max - min) / (high - low)` and
    `zero = low - min / scale`, which is not rounded; for zeros in float16, the scale is `max|x| / 32768` at least.

    Args:
        x: values of shape `[B, G, S, D]`, any float dtype.
        codes: as in `encode_reference`; overwritten.
        scale: float32 or float16 `[B, G, S, W]` where W divides D: the scale of each of W groups of channels; may be a
            strided view; overwritten. Codes are by the scale as it is stored.
        zero: as `scale`, for an affine codec; None for a symmetric one, as fp8 is.
        position: as in `encode_reference`; `position` counts in `scale` and `zero` too.
        bits: as in `encode_reference`.

    Raises:
        ValueError: dtypes, shapes, devices or bits that do not go together, or a D that the codes cannot have.
        IndexError: as `encode_reference`.
    """
    check_encode_token(x, codes, scale, zero, position, bits)
    values = x.float()
    tokens, head_dim = values.shape[-2:]
    low, high = code_range(codes.dtype, bits)
    grouped = values.unflatten(-1, (scale.shape[-1], -1))
    if zero is None:
        step = dynamic_scale(grouped.abs().amax(dim=-1), high).to(scale.dtype)
        offset = None
    else:
        smallest, largest = grouped.amin(dim=-1), grouped.amax(dim=-1)
        farthest = torch.maximum(smallest.abs(), largest.abs())
        step = scale_for_zero(dynamic_scale(largest - smallest, high - low), farthest, zero.dtype).to(scale.dtype)
        offset = (low - smallest / step.float()).to(zero.dtype)
    scaled = values / expand_scale(step.float(), tokens, head_dim)
    if offset is not None:
        scaled = scaled + expand_scale(offset.float(), tokens, head_dim)
        _written(zero, tokens, position, offset)
    _written(scale, tokens, position, step)
    _written(codes, tokens, position, to_codes(scaled, codes.dtype, head_dim, bits))


def decode_reference(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_group: int = 1,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """The values of codes, float32 `[B, G, S, D]`: `(code - zero) * scale`, or `(levels[index] - zero) * scale`.

    Args:
        codes: as in `encode_reference`.
        scale, zero: as `expand_scale` takes them with `token_group`; None leaves them out.
        bits, levels: as in `encode_reference`.

    Raises:
        ValueError: bits, levels, a scale or a zero that do not belong to the codes, or no codes at all.
    """
    tokens, head_dim = check_decode(codes, scale, zero, token_group, bits, levels)[2:]
    values = from_codes(codes, head_dim, torch.float32, bits, levels)
    if zero is not None:
        values = values - expand_scale(zero.float(), tokens, head_dim, token_group)
    return values if scale is None else values * expand_scale(scale.float(), tokens, head_dim, token_group)
