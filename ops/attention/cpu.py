"""Attention on the CPU: `attention.c` behind the Python signature of the reference."""

import struct
from typing import Any

import torch

from ..shared.codes import FP8_DTYPES
from ..shared.compile import CKernel
from ..shared.operands import KINDS, broadcast_strides, part_strides
from .arguments import check_attention, check_operands, check_query_scale, has_position_scores
from .reference import attention_lse_reference, attention_reference, quantized_query

ATTENTION_KERNEL = CKernel(
    "attention",
    ("ops/shared/vector.h", "ops/attention/micro.h", "ops/attention/integer.h", "ops/attention/attention.c"),
    ("attention",),
)
_pack_attention = struct.Struct("84q1d").pack


def attention_cpu_description() -> str:
    """What serves on the CPU, for `ops.report()`."""
    return (
        f"{ATTENTION_KERNEL.description()}; queries in float64 by the reference (PyTorch); codes of 2 and 3 bits, "
        "codebooks and outliers are decoded in blocks first"
    )


_NO_PART = (0,) * 9
_NO_MASK = (0, 0, 0, 0)
_NO_POSITIONS = (0,) * 10
_PART_KINDS = {torch.float32: KINDS[torch.float32], torch.float16: KINDS[torch.float16]}


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in an element type that the kernel loads, its last dimension contiguous."""
    if tensor.dtype not in KINDS:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _packed_part(
    name: str, part: torch.Tensor | None, shape: tuple[int, int, int, int], group: int
) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """A scale or zero of codes of a shape `[B, G, S, D]` as the kernel reads it, and its fields there."""
    if part is None:
        return None, _NO_PART
    rows, columns, strides = part_strides(name, part, shape, group)
    if part.dtype not in _PART_KINDS:
        part = part.float()
        strides = part_strides(name, part, shape, group)[2]
    return part, (part.data_ptr(), _PART_KINDS[part.dtype], rows != 1, group, shape[3] // columns, *strides)


def _packed_positions(
    query: torch.Tensor,
    position_query: torch.Tensor | None,
    position_table: torch.Tensor | None,
    position_start: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, tuple[int, ...]]:
    """The arguments of scores by position as the kernel reads them, and their fields there."""
    if not has_position_scores(query, position_query, position_table, position_start):
        return None, None, None, _NO_POSITIONS
    rows, table = _last_contiguous(position_query.float()), _last_contiguous(position_table.float())
    start = position_start.long()
    fields = (rows.data_ptr(), table.data_ptr(), start.data_ptr(), table.shape[1], table.shape[0], table.stride(0))
    return rows, table, start, (*fields, start.stride(0) if start.numel() > 1 else 0, *rows.stride()[:3])


def _attend(
    wants_lse: bool,
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
    position_query: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
    position_start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_lse_reference` in C; the log-sum-exp only if it is wanted.

    Raises:
        ValueError: shapes that do not go together.
        MemoryError: no room for the scratch of the threads.
    """
    shape = batch, groups, keys, width = check_operands(query, key, value, mask, length, window, key_group, value_group)
    heads, queries = query.shape[1:3]
    position_query, position_table, position_start, position_fields = _packed_positions(
        query, position_query, position_table, position_start
    )
    output = torch.empty((batch, queries, heads, width))
    lse = torch.empty((batch, heads, queries)) if wants_lse else None
    if output.numel() == 0 or keys == 0:
        check_attention(
            query, key, value, key_scale, key_zero, value_scale, value_zero, query_scale, mask, length, window,
            key_group, value_group, position_query, position_table, position_start,
        )  # fmt: skip
        return output.zero_().to(query.dtype), None if lse is None else lse.fill_(float("-inf"))
    q = query if query.dtype == torch.float32 else query.float()
    query_scale_strides = _NO_MASK
    if query_scale is not None:
        query_scale_strides = check_query_scale(query_scale, query)
        if query_scale.dtype != torch.float32:
            query_scale = query_scale.float()
            query_scale_strides = check_query_scale(query_scale, query)
        if key.dtype in FP8_DTYPES:
            q, query_scale = quantized_query(q, query_scale, key.dtype), None
    q = _last_contiguous(q)
    key, value = _last_contiguous(key), _last_contiguous(value)
    key_scale, key_scale_part = _packed_part("key_scale", key_scale, shape, key_group)
    key_zero, key_zero_part = _packed_part("key_zero", key_zero, shape, key_group)
    value_scale, value_scale_part = _packed_part("value_scale", value_scale, shape, value_group)
    value_zero, value_zero_part = _packed_part("value_zero", value_zero, shape, value_group)
    mask_kind, mask_strides = 0, _NO_MASK
    if mask is not None:
        mask_kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if mask.dtype in (torch.bool, torch.float32) else mask.float()
        mask_strides = broadcast_strides(mask, (batch, heads, queries, keys))
    length_stride = length.stride(0) if length is not None and length.shape[0] > 1 else 0
    failed = ATTENTION_KERNEL.load()["attention"](
        _pack_attention(
            q.data_ptr(),
            output.data_ptr(),
            0 if query_scale is None else query_scale.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            0 if length is None else length.data_ptr(),
            batch,
            heads,
            queries,
            width,
            groups,
            keys,
            mask_kind,
            0 if length is None else length.element_size(),
            length_stride,
            causal,
            window,
            torch.get_num_threads(),
            *q.stride()[:3],
            *query_scale_strides[:3],
            *mask_strides,
            key.data_ptr(),
            KINDS[key.dtype],
            *key.stride()[:3],
            *key_scale_part,
            *key_zero_part,
            value.data_ptr(),
            KINDS[value.dtype],
            *value.stride()[:3],
            *value_scale_part,
            *value_zero_part,
            0 if lse is None else lse.data_ptr(),
            *position_fields,
            scaling,
        )
    )
    if failed:
        raise MemoryError("attention on the CPU found no memory for its scratch")
    return output if query.dtype == torch.float32 else output.to(query.dtype), lse


def _c_serves(query: torch.Tensor) -> bool:
    """Whether there is a kernel, and for the query's dtype."""
    return query.dtype != torch.float64 and bool(ATTENTION_KERNEL.load())


def attention_cpu(query: torch.Tensor, *others: Any) -> torch.Tensor:
    """`attention_reference` in C, of the same arguments; the reference itself for a query in float64."""
    return _attend(False, query, *others)[0] if _c_serves(query) else attention_reference(query, *others)


def attention_lse_cpu(query: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_lse_reference` in C, of the same arguments; the reference itself for a query in float64."""
    return _attend(True, query, *others) if _c_serves(query) else attention_lse_reference(query, *others)
