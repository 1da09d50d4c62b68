"""Attention on the CPU: `attention.c` behind the Python signature of the reference."""

import struct

import torch

from ..compile import CKernel
from ..operands import KINDS, broadcast_strides
from .reference import attention_reference

ATTENTION_KERNEL = CKernel(
    "attention", ("ops/vector.h", "ops/attention/micro.h", "ops/attention/attention.c"), ("attention",)
)
_pack_attention = struct.Struct("54q1d").pack


def attention_cpu_description() -> str:
    """What serves on the CPU, for `ops.report()`."""
    return f"{ATTENTION_KERNEL.description()}; queries in float64 by the reference (PyTorch)"


_NO_PART = (0, 0, 0, 0, 0, 0)
_NO_MASK = (0, 0, 0, 0)


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in an element type that the kernel loads, its last dimension contiguous."""
    if tensor.dtype not in KINDS:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _scale_part(
    part: torch.Tensor | None, shape: tuple[int, int, int, int]
) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """A scale or zero of codes of shape `[B, G, S, D]` as float32, and its address, whether per token, and strides."""
    if part is None:
        return None, _NO_PART
    if part.dtype != torch.float32:
        part = part.float()
    batch, groups, keys, width = shape
    rows, columns = part.shape[-2:]
    if rows == 1:
        return part, (part.data_ptr(), 0, *broadcast_strides(part, (batch, groups, 1, width)))
    if columns != 1:
        raise ValueError(
            f"attention on the CPU takes scales per channel [G, 1, D], per head [G, 1, 1] or per token [B, G, S, 1], "
            f"not both per token and per channel: {tuple(part.shape)}"
        )
    return part, (part.data_ptr(), 1, *broadcast_strides(part, (batch, groups, keys, 1)))


def attention_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor | None,
    key_zero: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    value_zero: torch.Tensor | None,
    query_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    causal: bool,
    length: torch.Tensor | None = None,
    window: int = 0,
    key_group: int = 1,
    value_group: int = 1,
) -> torch.Tensor:
    """`attention_reference` in C; the reference itself for a query in float64.

    Raises:
        ValueError: shapes that do not go together, or a scale both per token and per channel.
        MemoryError: no room for the scratch of the threads.
    """
    run = ATTENTION_KERNEL.load().get("attention")
    if run is None or query.dtype == torch.float64:
        return attention_reference(
            query,
            key,
            value,
            key_scale,
            key_zero,
            value_scale,
            value_zero,
            query_scale,
            mask,
            scaling,
            causal,
            length,
            window,
            key_group,
            value_group,
        )
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != width or heads % groups:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not go together: "
            f"[B, H, Q, D] and twice [B, G, S, D] with H a multiple of G"
        )
    output = torch.empty((batch, queries, heads, width))
    if output.numel() == 0 or keys == 0:
        return output.zero_().to(query.dtype)
    q = query if query.dtype == torch.float32 else query.float()
    q = _last_contiguous(q)
    key, value = _last_contiguous(key), _last_contiguous(value)
    key_scale, key_scale_part = _scale_part(key_scale, key.shape)
    key_zero, key_zero_part = _scale_part(key_zero, key.shape)
    value_scale, value_scale_part = _scale_part(value_scale, key.shape)
    value_zero, value_zero_part = _scale_part(value_zero, key.shape)
    mask_kind, mask_strides = 0, _NO_MASK
    if mask is not None:
        mask_kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if mask.dtype in (torch.bool, torch.float32) else mask.float()
        mask_strides = broadcast_strides(mask, (batch, heads, queries, keys))
    if query_scale is not None:
        query_scale = query_scale.float().expand(heads, 1, 1).contiguous()
    q_strides, key_strides, value_strides = q.stride(), key.stride(), value.stride()
    failed = run(
        _pack_attention(
            q.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            output.data_ptr(),
            0 if query_scale is None else query_scale.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            batch,
            heads,
            queries,
            width,
            groups,
            keys,
            KINDS[key.dtype],
            KINDS[value.dtype],
            mask_kind,
            causal,
            torch.get_num_threads(),
            *q_strides[:3],
            *key_strides[:3],
            *value_strides[:3],
            *mask_strides,
            *key_scale_part,
            *key_zero_part,
            *value_scale_part,
            *value_zero_part,
            scaling,
        )
    )
    if failed:
        raise MemoryError("attention on the CPU found no memory for its scratch")
    return output if query.dtype == torch.float32 else output.to(query.dtype)
