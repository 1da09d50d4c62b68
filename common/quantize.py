"""From float weights, and what calibration saw of their inputs, to the tensors of quantized linear layers.

R rows of inputs, N output channels, K input channels, G groups of them.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..ops.codes import CODE_RANGES, INT8_MAX, INT8_MIN, SMALLEST_SCALE, dynamic_scale, expand_scale, pack_int4
from ..ops.linear.reference import WEIGHT_BLOCK
from .errors import OctavoError
from .gptq import ErrorFeedback, error_feedback, gptq_codes
from .linear import encode_deq_scale, outlier_count
from .linear_scheme import FP8, FP8_DYNAMIC, STATIC, W4A16, W8A8, W8A8_MIXED, WEIGHT_ONLY, LinearInputs, LinearScheme

OUTLIER_SCORE = 50.0
"""Inputs with larger `max|x| / rms` keep their whole range under "auto", as in msmodelslim."""
LEVELS = INT8_MAX - INT8_MIN
PERCENTILE = 99.99
"""Percent of the inputs that "percentile" covers."""
ROWS = 4096
"""Output channels of a weight that are in float at a time."""
SEARCHED = 2**18
"""Weights whose range is searched together, so that they stay in the caches of a CPU."""
BINS = 2048
JUDGED_ROWS, JUDGED_CHANNELS = 512, 2048
"""Inputs and output channels by which the range of inputs is judged under "mse"."""
_SHARES = torch.linspace(0.05, 1.0, 96)
_COARSE = [10 ** (-step / 10) for step in range(14)]
_FINE = [0.8 + 0.05 * step for step in range(10)]
_CLIPS = torch.linspace(1.0, 0.4, 21)
_FP8_MAX = CODE_RANGES[torch.float8_e4m3fn][1]
_IS_FP8 = (FP8, FP8_DYNAMIC)


def outlier_score(inputs: LinearInputs) -> float:
    """`max|x| / rms` of a linear layer's input: how much its outliers cost everything else."""
    spread = float(inputs.mean_square.mean().sqrt())
    return float(inputs.largest.max()) / spread if spread > 0 else 0.0


