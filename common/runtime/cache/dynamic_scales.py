"""Dynamic scales: how scale and zero of a group of values follow from the values, by the rules of `Codec`.

`x = (code - zero) * scale`; groups lie along the last dimension, n values each.
"""

import torch

from ....ops.shared.codes import SMALLEST_SCALE, dynamic_scale, scale_for_zero
from ..schemes.tensor_codec import SHORT_SCALES, Codec
from .scale_formats import (
    E2M1_LEVELS,
    MOST_E4M3,
    ROUNDING_E4M3,
    SMALLEST_E4M3,
    as_floats,
    as_stored,
    shared_exponent,
    zero_as_floats,
    zero_as_stored,
)

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of the range of a group among which rule "mse" chooses."""
STRETCHES = (1.0, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2)
"""Multiples of the standard deviation of a group among which it does with gaussian levels."""
GAUSSIAN_LEVELS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
"""The positive levels that code a standard normal distribution in so many bits with the least squared error (Lloyd,
"Least squares quantization in PCM", 1982; Max, "Quantizing for minimum distortion", 1960); the others are their
negatives."""

ScaleAndZero = tuple[torch.Tensor, torch.Tensor | None]


def gaussian_levels(bits: int, device: torch.device) -> torch.Tensor:
    """All levels of `GAUSSIAN_LEVELS`, float32 `[2**bits]`, ascending."""
    return _both_signs(GAUSSIAN_LEVELS[bits], device)


def _both_signs(positive: tuple[float, ...], device: torch.device) -> torch.Tensor:
    levels = torch.tensor(positive, dtype=torch.float32, device=device)
    return torch.cat((-levels.flip(0), levels))


def known_levels(codec: Codec, device: torch.device) -> torch.Tensor | None:
    """The codebook that a codec has without any calibration, float32 `[2**bits]`, ascending; e2m1 has 0 twice."""
    if codec.levels == "e2m1":
        return _both_signs(E2M1_LEVELS, device)
    return gaussian_levels(codec.bits, device) if codec.levels == "gaussian" else None


def _short(codec: Codec, scale: torch.Tensor, middle: torch.Tensor) -> ScaleAndZero:
    """Scale and zero in fp8_e4m3 that map `middle` to the middle of the codes, of a float32 scale that may be raised.

    It is where the zero would be farther off than codes make up for its rounding, and where e4m3 would have 0; that
    stays the scale of values so small that 0 is as near to them.
    """
    reach = GAUSSIAN_LEVELS[codec.bits][-1] if codec.levels == "gaussian" else (codec.ends[1] - codec.ends[0]) / 2
    smallest = SMALLEST_E4M3 * (codec.fixed_scale or 1.0)
    raised = torch.maximum(scale, middle.abs() / min(MOST_E4M3, reach / ROUNDING_E4M3)).clamp_min(smallest)
    is_nothing = middle.abs() + scale * reach < smallest / 2
    stored = as_stored(codec, raised.masked_fill(is_nothing, 0.0))
    return stored, zero_as_stored(-middle / as_floats(codec, stored).masked_fill(is_nothing, torch.inf))


def _affine(codec: Codec, low: torch.Tensor, high: torch.Tensor) -> ScaleAndZero:
    """Scale and zero that map `low` and `high` to the ends of the codes, the zero by the scale as it is stored."""
    first, last = codec.ends
    if codec.scale_dtype in SHORT_SCALES:
        return _short(codec, dynamic_scale(high - low, last - first), (low + high) / 2)
    dtype, farthest = codec.stored_scale_dtype, torch.maximum(low.abs(), high.abs())
    scale = scale_for_zero(dynamic_scale(high - low, last - first), farthest, dtype).to(dtype)
    return scale, (first - low / scale.float()).to(dtype)


def _ranged(codec: Codec, groups: torch.Tensor) -> ScaleAndZero:
    """Rule "range": the ends of the codes are the ends of the values, or symmetric about 0, as of "full_range"; clipped
    where the codec says so."""
    if codec.has_zero:
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        out = (high - low) * (1 - codec.clip) / 2 if codec.clip != 1 else 0.0
        return _affine(codec, low + out, high - out)
    largest = groups.abs().amax(dim=-1)
    if codec.rule == "ocp":
        return shared_exponent(largest, codec.most), None
    return as_stored(codec, dynamic_scale(largest * codec.clip, codec.most)), None


def _coded(codec: Codec, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """The values that the codes of `groups` stand for."""
    step = as_floats(codec, scale).float()[..., None]
    offset = 0.0 if zero is None else zero_as_floats(codec, zero).float()[..., None]
    scaled = groups / step.masked_fill(step == 0, torch.inf) + offset
    levels = known_levels(codec, groups.device)
    if levels is None:
        return (scaled.round().clamp(*codec.ends) - offset) * step
    return (levels[torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)] - offset) * step


def _tried(codec: Codec, groups: torch.Tensor) -> list[ScaleAndZero]:
    """What rule "mse" chooses among."""
    if codec.levels == "gaussian":
        return [_normal(codec, groups, part) for part in STRETCHES]
    if codec.has_zero:
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        middle, half = (high + low) / 2, (high - low) / 2
        is_short = codec.scale_dtype in SHORT_SCALES  # then zeros on either side of the nearest are tried as well
        middles = [middle * (1 + part) for part in ((0.0, -ROUNDING_E4M3, ROUNDING_E4M3) if is_short else (0.0,))]
        return [_affine(codec, at - part * half, at + part * half) for part in SHRINKS for at in middles]
    scale, _ = _ranged(codec, groups)
    scale = as_floats(codec, scale).float()
    return [(as_stored(codec, (scale * part).clamp_min(SMALLEST_SCALE)), None) for part in SHRINKS]


def _least_error(codec: Codec, groups: torch.Tensor) -> ScaleAndZero:
    """Rule "mse": what loses least of `_tried`."""
    tried = _tried(codec, groups)
    best_scale, best_zero = tried[0]
    best = torch.full(best_scale.shape, float("inf"), device=groups.device)
    for scale, zero in tried:
        error = (_coded(codec, groups, scale, zero) - groups).square().sum(dim=-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = None if zero is None else torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _normal(codec: Codec, groups: torch.Tensor, stretch: float = 1.0) -> ScaleAndZero:
    """Levels "gaussian": mean and standard deviation, or a multiple of that, become 0 and 1."""
    mean = groups.mean(dim=-1) if codec.has_zero else torch.zeros_like(groups[..., 0])
    spread = (groups - mean[..., None]).square().mean(dim=-1).sqrt() * stretch
    if codec.has_zero and codec.scale_dtype in SHORT_SCALES:
        return _short(codec, spread, mean)
    dtype = codec.stored_scale_dtype
    scale = as_stored(codec, scale_for_zero(spread.clamp_min(SMALLEST_SCALE), mean.abs(), dtype))
    return scale, (-mean / scale.float()).to(dtype) if codec.has_zero else None


def scale_of_norm(codec: Codec, groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rule "norm": the scale by which codes that were chosen by `scale` `[...]` have the norm of the values.

    Source: norm correction of vLLM's TurboQuant, which renormalizes what it decodes.
    """
    coded = _coded(codec, groups, scale, None)
    norm = coded.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)  # 0 where a scale in e4m3 is
    return as_stored(codec, as_floats(codec, scale).float() * groups.norm(dim=-1) / norm)


