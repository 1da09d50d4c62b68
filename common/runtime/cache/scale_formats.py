"""Dynamic scales and zeros as they are stored: as floats, or in a byte, fp8_e4m3 (NVFP4) or e8m0 (OCP MX); and values
of e2m1.

A scale in e8m0 is 2^(byte - 127), from 2^-126 to 2^127; one in fp8_e4m3 is in units of `Codec.fixed_scale`, or of 1. A
zero in fp8_e4m3 is its distance from the middle of the codes, near which e4m3 is finest.
"""

import math

import torch

from ....ops.shared.codes import CODE_RANGES
from ..schemes.tensor_codec import SHORT_SCALES, Codec

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The positive values of a float of 4 bits, one of them of the sign, two of the exponent and one of the mantissa, and
0. Source: OCP Microscaling Formats (MX) 1.0."""
MOST_E4M3 = CODE_RANGES[torch.float8_e4m3fn][1]
SMALLEST_E4M3 = 2.0**-9
"""The smallest positive value of fp8_e4m3."""
ROUNDING_E4M3 = 2.0**-4
"""By this part of it a value is rounded at most, of those from 2^-6 on."""

_ALL_BUT_ONE = 2**23 - 1
"""Added to a float32 it changes the exponent, unless the float is a power of two."""


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """floor(log2 x) + 127 of positive float32, int32: the bits that say so; 0 of 0 and of what is below 2^-126."""
    return x.view(torch.int32) >> 23 & 255


def shared_exponent(largest: torch.Tensor, most: float) -> torch.Tensor:
    """Rule "ocp": a scale in e8m0 for values up to `largest`, float32, and codes up to `most`; uint8.

    2^(floor(log2 largest) - floor(log2 most)), by which the largest code may be exceeded, and is then what is stored.
    Source: OCP Microscaling Formats (MX) 1.0, section 6.3.
    """
    own = math.frexp(most)[1] - 1
    return (_exponent(largest.contiguous()) - own).clamp(1, 254).to(torch.uint8)


def as_stored(codec: Codec, scale: torch.Tensor) -> torch.Tensor:
    """A float32 scale in the dtype that a codec stores it in: e4m3 saturates, as NVFP4 does; e8m0 is not below it."""
    if codec.scale_dtype == "e8m0":
        return (scale.contiguous().view(torch.int32) + _ALL_BUT_ONE >> 23).clamp(1, 254).to(torch.uint8)
    if codec.scale_dtype != "fp8_e4m3":
        return scale.to(codec.stored_scale_dtype)
    return (scale / (codec.fixed_scale or 1.0)).clamp_max(MOST_E4M3).to(torch.float8_e4m3fn)


def as_floats(codec: Codec, scale: torch.Tensor) -> torch.Tensor:
    """What a stored scale stands for: float32 if the ops do not know its dtype, and else as it is."""
    if codec.scale_dtype not in SHORT_SCALES:
        return scale
    if codec.scale_dtype == "e8m0":
        return (scale.to(torch.int32) << 23).view(torch.float32)
    return scale.float() * (codec.fixed_scale or 1.0)


def zero_as_stored(distance: torch.Tensor) -> torch.Tensor:
    """A zero in fp8_e4m3, of its float32 distance from the middle of the codes: it saturates."""
    return distance.clamp(-MOST_E4M3, MOST_E4M3).to(torch.float8_e4m3fn)


def zero_as_floats(codec: Codec, zero: torch.Tensor) -> torch.Tensor:
    """What a stored zero stands for, as of `as_floats`."""
    return zero if codec.scale_dtype not in SHORT_SCALES else zero.float() + codec.middle


def rounded_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest values of e2m1, of two as near the one whose mantissa is even; beyond 6 it is 6."""
    size = x.abs().clamp_max(E2M1_LEVELS[-1])
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, x)
