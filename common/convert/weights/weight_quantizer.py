"""Scales and codes of the weights of linear layers.

N output channels, K input channels, G groups of them.
"""

from dataclasses import dataclass

import torch

from ....ops.linear.reference import WEIGHT_BLOCK
from ....ops.shared.codes import INT8_MAX, INT8_MIN, SMALLEST_SCALE, expand_scale, pack_int4
from ...runtime.double_linear import ZERO_STEPS, decoded_scale
from ...runtime.linear_values import half_scale
from ...runtime.schemes.linear_scheme import (
    FP8_LABELS,
    INT4_LABELS,
    W4A16_DOUBLE,
    W8A8_MIXED,
    LinearInputs,
    LinearScheme,
)
from ...runtime.w8a8_linear import outlier_count
from .gptq import ErrorFeedback, error_feedback, gptq_codes
from .input_range import FP8_MAX, to_fp8
from .scale_search import double_parts, least_squares

ROWS = 4096
"""Output channels of a weight that are in float at a time."""
SEARCHED = 2**18
"""Weights whose range is searched together, so that they stay in the caches of a CPU."""
_CLIPS = torch.linspace(1.0, 0.4, 21)


@dataclass(frozen=True)
class WeightCodes:
    """The codes of a kind of weight.

    Attributes:
        lowest, highest: of the codes.
        span: units of codes from 0 to the largest |w| of a symmetric weight, or from the lowest to the highest w.
        dtype: of the tensor that holds them, uint8 as int4.
        symmetric: whether the zero point is 0.
    """

    lowest: int
    highest: int
    span: float
    dtype: torch.dtype
    symmetric: bool = True

    def rounded(self, units: torch.Tensor) -> torch.Tensor:
        """Values in units of codes as codes, in float32."""
        if self.dtype == torch.float8_e4m3fn:
            return to_fp8(units)
        return units.round().clamp_(self.lowest, self.highest)

    def scale_and_zero(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of weights from `low` to `high`, where low <= 0 <= high, of any shape."""
        if self.symmetric:
            scale = (torch.maximum(-low, high) / self.span).clamp_min(SMALLEST_SCALE)
            return scale, torch.zeros_like(scale)
        scale = ((high - low) / self.span).clamp_min(SMALLEST_SCALE)
        return scale, self.lowest - (low / scale).round()

    def through(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """What the nearest codes stand for."""
        return (self.rounded(weight / scale + zero) - zero) * scale

    def stored(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `[N, K]` in float32 as the tensor on disk."""
        return pack_int4(codes.to(torch.int8), WEIGHT_BLOCK) if self.dtype == torch.uint8 else codes.to(self.dtype)


def weight_codes(scheme: LinearScheme) -> WeightCodes:
    """The codes of a scheme's weights: int8 from -127 where symmetric, int4 from -8 with scales of `max|w| / 7`."""
    if scheme.label in FP8_LABELS:
        return WeightCodes(int(-FP8_MAX), int(FP8_MAX), FP8_MAX, torch.float8_e4m3fn)
    lowest, highest, dtype = (-8, 7, torch.uint8) if scheme.label in INT4_LABELS else (INT8_MIN, INT8_MAX, torch.int8)
    if not scheme.symmetric:
        return WeightCodes(lowest, highest, highest - lowest, dtype, symmetric=False)
    return WeightCodes(lowest if scheme.label in INT4_LABELS else -highest, highest, highest, dtype)


def _extremes(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest of weights `[N, G, K / G]` with 0 among them, `[N, G, 1]`."""
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    return low.clamp_max(0), high.clamp_min(0)


def _clip_errors(
    codes: WeightCodes, grouped: torch.Tensor, importance: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """Squared error of each group, times the importance of its channels `[G, K / G]`, per clip; `[clips, N, G, 1]`."""

    def error(part: torch.Tensor, low: torch.Tensor, high: torch.Tensor, clip: float) -> torch.Tensor:
        difference = codes.through(part, *codes.scale_and_zero(low * clip, high * clip)).sub_(part)
        return torch.einsum("ngk,gk->ng", difference.square_(), importance)[..., None]

    rows = max(1, SEARCHED // importance.numel())
    ends = (bound.expand(len(grouped), -1, -1).split(rows) for bound in (low, high))
    parts = zip(grouped.split(rows), *ends, strict=True)
    return torch.cat([torch.stack([error(*part, clip) for clip in _CLIPS.tolist()]) for part in parts], dim=1)


class WeightQuantizer:
    """Scales and codes of one weight, in blocks of its rows, by a scheme.

    Args:
        weight: `[N, K]`, any float dtype, on any device.
        inputs: of the layer; None if not known.
        scheme: how.
    """

    def __init__(self, weight: torch.Tensor, inputs: LinearInputs | None, scheme: LinearScheme) -> None:
        self.codes = weight_codes(scheme)
        self.num_groups = scheme.num_groups(weight.shape[1])
        self.outliers = outlier_columns(inputs).to(weight.device) if scheme.label == W8A8_MIXED else None
        self._weight = weight.detach()
        self._searches = scheme.w_method != "MinMax"
        self._is_double = scheme.label == W4A16_DOUBLE
        self._importance = torch.ones(weight.shape[1], device=weight.device)
        if inputs is not None:
            self._importance = inputs.mean_square.to(weight.device).clamp_min(SMALLEST_SCALE)
        self._importance = self._importance.view(self.num_groups, -1)
        self._feedback: ErrorFeedback | None = None
        if scheme.w_method == "GPTQ":
            hessian = inputs.hessian.to(weight.device)
            if self.outliers is not None:
                hessian = hessian.index_fill(0, self.outliers, 0).index_fill_(1, self.outliers, 0)
            self._feedback = error_feedback(hessian)
        self._extent = self._tensor_extent() if scheme.per_tensor else None

    def blocks(self) -> list[slice]:
        """Rows that are done together."""
        return [slice(start, start + ROWS) for start in range(0, self._weight.shape[0], ROWS)]

    def block(self, rows: slice) -> torch.Tensor:
        """Rows of the weight in float32, but for outlier columns, which are 0."""
        block = self._weight[rows].float()
        return block if self.outliers is None else block.index_fill(1, self.outliers, 0)

    def _best_clip(self, grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        clips = _CLIPS.to(grouped.device)
        return clips[_clip_errors(self.codes, grouped, self._importance, low, high).argmin(dim=0)]

    def _tensor_extent(self) -> torch.Tensor:
        """The largest |w| that one scale for all covers, `[1, 1, 1]`."""
        bounds = [torch.aminmax(self._weight[rows]) for rows in self.blocks()]
        low = torch.stack([bound.min for bound in bounds]).min().float().clamp_max(0).view(1, 1, 1)
        high = torch.stack([bound.max for bound in bounds]).max().float().clamp_min(0).view(1, 1, 1)
        if not self._searches:
            return torch.maximum(-low, high)
        errors = torch.zeros(len(_CLIPS))
        for rows in self.blocks():
            grouped = self.block(rows).unflatten(1, (self.num_groups, -1))
            errors += _clip_errors(self.codes, grouped, self._importance, low, high).sum(dim=(1, 2, 3)).cpu()
        return torch.maximum(-low, high) * _CLIPS[int(errors.argmin())]

    def _double_parts(self, grouped: torch.Tensor) -> dict[str, torch.Tensor]:
        """What W4A16_DOUBLE stores of a block `[rows, G, K / G]` beside codes."""
        span, rows = int(self.codes.span), max(1, SEARCHED // self._importance.numel())
        found = [least_squares(part, self._importance, span, self._searches) for part in grouped.split(rows)]
        scale, least = (torch.cat(parts).squeeze(-1) for parts in zip(*found, strict=True))
        return double_parts(scale, least, self.codes.lowest)

    def scales(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Scale and zero of a block, float32 `[rows, G]` each, and the parts of a layer that they are stored as."""
        grouped = block.unflatten(1, (self.num_groups, -1))
        if self._is_double:
            parts = self._double_parts(grouped)
            return decoded_scale(parts["weight_scale"], parts["row_scale"]), parts["weight_offset"] / ZERO_STEPS, parts
        if self._extent is not None:
            high = self._extent.expand(len(block), 1, 1)
            low = -high
        else:
            low, high = _extremes(grouped)
            if self._searches:
                clip = self._best_clip(grouped, low, high)
                low, high = low * clip, high * clip
        scale, zero = self.codes.scale_and_zero(low, high)
        if self.num_groups > 1:
            scale = half_scale(scale)
        scale, zero = scale.squeeze(-1), zero.squeeze(-1)
        return scale, zero, {"weight_scale": scale, "weight_offset": zero}

    def __call__(self, block: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Codes `[rows, K]` of a block, float32, and its scales and zeros as they are stored."""
        codes, *_, parts = self._coded(block)
        return codes, parts

    def _coded(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Codes of a block, and what `scales` gives."""
        scale, zero, parts = self.scales(block)
        if self._feedback is not None:
            return gptq_codes(block, self._feedback, scale, zero, self.codes.rounded), scale, zero, parts
        units = block / expand_scale(scale, *block.shape) + expand_scale(zero, *block.shape)
        return self.codes.rounded(units), scale, zero, parts

    def decoded(self, block: torch.Tensor) -> torch.Tensor:
        """What the codes of a block stand for, `[rows, K]`."""
        codes, scale, zero, _ = self._coded(block)
        return (codes - expand_scale(zero, *block.shape)).mul_(expand_scale(scale, *block.shape))


def outlier_columns(inputs: LinearInputs) -> torch.Tensor:
    """The channels that W8A8_MIXED keeps in float: those with the largest |x|, int64 `[M]`, ascending."""
    count = outlier_count(inputs.largest.numel())
    return inputs.largest.topk(count).indices.sort().values
