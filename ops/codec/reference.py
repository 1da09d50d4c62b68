"""The codec op: float values to 8-bit codes, `x = (code - zero) * scale`."""

import torch

INT8_MIN, INT8_MAX = -128, 127
SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""Floor of every scale, as in msmodelslim: a channel that is always zero keeps a usable scale."""


def encode_reference(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, codes: torch.Tensor) -> None:
    """Write the codes of `x` into `codes`: `clamp(round(x / scale + zero), -128, 127)`, halves to even.

    Args:
        x: values of shape `[B, G, S, D]`, any float dtype.
        scale: static scales, float32, broadcastable to `x`: `[G, 1, D]` per channel, `[G, 1, 1]` per head.
        zero: zero points in units of codes, of the shape of `scale`; None for a symmetric codec.
        codes: int8 tensor of the shape of `x`, may be a strided view; overwritten.
    """
    scaled = x.float() / scale
    if zero is not None:
        scaled = scaled + zero
    codes.copy_(scaled.round().clamp(INT8_MIN, INT8_MAX))


def encode_token_reference(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Dynamic symmetric codes per token and head: `scale = max|x| / 127` over the last dimension.

    Args:
        x: values of shape `[B, G, S, D]`, any float dtype.
        codes: int8 tensor of the shape of `x`, may be a strided view; overwritten.
        scale: float32 tensor of shape `[B, G, S, 1]`, may be a strided view; overwritten.
    """
    values = x.float()
    scale.copy_(values.abs().amax(dim=-1, keepdim=True).div(INT8_MAX).clamp_min(SMALLEST_SCALE))
    codes.copy_((values / scale).round().clamp(INT8_MIN, INT8_MAX))
