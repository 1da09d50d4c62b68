"""Channels of K whose codes are wider than those of the others, `Codec.wide_share`: which, and where their codes lie.

Which they are follows from the values of each group of tokens: those that are largest on average, whose numbers are
stored. The low bits of their codes lie where the codes of all channels lie, the others in a plane of their own.

Source: Kitty (arXiv 2511.18643), channels of K by their mean magnitude.

B batch, G KV heads, D head_dim, T groups of n tokens, W channels with wider codes.
"""

from typing import NamedTuple

import torch

from ....ops.shared.codes import nearest_level, pack_indices, unpack_indices
from ..schemes.tensor_codec import Codec
from .dynamic_scales import group_scale, known_levels


class MixedCodes(NamedTuple):
    """Groups of tokens in codes of two widths.

    Attributes:
        indices: uint8 `[B, G, T, D, n]`, of wider codes the low bits.
        wide: uint8 `[B, G, T, *]`, packed: the other bits of the wider codes.
        channels: uint8 `[B, G, T, W]`, ascending: whose codes are wider.
        scale, zero: `[B, G, T, D]`; zero is None where the codec is symmetric.
    """

    indices: torch.Tensor
    wide: torch.Tensor
    channels: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


def _indexed(codec: Codec, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Indices from 0 on, uint8 `[..., n]`, of float32 values, and their scale and zero, `[...]`."""
    scale, zero = group_scale(codec, groups)
    scaled = groups / scale.float()[..., None]
    if zero is not None:
        scaled = scaled + zero.float()[..., None]
    levels = known_levels(codec, groups.device)
    if levels is not None:
        return nearest_level(scaled, levels).to(torch.uint8), scale, zero
    low, high = codec.ends
    return (scaled.round().clamp(low, high) - low).to(torch.uint8), scale, zero


def encode_mixed(codec: Codec, groups: torch.Tensor) -> MixedCodes:
    """Code groups of tokens of float32 `[B, G, T, D, n]`."""
    size = groups.shape[-1]
    channels = groups.abs().mean(dim=-1).topk(codec.wide_channels(groups.shape[-2]), dim=-1).indices.sort(dim=-1).values
    wider = channels[..., None].expand(*channels.shape, size)
    indices, scale, zero = _indexed(codec, groups)
    wide, wide_scale, wide_zero = _indexed(codec.wide, groups.gather(-2, wider))
    indices.scatter_(-2, wider, wide & 2**codec.bits - 1)
    scale.scatter_(-1, channels, wide_scale)
    if zero is not None:
        zero.scatter_(-1, channels, wide_zero)
    packed = pack_indices(wide >> codec.bits, codec.wide_bits, size).flatten(-2)
    return MixedCodes(indices, packed, channels.to(torch.uint8), scale, zero)


def decode_wide(codec: Codec, mixed: MixedCodes) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels with wider codes, int64 `[B, G, T, W, n]`, and their values, float32 of the same shape."""
    size = codec.scale_group
    numbers = mixed.channels.long()
    wider = numbers[..., None].expand(*numbers.shape, size)
    packed = mixed.wide.unflatten(-1, (numbers.shape[-1], -1))
    indices = unpack_indices(packed, codec.wide_bits, size) << codec.bits | mixed.indices.gather(-2, wider)
    levels = known_levels(codec.wide, indices.device)
    values = indices.float() + codec.wide.ends[0] if levels is None else levels[indices.int()]
    if mixed.zero is not None:
        values = values - mixed.zero.gather(-1, numbers).float()[..., None]
    return wider, values * mixed.scale.gather(-1, numbers).float()[..., None]
