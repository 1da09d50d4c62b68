"""Scales and codes of the weights of linear layers.

N output channels, K input channels, G groups of them.
"""

from dataclasses import dataclass

import torch

from ....ops.linear.reference import WEIGHT_BLOCK
from ....ops.shared.codes import INT8_MAX, INT8_MIN, SMALLEST_SCALE, expand_scale, pack_int4
from ...runtime.schemes.linear_scheme import FP8_LABELS, W4A16, W8A8_MIXED, LinearInputs, LinearScheme
from ...runtime.w8a8_linear import outlier_count
from .gptq import ErrorFeedback, error_feedback, gptq_codes
from .input_range import FP8_MAX, to_fp8

ROWS = 4096
"""Output channels of a weight that are in float at a time."""
SEARCHED = 2**18
"""Weights whose range is searched together, so that they stay in the caches of a CPU."""
NORMAL_HALF = torch.finfo(torch.float16).smallest_normal
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
    lowest, highest, dtype = (-8, 7, torch.uint8) if scheme.label == W4A16 else (INT8_MIN, INT8_MAX, torch.int8)
    if not scheme.symmetric:
        return WeightCodes(lowest, highest, highest - lowest, dtype, symmetric=False)
    return WeightCodes(lowest if scheme.label == W4A16 else -highest, highest, highest, dtype)


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

    def scale_and_zero(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 `[rows, G]` each."""
        grouped = block.unflatten(1, (self.num_groups, -1))
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
        return scale.squeeze(-1), zero.squeeze(-1)

    def __call__(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes `[rows, K]`, scale and zero `[rows, G]` of a block, float32."""
        scale, zero = self.scale_and_zero(block)
        if self._feedback is not None:
            return gptq_codes(block, self._feedback, scale, zero, self.codes.rounded), scale, zero
        units = block / expand_scale(scale, *block.shape) + expand_scale(zero, *block.shape)
        return self.codes.rounded(units), scale, zero

    def decoded(self, block: torch.Tensor) -> torch.Tensor:
        """What the codes of a block stand for, `[rows, K]`."""
        codes, scale, zero = self(block)
        return (codes - expand_scale(zero, *block.shape)).mul_(expand_scale(scale, *block.shape))


def half_scale(scale: torch.Tensor) -> torch.Tensor:
    """float32 scales of groups as numbers of float16, in which kernels hold them; very small ones as they are."""
    return torch.where(scale >= NORMAL_HALF, scale.to(torch.float16).float(), scale)


def outlier_columns(inputs: LinearInputs) -> torch.Tensor:
    """The channels that W8A8_MIXED keeps in float: those with the largest |x|, int64 `[M]`, ascending."""
    count = outlier_count(inputs.largest.numel())
    return inputs.largest.topk(count).indices.sort().values
