"""The codec on the CPU: `codec.c` behind the Python signature of the references."""

import struct

import torch

from ..compile import CKernel
from ..operands import KINDS, broadcast_strides
from .reference import encode_reference, encode_token_reference

CODEC_KERNEL = CKernel("codec", ("ops/vector.h", "ops/codec/codec.c"), ("encode", "encode_token"))
_pack_encode = struct.Struct("24q").pack
_NO_STRIDES = (0, 0, 0, 0)


def _encode_operands(x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as the kernel reads and writes them: a dtype that it loads, the last dimension contiguous."""
    if codes.shape != x.shape or codes.dtype != torch.int8 or x.dim() != 4:
        raise ValueError(f"codes must be int8 {tuple(x.shape)} as x is, not {codes.dtype} {tuple(codes.shape)}")
    if x.dtype not in KINDS or x.dtype == torch.int8:
        x = x.float()
    if x.stride(3) != 1:
        x = x.contiguous()
    return x, codes if codes.stride(3) == 1 else torch.empty_like(codes, memory_format=torch.contiguous_format)


def _row_part(part: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A scale or zero as float32, and its strides broadcast to `shape`; the last is 0 or 1."""
    if part.dtype != torch.float32 or (part.dim() and part.stride(-1) != 1):
        part = part.float().contiguous()
    return part, broadcast_strides(part, shape)


def encode_cpu(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> None:
    """`encode_reference` in C."""
    run = CODEC_KERNEL.load().get("encode")
    if run is None:
        return encode_reference(x, scale, zero, codes, cos, sin, position)
    values, target = _encode_operands(x, codes)
    shape = values.shape
    scale, scale_strides = _row_part(scale, shape)
    zero_strides: tuple[int, ...] = _NO_STRIDES
    if zero is not None:
        zero, zero_strides = _row_part(zero, shape)
    arguments = _pack_encode(
        values.data_ptr(),
        target.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        KINDS[values.dtype],
        *values.shape,
        torch.get_num_threads(),
        *values.stride()[:3],
        *target.stride()[:3],
        *scale_strides,
        *zero_strides,
    )
    run(arguments)
    if target is not codes:
        codes.copy_(target)
    return None


def encode_token_cpu(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> None:
    """`encode_token_reference` in C."""
    run = CODEC_KERNEL.load().get("encode_token")
    if run is None or x.numel() == 0:
        return encode_token_reference(x, codes, scale, zero, cos, sin, position)
    if scale.shape != (*x.shape[:3], 1) or scale.dtype != torch.float32:
        raise ValueError(f"scale must be float32 {(*x.shape[:3], 1)}, not {scale.dtype} {tuple(scale.shape)}")
    values, target = _encode_operands(x, codes)
    arguments = _pack_encode(
        values.data_ptr(),
        target.data_ptr(),
        scale.data_ptr(),
        0,
        KINDS[values.dtype],
        *values.shape,
        torch.get_num_threads(),
        *values.stride()[:3],
        *target.stride()[:3],
        *scale.stride(),
        *_NO_STRIDES,
    )
    run(arguments)
    if target is not codes:
        codes.copy_(target)
    return None
