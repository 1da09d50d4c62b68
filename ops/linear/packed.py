"""Weights of linears in the order in which the C kernel reads them: panels of 16 output channels.

packed.h says how codes lie in them. A weight is packed once, when it is loaded; `unpack` gives back what was stored.
"""

import struct
from dataclasses import dataclass

import torch

from ..shared.codes import pack_int4, unpack_indices
from .arguments import WEIGHT_BLOCK
from .cpu import LINEAR_KERNEL

PANEL_CHANNELS = 16
"""Output channels of a panel."""
_pack_addresses = struct.Struct("6q").pack


@dataclass(frozen=True)
class Packed:
    """A packed weight: `w = (code - zero) * scale`.

    Args:
        codes: uint8 `[panels, bytes of a panel]`.
        scale: float32 or float16 `[panels, K / group, 16]`, zeros for channels that pad the last panel.
        zero: of the shape and dtype of `scale`, in units of codes; None if symmetric.
        bits: 8 or 4.
        out_features, in_features: N and K of the weight.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    out_features: int
    in_features: int

    @property
    def num_groups(self) -> int:
        """Groups along K."""
        return self.scale.shape[1]


def _panels_of(part: torch.Tensor) -> torch.Tensor:
    """`[N, W]` as `[panels, W, 16]`, contiguous; zeros behind the last channel."""
    out_features, groups = part.shape
    panels = -(-out_features // PANEL_CHANNELS)
    padded = part.new_zeros((panels * PANEL_CHANNELS, groups))
    padded[:out_features] = part
    return padded.view(panels, PANEL_CHANNELS, groups).transpose(1, 2).contiguous()


def _rows_of(part: torch.Tensor, out_features: int) -> torch.Tensor:
    """The inverse of `_panels_of`."""
    return part.transpose(1, 2).reshape(-1, part.shape[1])[:out_features].contiguous()


def _unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as they are stored, as uint8 indices `[N, K]` from 0."""
    return codes.view(torch.uint8) ^ 128 if bits == 8 else unpack_indices(codes, 4, WEIGHT_BLOCK)


def _pack_panels_reference(codes: torch.Tensor, bits: int, panels: torch.Tensor) -> None:
    """Write codes to `panels`, in PyTorch."""
    indices = _unsigned(codes, bits)
    depth = -(-indices.shape[1] // WEIGHT_BLOCK) * WEIGHT_BLOCK
    padded = indices.new_zeros((panels.shape[0] * PANEL_CHANNELS, depth))
    padded[: indices.shape[0], : indices.shape[1]] = indices
    words = padded.view(torch.int32)
    if bits == 4:
        words = words[:, ::2] | words[:, 1::2] << 4
    panels.view(torch.int32).view(panels.shape[0], -1, PANEL_CHANNELS).copy_(
        words.view(panels.shape[0], PANEL_CHANNELS, -1).transpose(1, 2)
    )


def _pack_panels(codes: torch.Tensor, bits: int, panels: torch.Tensor, in_features: int) -> None:
    """Write contiguous codes to `panels`."""
    run = LINEAR_KERNEL.load().get("pack_panels") if codes.device.type == "cpu" else None
    if run is None:
        _pack_panels_reference(codes, bits, panels)
        return
    threads = torch.get_num_threads()
    run(_pack_addresses(codes.data_ptr(), panels.data_ptr(), bits, in_features, codes.shape[0], threads))


def pack_weight(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> Packed:
    """Pack a weight.

    Args:
        codes: int8 `[N, K]`, or for 4 bits also uint8 `[N, K / 2]`, packed in blocks of 32 codes.
        scale: float `[N]` or `[N, K / group]`; float16 is kept, others become float32. Groups are a multiple of 32
            channels, or one.
        zero: of the shape of `scale`, in units of codes; None if symmetric.
        bits: 8 or 4.

    Raises:
        ValueError: shapes that do not go together, or groups that are no multiple of 32 channels.
    """
    out_features, in_features = codes.shape[0], codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    scale = scale.view(out_features, -1)
    _check_packable(codes, scale, zero, bits, in_features)
    if scale.dtype != torch.float16 or (zero is not None and zero.dtype != torch.float16):
        scale, zero = scale.float(), None if zero is None else zero.float()
    panels, depth = -(-out_features // PANEL_CHANNELS), -(-in_features // WEIGHT_BLOCK) * WEIGHT_BLOCK
    packed = codes.new_empty((panels, depth * PANEL_CHANNELS * bits // 8), dtype=torch.uint8)
    if bits == 4 and codes.dtype == torch.int8:
        codes = pack_int4(codes, WEIGHT_BLOCK)
    _pack_panels(codes.contiguous(), bits, packed, in_features)
    zero = None if zero is None else _panels_of(zero.view(out_features, -1))
    return Packed(packed, _panels_of(scale), zero, bits, out_features, in_features)


def _check_packable(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, in_features: int
) -> None:
    if bits not in (4, 8) or codes.dtype not in (torch.int8, torch.uint8) or (codes.dtype == torch.uint8) > (bits == 4):
        raise ValueError(f"packed weights have 8 bits, in int8, or 4, in int8 or uint8, not {bits} in {codes.dtype}")
    groups = scale.shape[1]
    if in_features % groups or (groups > 1 and in_features // groups % WEIGHT_BLOCK):
        raise ValueError(
            f"packed weights have groups of a multiple of {WEIGHT_BLOCK} channels, and scale {tuple(scale.shape)} has "
            f"groups of {in_features / groups:g}"
        )
    if zero is not None and zero.numel() != scale.numel():
        raise ValueError(f"weight_zero {tuple(zero.shape)} is not of the shape of weight_scale {tuple(scale.shape)}")


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scale and zero as they are stored: int8 `[N, K]` or uint8 `[N, K / 2]`, and twice `[N, K / group]`."""
    panels = packed.codes.shape[0]
    words = packed.codes.view(torch.int32).view(panels, -1, PANEL_CHANNELS).transpose(1, 2).reshape(-1, 1, 1)
    words = words.view(panels * PANEL_CHANNELS, -1)[: packed.out_features]
    if packed.bits == 4:
        words = torch.stack((words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F), dim=-1).flatten(-2)
    indices = words.contiguous().view(torch.uint8)[:, : packed.in_features]
    if packed.bits == 8:
        codes = (indices ^ 128).view(torch.int8)
    else:
        codes = pack_int4(indices.view(torch.int8) - 8, WEIGHT_BLOCK)
    scale = _rows_of(packed.scale, packed.out_features)
    return codes, scale, None if packed.zero is None else _rows_of(packed.zero, packed.out_features)
