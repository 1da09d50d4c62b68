"""Attention on the CPU: `attention.c` behind the Python signature of the reference."""

import struct
from typing import Any

import torch

from ..codes import FP8_DTYPES, code_width
from ..compile import CKernel
from ..operands import KINDS, broadcast_strides
from .reference import attention_lse_reference, attention_reference, has_position_scores, quantized_query

ATTENTION_KERNEL = CKernel(
    "attention",
    ("ops/vector.h", "ops/attention/micro.h", "ops/attention/integer.h", "ops/attention/attention.c"),
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
    part: torch.Tensor | None, codes: torch.Tensor, width: int, group: int
) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """A scale or zero of codes `[B, G, S, *]` of `width` values as the kernel reads it, and its fields there."""
    if part is None:
        return None, _NO_PART
    if part.dtype not in _PART_KINDS:
        part = part.float()
    batch, groups, keys = codes.shape[:3]
    rows, columns = (1, 1, *part.shape)[-2:]
    if not columns or width % columns or (rows != 1 and rows != -(-keys // group)):
        raise ValueError(
            f"a scale {tuple(part.shape)} does not belong to {keys} tokens in groups of {group} and {width} channels"
        )
    strides = broadcast_strides(part, (batch, groups, rows, columns))
    return part, (part.data_ptr(), _PART_KINDS[part.dtype], rows != 1, group, width // columns, *strides)


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
    start = position_start.long().flatten()
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
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if (
        key.shape[:3] != value.shape[:3]
        or key.shape[0] != batch
        or code_width(key) != width
        or code_width(value) != width
        or heads % groups
    ):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not go together: "
            f"[B, H, Q, D] and twice [B, G, S, D], in int4 [B, G, S, D / 2], with H a multiple of G"
        )
    position_query, position_table, position_start, position_fields = _packed_positions(
        query, position_query, position_table, position_start
    )
    output = torch.empty((batch, queries, heads, width))
    lse = torch.empty((batch, heads, queries)) if wants_lse else None
    if output.numel() == 0 or keys == 0:
        return output.zero_().to(query.dtype), None if lse is None else lse.fill_(float("-inf"))
    q = query if query.dtype == torch.float32 else query.float()
    query_scale_strides = _NO_MASK
    if query_scale is not None:
        query_scale = query_scale.float()
        query_scale_strides = broadcast_strides(query_scale, (batch, heads, queries, 1))
        if key.dtype in FP8_DTYPES:
            q, query_scale = quantized_query(q, query_scale, key.dtype), None
    q = _last_contiguous(q)
    key, value = _last_contiguous(key), _last_contiguous(value)
    key_scale, key_scale_part = _packed_part(key_scale, key, width, key_group)
    key_zero, key_zero_part = _packed_part(key_zero, key, width, key_group)
    value_scale, value_scale_part = _packed_part(value_scale, value, width, value_group)
    value_zero, value_zero_part = _packed_part(value_zero, value, width, value_group)
    mask_kind, mask_strides = 0, _NO_MASK
    if mask is not None:
        mask_kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if mask.dtype in (torch.bool, torch.float32) else mask.float()
        mask_strides = broadcast_strides(mask, (batch, heads, queries, keys))
    length_stride = 0
    if length is not None:
        if length.numel() not in (1, batch):
            raise ValueError(
                f"length {tuple(length.shape)} has neither one number nor one for each of {batch} sequences"
            )
        length = length if length.dtype in (torch.int32, torch.int64) else length.long()
        length = length.flatten()
        length_stride = length.stride(0) if length.numel() > 1 else 0
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