def group_scale(codec: Codec, groups: torch.Tensor) -> ScaleAndZero:
    """Scale and zero of each group of float32 values `[..., n]`, `[...]` each, in the dtype they are stored in.

    Of rule "norm" it is the scale that codes are chosen by; `scale_of_norm` has the one that is stored.
    """
    if codec.rule == "mse":
        return _least_error(codec, groups)
    return _normal(codec, groups) if codec.levels == "gaussian" else _ranged(codec, groups)


def residual_scale(codec: Codec, left: torch.Tensor) -> torch.Tensor:
    """The second scale of groups `[..., n]` of what codes leave: the root of the mean square.

    Source: LMDeploy, quant_policy 42, which stores it in units of the norm of the token.
    """
    return as_stored(codec, left.square().mean(dim=-1).sqrt().clamp_min(SMALLEST_SCALE))


def llamacpp_codes(groups: torch.Tensor, bits: int, has_zero: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks of ggml's Q8_0 (8 bits), Q4_0 (4 bits) or Q4_1 (4 bits, `has_zero`).

    Codes follow from the unrounded scale, and halves are rounded away from zero (Q8_0) or up (Q4_0, Q4_1), unlike in
    the other rules. In Q4_0 the value farthest from 0 becomes -8, so that a scale may be negative.

    Source: ggml-quants.c, quantize_row_q8_0_ref, quantize_row_q4_0_ref, quantize_row_q4_1_ref.

    Args:
        groups: float32 `[..., 32]`.

    Returns:
        codes, float32 `[..., 32]`, as this project counts them; scale `d` and, where `has_zero`, the minimum `m`, else
        0, float16 `[...]`: x = d * code, or d * (code + 8) + m.
    """
    if has_zero:
        minimum = groups.amin(dim=-1)
        extent, span = groups.amax(dim=-1) - minimum, 15
    else:
        farthest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))[..., 0]
        minimum = torch.zeros_like(farthest)
        extent, span = (farthest.abs(), 127) if bits == 8 else (farthest, -8)
    scale = extent / extent.new_full((), span)  # of a number that is no tensor, GPUs take the reciprocal
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)[..., None]
    scaled = (groups - minimum[..., None]) * inverse
    if bits == 8:
        magnitude = scaled.abs()
        codes = torch.sign(scaled) * (magnitude.floor() + (magnitude - magnitude.floor() >= 0.5))
    else:
        codes = (scaled + (0.5 if has_zero else 8.5)).trunc().clamp(0, 15) - 8
    return codes, scale.half(), minimum.half()
