"""From statistics and float weights to W8A8 tensors."""

import torch
from torch import nn

from ..ops.codes import INT8_MAX, INT8_MIN, SMALLEST_SCALE
from .linear import encode_deq_scale
from .statistics import Statistics

MIN_MAX, HISTOGRAM, AUTOMATIC = 1, 2, 3
"""The values of `--act_method`."""
OUTLIER_SCORE = 50.0
"""Inputs with larger `max|x| / rms` keep their whole range under the automatic method, as in msmodelslim."""
LEVELS = INT8_MAX - INT8_MIN
_SHARES = torch.linspace(0.05, 1.0, 96)


def outlier_score(statistics: Statistics, name: str) -> float:
    """`max|x| / rms` of a linear layer's input: how much its outliers cost everything else."""
    low, high, spread, _ = statistics.tensors[f"linears.{name}.range"].tolist()
    return max(-low, high) / spread if spread > 0 else 0.0


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


def input_range(statistics: Statistics, name: str, act_method: int) -> tuple[float, float]:
    """Lowest and highest input of a linear layer that its codes cover, 0 included.

    Args:
        act_method: 1 all that was seen; 2 the range of least squared error over the histogram; 3 the latter, except
            where outliers are so large that clipping them would cost more than the histogram tells.
    """
    low, high, _, limit = statistics.tensors[f"linears.{name}.range"].tolist()
    keeps_all = act_method == MIN_MAX or (act_method == AUTOMATIC and outlier_score(statistics, name) > OUTLIER_SCORE)
    if keeps_all:
        return low, high
    return _least_squares_range(low, high, limit, statistics.tensors[f"linears.{name}.histogram"])


def quantize_weight(linear: nn.Linear) -> dict[str, torch.Tensor]:
    """The tensors of `W8A8DynamicLinear` for a float linear layer: weights symmetric per output channel."""
    weight = linear.weight.detach().float()
    weight_scale = (weight.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp_min(SMALLEST_SCALE)
    codes = (weight / weight_scale).round().clamp(-INT8_MAX, INT8_MAX)
    tensors = {
        "weight": codes.to(torch.int8),
        "weight_scale": weight_scale,
        "weight_offset": torch.zeros_like(weight_scale),
    }
    if linear.bias is not None:
        tensors["bias"] = linear.bias.detach()
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def quantize_linear(
    linear: nn.Linear, low: float, high: float, deq_scale_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of `W8A8Linear` for a float linear layer whose inputs lie in `[low, high]`, which holds 0.

    Weights are symmetric per output channel, inputs affine per tensor (reference: msmodelslim's W8A8).
    """
    tensors = quantize_weight(linear)
    input_scale = torch.tensor([max((high - low) / LEVELS, SMALLEST_SCALE)])
    input_offset = (-low / input_scale).round() + INT8_MIN
    deq_scale = input_scale * tensors["weight_scale"].squeeze(1)
    bias = torch.zeros_like(deq_scale) if linear.bias is None else tensors["bias"].float()
    sums = tensors["weight"].sum(dim=1, dtype=torch.float64)
    quant_bias = (bias.double() / deq_scale - input_offset * sums).round()
    int32 = torch.iinfo(torch.int32)  # out of reach but for a bias on a row of zeros, whose scale is the smallest
    return tensors | {
        "input_scale": input_scale,
        "input_offset": input_offset,
        "quant_bias": quant_bias.clamp(int32.min, int32.max).to(torch.int32),
        "deq_scale": encode_deq_scale(deq_scale, deq_scale_dtype).contiguous(),
    }
