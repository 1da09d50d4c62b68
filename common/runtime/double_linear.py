"""Linear layers of weights in int4 whose scales and zero points are in 8 bits.

N output channels, K input channels, G groups of them.
"""

from collections.abc import Iterator
from typing import Any

import torch

from .linear_values import are_offsets, are_scales, half_scale
from .schemes.linear_scheme import W4A16_DOUBLE
from .weight_only_linear import W4A16Linear

ZERO_STEPS = 16
"""Zero points are whole numbers of so many parts of a code."""
LARGEST_SCALE_CODE = 255


def decoded_scale(codes: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """Codes `[N, G]` times scales of rows `[N, 1]`, float32; numbers of float16 but for very small ones."""
    return half_scale(codes.float() * row_scale.float())


class W4A16DoubleLinear(W4A16Linear):
    """`(code - weight_offset / 16) * (weight_scale * row_scale)`, the scale in brackets rounded to float16; in groups.

    `weight_scale` is uint8 `[N, G]` from 1 on, `weight_offset` int8 `[N, G]`, `row_scale` float32 `[N, 1]`: in groups
    of 32, a weight takes 4.5 bits and 32 / K. Kernels are given scales and zero points in float, decoded once.
    """

    LABEL = W4A16_DOUBLE
    PARTS = ("weight_scale", "weight_offset", "row_scale")

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, num_groups: int = 1, is_packed: bool = True
    ) -> None:
        super().__init__(in_features, out_features, has_bias, num_groups, is_packed)
        self._hold("weight_scale", (out_features, num_groups), torch.uint8)
        self._hold("weight_offset", (out_features, num_groups), torch.int8)
        self._hold("row_scale", (out_features, 1))
        self._decoded: tuple[torch.Tensor, torch.Tensor] | None = None

    def _forget(self) -> None:
        super()._forget()
        self._decoded = None

    def _floats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales, and zero points in units of codes, float32 `[N, G]` each, where the codes are; kept once made."""
        found, codes = self._decoded, self.weight_scale
        if found is None or found[0].device != codes.device:
            found = decoded_scale(codes, self.row_scale), self.weight_offset.float() / ZERO_STEPS
            if not (torch.compiler.is_compiling() or codes.is_meta):
                self._decoded = found
        return found

    def _scale(self) -> torch.Tensor:
        return self._floats()[0]

    def _zero(self) -> torch.Tensor:
        return self._floats()[1]

    def _hold_panels(self, *parts: Any) -> None:
        super()._hold_panels(*parts)
        self._decoded = None  # the panels hold the same

    def _unpacked(self) -> dict[str, torch.Tensor]:
        """As of any packed weight: codes of scales are those that their floats were made of."""
        found = super()._unpacked()
        scale = (found["weight_scale"].float() / self.row_scale).round().to(torch.uint8)
        offset = (found["weight_offset"].float() * ZERO_STEPS).round().to(torch.int8)
        return found | {"weight_scale": scale, "weight_offset": offset}

    def _unsound(self) -> Iterator[tuple[str, str]]:
        if self.weight.dtype == torch.int8 and not are_offsets(self.weight, self.CODES):
            yield "weight", f"holds codes beyond {self.CODES[0]} and {self.CODES[1]}, those of int4"
        if not are_scales(self.weight_scale):
            yield "weight_scale", "holds codes of 0, which no scale has"
        if not are_scales(self.row_scale * LARGEST_SCALE_CODE):
            yield "row_scale", "is no positive number throughout"
        elif not torch.isfinite(decoded_scale(self.weight_scale, self.row_scale)).all():
            yield "row_scale", "is beyond what float16 holds"
