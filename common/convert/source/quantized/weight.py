"""Linears that a checkpoint holds in codes: what is known of one, and its codes.

N output channels, K input channels, G groups of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .....ops.linear.reference import WEIGHT_BLOCK
from .....ops.shared.codes import expand_scale
from ....errors import OctavoError
from ....runtime.schemes.linear_scheme import SMALLEST_GROUP, W4A16, W4A16_ORDERED, W8A16, W8A16_ORDERED
from ...dialects.layouts.fp8_block import block_scales
from ...dialects.layouts.gptq import plain_order

TINY_SCALE = torch.finfo(torch.float32).tiny
"""Stands for a scale of 0, which makes 0 of every code; scales here are positive."""
_INT4_BITS = 4


@dataclass(frozen=True)
class CodedWeight:
    """A weight in codes, `w = (code - zero) * scale`.

    Attributes:
        codes: int8 or float8_e4m3fn `[N, K]`.
        scale: float32 `[N, G]`, `[N, 1]`, `[1, 1]`, or one of each block.
        zero: whole numbers in float32, of the shape of `scale`; None if all are 0.
        order: int64 `[K]`, the group of each input channel; None if groups are consecutive.
        block: rows and columns of a block; None if scales are of rows.
        input_scale, input_zero: float32 `[1]`, of static inputs; None of others.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    order: torch.Tensor | None = None
    block: tuple[int, int] | None = None
    input_scale: torch.Tensor | None = None
    input_zero: torch.Tensor | None = None

    def _spread(self, part: torch.Tensor) -> torch.Tensor:
        """A scale or zero for each weight."""
        shape = self.codes.shape[0], self.codes.shape[1]
        if self.block is not None:
            return block_scales(part, *self.block, shape)
        return expand_scale(part, *shape) if self.order is None else part[:, self.order]

    def decoded(self) -> torch.Tensor:
        """What the codes stand for, float32 `[N, K]`."""
        found = self.codes.float()
        if self.zero is not None:
            found -= self._spread(self.zero)
        return found.mul_(self._spread(self.scale))


Read = Callable[[str], torch.Tensor]
"""Reads a tensor of the checkpoint by its name."""


@dataclass(frozen=True)
class CodedLinear:
    """A linear that a checkpoint holds in codes.

    Attributes:
        label: the kind of linear here that holds the codes as they are; None if none does.
        fault: why none does.
        shape: N and K.
        scales: rows and columns of its scales.
        parts: names of the tensors that it is made of.
        read: gives the weight; it raises an `OctavoError` if the tensors hold what their layout does not.
        symmetric: whether the checkpoint says that there are no zero points.
    """

    label: str | None
    fault: str
    shape: tuple[int, int]
    scales: tuple[int, int]
    parts: tuple[str, ...]
    read: Callable[[Read], CodedWeight]
    symmetric: bool = True

    @property
    def group(self) -> int:
        """Input channels that share a scale; 0 if all do."""
        return self.shape[1] // self.scales[1] if self.scales[1] > 1 else 0


def weight_only_label(
    bits: int, in_features: int, groups: int, order: torch.Tensor | None = None
) -> tuple[str | None, str]:
    """The kind of linear for integer weights and float inputs, or why there is none.

    Args:
        order: the group of each input channel, as of `CodedWeight`.
    """
    if in_features % groups or (groups > 1 and in_features // groups % SMALLEST_GROUP):
        size = f"{in_features / groups:g}"
        return None, f"has groups of {size} of {in_features} input channels, which are no multiple of {SMALLEST_GROUP}"
    if bits <= _INT4_BITS and in_features % WEIGHT_BLOCK:
        return None, f"has {in_features} input channels, and int4 is packed in blocks of {WEIGHT_BLOCK}"
    if order is None:
        return (W4A16 if bits <= _INT4_BITS else W8A16), ""
    if bool((order.bincount(minlength=groups) != in_features // groups).any()):
        return None, "has groups of input channels (g_idx) that are not of one size"
    return (W4A16_ORDERED if bits <= _INT4_BITS else W8A16_ORDERED), ""


def sound_scale(name: str, scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32, those of 0 as the smallest there is.

    Raises:
        OctavoError: one is negative, NaN or Inf.
    """
    found = scale.float()
    if not bool((found >= 0).all()) or not bool(torch.isfinite(found).all()):
        raise OctavoError(f"{name} holds a scale that is negative, NaN or Inf; the checkpoint is damaged")
    return found.clamp_min(TINY_SCALE)


def sound_zero(name: str, zero: torch.Tensor, bits: int) -> torch.Tensor | None:
    """Zeros as float32, None if all are 0.

    Raises:
        OctavoError: one is no code.
    """
    half = 2 ** (bits - 1)
    if not -half <= int(zero.min()) <= int(zero.max()) < half:
        raise OctavoError(
            f"{name} holds a zero point of {int(zero.max()) + half}, which is no code of {bits} bits and stands for "
            "different numbers with different readers; the checkpoint is damaged, or of another version of the layout"
        )
    return zero.float() if bool(zero.any()) else None


def mixed_order(name: str, order: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """`g_idx` as int64 `[K]`; None where groups are consecutive.

    Raises:
        OctavoError: it names a group that there is not.
    """
    if order is None:
        return None
    in_features = order.shape[0]
    if in_features % groups == 0 and torch.equal(order.int(), plain_order(in_features, groups)):
        return None
    if not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise OctavoError(f"{name} names groups beyond the {groups} that there are; the checkpoint is damaged")
    return order.long()
