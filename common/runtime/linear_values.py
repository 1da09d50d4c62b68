"""Which values the scales, zero points and codes of a checkpoint may have, found in few passes over each."""

import math

import torch

from ...ops.shared.codes import INT8_MAX, INT8_MIN

_CODES = 256
"""As many codes as a scale may be multiplied with."""
_FLOAT32_MAX = torch.finfo(torch.float32).max
_FLOAT32_INF = 0x7F800000
_NAN_OF_E4M3 = 0x7F
_AT_A_TIME = 2**20
NORMAL_HALF = torch.finfo(torch.float16).smallest_normal


def half_scale(scale: torch.Tensor) -> torch.Tensor:
    """float32 scales of groups as numbers of float16, in which kernels hold them; very small ones as they are."""
    return torch.where(scale >= NORMAL_HALF, scale.to(torch.float16).float(), scale)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a float tensor of any dtype is NaN or Inf; nothing of its size is allocated.

    The sum of all is neither unless one of them is, or it overflows, which only then is told apart.
    """
    tensor = tensor.detach()
    if tensor.dtype == torch.float8_e4m3fn:
        codes = tensor.view(torch.uint8).flatten()
        return not any((part & _NAN_OF_E4M3).amax().item() == _NAN_OF_E4M3 for part in codes.split(_AT_A_TIME))
    return math.isfinite(tensor.sum().item()) or all(map(math.isfinite, ends_of(tensor)))


def ends_of(tensor: torch.Tensor) -> tuple[float, float]:
    """The smallest and largest value, both NaN where one is."""
    low, high = torch.aminmax(tensor.detach())
    return low.item(), high.item()


def are_scales(scales: torch.Tensor) -> bool:
    """Whether scales are positive, and what codes stand for by them finite."""
    low, high = ends_of(scales)
    return low > 0 and high * _CODES <= _FLOAT32_MAX


def are_offsets(offsets: torch.Tensor, codes: tuple[int, int] = (INT8_MIN, INT8_MAX)) -> bool:
    """Whether zero points are whole numbers among the codes."""
    low, high = ends_of(offsets)
    if not codes[0] <= low <= high <= codes[1]:
        return False
    return low == high == 0 or not offsets.is_floating_point() or bool((offsets == offsets.round()).all())


def is_zero(offsets: torch.Tensor) -> bool:
    """Whether zero points are 0 throughout."""
    return ends_of(offsets) == (0, 0)


def are_deq_scales(stored: torch.Tensor) -> bool:
    """Whether what `encode_deq_scale` of `w8a8_linear.py` made are positive finite numbers of float32, and whole."""
    low, high = ends_of(stored)
    return low > 0 and high < (math.inf if stored.is_floating_point() else _FLOAT32_INF)
