"""Scales and zero points of groups of a weight by least squared error, in which zero points are any number.

N output channels, G groups of K / G input channels.
"""

from collections.abc import Iterator

import torch

from ....ops.shared.codes import SMALLEST_SCALE
from ...runtime.double_linear import LARGEST_SCALE_CODE, ZERO_STEPS, decoded_scale

_EXTENTS = torch.linspace(1.05, 0.6, 21)
"""Parts of the range of a group that its codes span, of which the fit begins."""
_SAME = 1e-6
"""Part of the codes' second moment below which their variance is none: a group of one value."""


def _fitted(
    grouped: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and least value of the line through codes that is nearest to a weight; `scale` where there is none."""
    total = importance.sum(-1, keepdim=True)
    mean_code = (importance * codes).sum(-1, keepdim=True) / total
    mean = (importance * grouped).sum(-1, keepdim=True) / total
    about = codes - mean_code
    variance = (importance * about.square()).sum(-1, keepdim=True) / total
    slope = (importance * about * grouped).sum(-1, keepdim=True) / (total * variance.clamp_min(_SAME))
    slope = torch.where((variance > _SAME) & (slope > SMALLEST_SCALE), slope, scale)
    return slope, mean - slope * mean_code


def _candidates(grouped: torch.Tensor, importance: torch.Tensor, most: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Scale, least value and squared error `[N, G, 1]` of each start, fitted to the codes that it gives."""
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    low, high = low.clamp_max(0), high.clamp_min(0)
    for extent in _EXTENTS.tolist():
        scale, least = ((high - low) * extent / most).clamp_min(SMALLEST_SCALE), low * extent
        codes = ((grouped - least) / scale).round_().clamp_(0, most)
        scale, least = _fitted(grouped, codes, importance, scale)
        codes = ((grouped - least) / scale).round_().clamp_(0, most)
        error = codes.mul_(scale).add_(least).sub_(grouped).square_()
        yield scale, least, (error * importance).sum(-1, keepdim=True)


def least_squares(
    grouped: torch.Tensor, importance: torch.Tensor, most: int, searches: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and least value `[N, G, 1]`, float32, of `code * scale + least` with codes from 0 to `most`.

    Several parts of the range are tried; from the codes of each follow scale and least value by linear regression, as
    llama.cpp's Q4_K chooses them, and the best are taken.

    Args:
        grouped: weights, float32 `[N, G, K / G]`.
        importance: of the channels, positive, `[G, K / G]`.
        most: the largest code.
        searches: False takes the range of each group as it is.
    """
    if not searches:
        low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
        low, high = low.clamp_max(0), high.clamp_min(0)
        return ((high - low) / most).clamp_min(SMALLEST_SCALE), low
    best: list[torch.Tensor] = []
    for found in _candidates(grouped, importance, most):
        is_better = None if not best else found[2] < best[2]
        best = (
            list(found)
            if is_better is None
            else [torch.where(is_better, *pair) for pair in zip(found, best, strict=True)]
        )
    return best[0], best[1]


def double_parts(scale: torch.Tensor, least: torch.Tensor, lowest: int) -> dict[str, torch.Tensor]:
    """Scales and least values, float32 `[N, G]`, as the parts of a `W4A16DoubleLinear`.

    Args:
        scale, least: see `least_squares`.
        lowest: the code that stands for the least value.
    """
    row_scale = (scale.amax(dim=1, keepdim=True) / LARGEST_SCALE_CODE).clamp_min(SMALLEST_SCALE)
    codes = (scale / row_scale).round_().clamp_(1, LARGEST_SCALE_CODE)
    zero = lowest - least / decoded_scale(codes, row_scale)
    offset = (zero * ZERO_STEPS).round_().clamp_(-128, 127)
    return {"weight_scale": codes.to(torch.uint8), "weight_offset": offset.to(torch.int8), "row_scale": row_scale}