def _least_squares_range(low: float, high: float, limit: float, histogram: torch.Tensor) -> tuple[float, float]:
    """The part of `[low, high]` whose int8 codes have the least squared error over the histogram.

    The error of a range is that of rounding, `step^2 / 12` for every value, plus that of clipping the values outside.
    """
    if limit == 0.0:
        return low, high
    width = 2 * limit / len(histogram)
    centers = torch.arange(len(histogram)) * width - limit + width / 2

    def clipping(bounds: torch.Tensor) -> torch.Tensor:
        beyond = (centers * bounds.sign()[:, None] - bounds.abs()[:, None]).clamp_min(0) * (bounds != 0)[:, None]
        return (beyond.square() * histogram).sum(dim=1)

    lows, highs = low * _SHARES, high * _SHARES
    rounding = ((highs[None, :] - lows[:, None]) / LEVELS).square() / 12 * histogram.sum()
    errors = rounding + clipping(lows)[:, None] + clipping(highs)[None, :]
    best = int(errors.argmin())
    return float(lows[best // len(highs)]), float(highs[best % len(highs)])


def _with_extremes(inputs: LinearInputs, rows: torch.Tensor) -> torch.Tensor:
    """Some of the rows, and one row more of the extremes that they lack, 0 where they lack none; `[R + 1, K]`."""
    extremes = torch.where(inputs.high > -inputs.low, inputs.high, inputs.low)
    seen = rows.abs().amax(dim=0) if len(rows) else torch.zeros_like(extremes)
    return torch.cat((rows, torch.where(extremes.abs() > seen, extremes, 0)[None]))


def _histogram(inputs: LinearInputs) -> tuple[float, torch.Tensor]:
    """Limit and counts of `BINS` equal bins over `[-limit, limit]`."""
    limit = float(inputs.largest.max())
    return limit, torch.histc(_with_extremes(inputs, inputs.rows), BINS, -limit, limit).cpu()


def _bounded(low: float, high: float, bound: float) -> tuple[float, float]:
    return max(low, -bound), min(high, bound)


def _percentile_range(inputs: LinearInputs, low: float, high: float) -> tuple[float, float]:
    sizes = inputs.rows.abs().flatten()
    beyond = int(sizes.numel() * (100 - PERCENTILE) / 100)
    return _bounded(low, high, float(sizes.topk(beyond + 1).values[-1])) if sizes.numel() else (low, high)


def _searched_range(
    inputs: LinearInputs, low: float, high: float, label: str, weight: torch.Tensor | None
) -> tuple[float, float]:
    """The best of the ranges up to a bound: least squared error of rows, or of the output of some of the channels."""
    thinned = inputs.thinned(JUDGED_ROWS).rows
    step = len(inputs.rows) / max(1, len(thinned))
    rows = _with_extremes(inputs, thinned)
    if weight is not None:
        weight = weight[:: -(-weight.shape[0] // JUDGED_CHANNELS)].float().to(rows.device)

    def error(bound: float) -> float:
        difference = coded_rows(rows, label, _bounded(low, high, bound)) - rows
        errors = (difference if weight is None else difference @ weight.T).square().sum(dim=1)
        return float(step * errors[:-1].sum() + errors[-1])

    limit = max(-low, high)
    best = min((limit * share for share in _COARSE), key=error)
    best = min((min(limit, best * share) for share in _FINE), key=error)
    return _bounded(low, high, best)


def input_range(
    inputs: LinearInputs, act_method: str, weight: torch.Tensor | None = None, label: str = W8A8
) -> tuple[float, float]:
    """Lowest and highest input of a static linear layer that its codes cover, 0 included.

    Args:
        inputs: what calibration saw.
        act_method: as of `LinearScheme`. "histogram" is the least squared error of int8 or fp8 codes of the inputs;
            "percentile" covers all but 0.01 % of the inputs, on either side up to the same |x|; "mse" is the least
            squared error of the layer's output, over up to 512 evenly chosen rows and 2,048 output channels.
        weight: `[N, K]`, for "mse"; without one, the error is that of the inputs.
        label: "W8A8" or "WFP8AFP8".
    """
    low, high = min(0.0, float(inputs.low.min())), max(0.0, float(inputs.high.max()))
    keeps_all = act_method == "minmax" or (act_method == "auto" and outlier_score(inputs) > OUTLIER_SCORE)
    if keeps_all or low == high:
        return low, high
    if act_method == "percentile":
        return _percentile_range(inputs, low, high)
    if act_method == "mse" or label == FP8:
        return _searched_range(inputs, low, high, label, weight if act_method == "mse" else None)
    return _least_squares_range(low, high, *_histogram(inputs))


def _static_scale(bounds: tuple[float, float], label: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of static inputs, float32 `[1]` each (reference: msmodelslim's W8A8)."""
    low, high = bounds
    if label == FP8:
        return torch.tensor([max(max(-low, high) / _FP8_MAX, SMALLEST_SCALE)]), torch.zeros(1)
    scale = torch.tensor([max((high - low) / LEVELS, SMALLEST_SCALE)])
    return scale, (-low / scale).round() + INT8_MIN


def coded_rows(rows: torch.Tensor, label: str, bounds: tuple[float, float] | None = None) -> torch.Tensor:
    """Inputs as the codes of a label's layers stand for, float32 `[R, K]`; as they are for W8A16 and W4A16.

    Args:
        rows: float32 `[R, K]`; for W8A8_MIXED, without outliers.
        label: one of `LINEAR_LABELS`.
        bounds: range of static inputs.
    """
    if label in WEIGHT_ONLY:
        return rows
    if label in STATIC:
        scale, zero = (part.to(rows.device) for part in _static_scale(bounds, label))
    else:
        scale = dynamic_scale(rows.abs().amax(dim=1, keepdim=True), _FP8_MAX if label in _IS_FP8 else INT8_MAX)
        zero = torch.zeros_like(scale)
    if label in _IS_FP8:
        return _to_fp8(rows / scale) * scale
    return ((rows / scale + zero).round_().clamp_(INT8_MIN, INT8_MAX) - zero) * scale


def _to_fp8(units: torch.Tensor) -> torch.Tensor:
    return units.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).float()


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
            return _to_fp8(units)
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
    if scheme.label in _IS_FP8:
        return WeightCodes(int(-_FP8_MAX), int(_FP8_MAX), _FP8_MAX, torch.float8_e4m3fn)
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
        feeds_back: whether "GPTQ" is done; else its codes are those of the nearest, with the same scales.
    """

    def __init__(
        self, weight: torch.Tensor, inputs: LinearInputs | None, scheme: LinearScheme, feeds_back: bool = True
    ) -> None:
        self.codes = weight_codes(scheme)
        self.groups = scheme.groups(weight.shape[1])
        self.columns = outlier_columns(inputs).to(weight.device) if scheme.label == W8A8_MIXED else None
        self._weight = weight.detach()
        self._searches = scheme.w_method != "MinMax"
        self._importance = torch.ones(weight.shape[1], device=weight.device)
        if inputs is not None:
            self._importance = inputs.mean_square.to(weight.device).clamp_min(SMALLEST_SCALE)
        self._importance = self._importance.view(self.groups, -1)
        self._feedback: ErrorFeedback | None = None
        if feeds_back and scheme.w_method == "GPTQ":
            rows = inputs.rows.to(weight.device)
            self._feedback = error_feedback(rows if self.columns is None else rows.index_fill(1, self.columns, 0))
        self._extent = self._tensor_extent() if scheme.per_tensor else None

    def blocks(self) -> list[slice]:
        """Rows that are done together."""
        return [slice(start, start + ROWS) for start in range(0, self._weight.shape[0], ROWS)]

    def block(self, rows: slice) -> torch.Tensor:
        """Rows of the weight in float32, but for outlier columns, which are 0."""
        block = self._weight[rows].float()
        return block if self.columns is None else block.index_fill(1, self.columns, 0)

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
            grouped = self.block(rows).unflatten(1, (self.groups, -1))
            errors += _clip_errors(self.codes, grouped, self._importance, low, high).sum(dim=(1, 2, 3)).cpu()
        return torch.maximum(-low, high) * _CLIPS[int(errors.argmin())]

    def scale_and_zero(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 `[rows, G]` each."""
        grouped = block.unflatten(1, (self.groups, -1))
        if self._extent is not None:
            high = self._extent.expand(len(block), 1, 1)
            low = -high
        else:
            low, high = _extremes(grouped)
            if self._searches:
                clip = self._best_clip(grouped, low, high)
                low, high = low * clip, high * clip
        scale, zero = self.codes.scale_and_zero(low, high)
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


def outlier_columns(inputs: LinearInputs) -> torch.Tensor:
    """The channels that W8A8_MIXED keeps in float: those with the largest |x|, int64 `[M]`, ascending."""
    count = outlier_count(inputs.largest.numel())
    return inputs.largest.topk(count).indices.sort().values


def _check_inputs(inputs: LinearInputs | None, scheme: LinearScheme) -> None:
    if inputs is None and scheme.needs_inputs:
        raise OctavoError(f"linear layers: {scheme.label} by {scheme.w_method} needs inputs from calibration")


def _weight_parts(weight: torch.Tensor, inputs: LinearInputs | None, scheme: LinearScheme) -> dict[str, torch.Tensor]:
    """`weight` and its scales as on disk, on the CPU."""
    quantizer = WeightQuantizer(weight, inputs, scheme)
    columns, depth = weight.shape
    if scheme.label == W4A16 and depth % WEIGHT_BLOCK:
        raise OctavoError(f"linear layers: W4A16 takes a multiple of {WEIGHT_BLOCK} input channels, not {depth}")
    width = depth // 2 if quantizer.codes.dtype == torch.uint8 else depth
    codes = torch.empty((columns, width), dtype=quantizer.codes.dtype)
    scales, zeros = torch.empty((columns, quantizer.groups)), torch.empty((columns, quantizer.groups))
    for rows in quantizer.blocks():
        found, scales[rows], zeros[rows] = quantizer(quantizer.block(rows))
        codes[rows] = quantizer.codes.stored(found).cpu()
    parts = {"weight": codes, "weight_scale": scales[:1].clone() if scheme.per_tensor else scales}
    if scheme.label not in _IS_FP8:
        parts["weight_offset"] = zeros
    if quantizer.columns is not None:
        parts["outlier_columns"] = quantizer.columns.to(torch.int32)
        parts["outlier_weight"] = weight.detach()[:, quantizer.columns]
    return parts


def _static_parts(
    parts: dict[str, torch.Tensor], bias: torch.Tensor | None, bounds: tuple[float, float], deq_scale_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What W8A8 adds for inputs within `bounds` (reference: msmodelslim's W8A8)."""
    input_scale, input_offset = _static_scale(bounds, W8A8)
    deq_scale = input_scale * parts["weight_scale"].squeeze(1)
    bias = torch.zeros_like(deq_scale) if bias is None else bias.float().cpu()
    sums = torch.cat([codes.sum(dim=1, dtype=torch.float64) for codes in parts["weight"].split(ROWS)])
    quant_bias = (bias.double() / deq_scale - input_offset * sums).round()
    int32 = torch.iinfo(torch.int32)  # out of reach but for a bias on a row of zeros, whose scale is the smallest
    return {
        "input_scale": input_scale,
        "input_offset": input_offset,
        "quant_bias": quant_bias.clamp(int32.min, int32.max).to(torch.int32),
        "deq_scale": encode_deq_scale(deq_scale, deq_scale_dtype),
    }


def quantize_linear(
    linear: nn.Linear,
    inputs: LinearInputs | None,
    scheme: LinearScheme,
    deq_scale_dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear layer of a scheme's label, on the CPU and contiguous.

    Args:
        linear: the float layer; the bias keeps its dtype.
        inputs: what calibration saw; None where `scheme.needs_inputs` does not say that they are needed.
        scheme: how.
        deq_scale_dtype: see `W8A8Linear`.

    Raises:
        OctavoError: inputs are missing, or the layer has no number of channels that the scheme serves.
    """
    _check_inputs(inputs, scheme)
    bias = None if linear.bias is None else linear.bias.detach()
    parts = _weight_parts(linear.weight, inputs, scheme)
    if scheme.is_static:
        bounds = input_range(inputs, scheme.act_method, linear.weight.detach(), scheme.label)
        if scheme.label == W8A8:
            parts |= _static_parts(parts, bias, bounds, deq_scale_dtype)
        else:
            parts["input_scale"] = _static_scale(bounds, scheme.label)[0]
    if bias is not None:
        parts["bias"] = bias
    return {name: tensor.cpu().contiguous() for name, tensor in parts.items()}


def output_error(weight: torch.Tensor, inputs: LinearInputs, scheme: LinearScheme) -> torch.Tensor:
    """Squared error of a quantized layer's output over rows, `||X W^T - Q(X) Q(W)^T||^2`, of no dimension.

    Made for searches: "GPTQ" is taken as "MSE", which is how it scales weights, and the range of static inputs by
    "mse" as that by "histogram".

    Args:
        weight: `[N, K]`, any float dtype.
        inputs: what calibration saw, on the device of the weight.
        scheme: how.
    """
    quantizer = WeightQuantizer(weight, inputs, scheme, feeds_back=False)
    rows, bounds = inputs.rows, None
    if scheme.is_static:
        act_method = "histogram" if scheme.act_method == "mse" else scheme.act_method
        bounds = input_range(inputs, act_method, label=scheme.label)
    if quantizer.columns is not None:
        rows = rows.index_fill(1, quantizer.columns, 0)  # the others are exact on both sides
    coded = coded_rows(rows, scheme.label, bounds)
    total = torch.zeros((), device=weight.device)
    for part in quantizer.blocks():
        block = quantizer.block(part)
        decoded = quantizer.decoded(block)
        if scheme.label in WEIGHT_ONLY:
            difference = rows @ decoded.sub_(block).T
        else:
            difference = torch.addmm(coded @ decoded.T, rows, block.T, alpha=-1)
        total += difference.square().sum()
    return total
