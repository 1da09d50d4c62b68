"""The range of the inputs of a static linear layer, by what calibration saw of them, and inputs as codes.

R rows of inputs, N output channels, K input channels.
"""

import torch

from ....ops.shared.codes import CODE_RANGES, INT8_MAX, INT8_MIN, SMALLEST_SCALE, dynamic_scale
from ...runtime.schemes.linear_scheme import FP8, FP8_LABELS, STATIC, W8A8, WEIGHT_ONLY, LinearInputs

OUTLIER_SCORE = 50.0
"""Inputs with larger `max|x| / rms` keep their whole range under "auto", as in msmodelslim."""
LEVELS = INT8_MAX - INT8_MIN
PERCENTILE = 99.99
"""Percent of the inputs that "percentile" covers."""
BINS = 2048
JUDGED_ROWS, JUDGED_CHANNELS = 512, 2048
"""Inputs and output channels by which the range of inputs is judged under "mse"."""
FP8_MAX = CODE_RANGES[torch.float8_e4m3fn][1]
_SHARES = torch.linspace(0.05, 1.0, 96)
_COARSE = [10 ** (-step / 10) for step in range(14)]
_FINE = [0.8 + 0.05 * step for step in range(10)]


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
    bin_width = 2 * limit / len(histogram)
    centers = torch.arange(len(histogram)) * bin_width - limit + bin_width / 2

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


def static_input_scale(
    bounds: tuple[float, float], label: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of static inputs, float32 `[1]` each (reference: msmodelslim's W8A8).

    Args:
        bounds: lowest and highest value that codes cover.
        label: "W8A8" or "WFP8AFP8".
        dtype: that the scale of W8A8 is a number of, the next larger one.
    """
    low, high = bounds
    if label == FP8:
        return torch.tensor([max(max(-low, high) / FP8_MAX, SMALLEST_SCALE)]), torch.zeros(1)
    scale = torch.tensor([max((high - low) / LEVELS, SMALLEST_SCALE)])
    near = scale.to(dtype)
    scale = (near if near.float() >= scale else near.nextafter(torch.full_like(near, torch.inf))).float()
    return scale, (-low / scale).round() + INT8_MIN


def coded_rows(
    rows: torch.Tensor, label: str, bounds: tuple[float, float] | None = None, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Inputs as the codes of a label's layers stand for, float32 `[R, K]`; as they are for W8A16 and W4A16.

    Args:
        rows: float32 `[R, K]`; for W8A8_MIXED, without outliers.
        label: one of `LINEAR_LABELS`.
        bounds: range of static inputs.
        dtype: that their scale is a number of; see `static_input_scale`.
    """
    if label in WEIGHT_ONLY:
        return rows
    if label in STATIC:
        scale, zero = (part.to(rows.device) for part in static_input_scale(bounds, label, dtype))
    else:
        scale = dynamic_scale(rows.abs().amax(dim=1, keepdim=True), FP8_MAX if label in FP8_LABELS else INT8_MAX)
        zero = torch.zeros_like(scale)
    if label in FP8_LABELS:
        return to_fp8(rows / scale) * scale
    return ((rows / scale + zero).round_().clamp_(INT8_MIN, INT8_MAX) - zero) * scale


def to_fp8(units: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of e4m3, float32; the largest of either sign for what is beyond."""
    return units.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
