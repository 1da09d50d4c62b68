"""What every version of the attention ops refuses, and how far positions count."""

import torch

from ..shared.codes import code_width
from ..shared.operands import (
    STORED_DTYPES,
    VALUE_DTYPES,
    broadcast_strides,
    check_devices,
    check_index,
    dtype_name,
    part_strides,
)

LARGEST_COUNT = 2**29
"""Lengths, windows and rows of the table of scores by position count as this where they are larger, so that no sum of
them wraps, in 32 bits either; so do negative ones beyond its negative."""
LARGEST_HEAD_DIM = 2**16
"""Up to which sums of products of codes are exact in 32 bits."""


def check_operands(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    length: torch.Tensor | None,
    window: int,
    key_group: int,
    value_group: int,
) -> tuple[int, int, int, int]:
    """The shape `[B, G, S, D]` of K and V.

    Raises:
        ValueError: query, K and V do not go together; a dtype that none of the kernels knows; groups of less than one
            token, or a negative window.
    """
    shape, other = key.shape, value.shape
    if query.dtype not in VALUE_DTYPES or key.dtype not in STORED_DTYPES or value.dtype not in STORED_DTYPES:
        raise ValueError(
            f"attention takes a query in float, and K and V in int8, uint8, fp8 or float, not "
            f"{dtype_name(query.dtype)}, {dtype_name(key.dtype)} and {dtype_name(value.dtype)}"
        )
    fits = query.dim() == 4 and len(shape) == 4 and len(other) == 4
    if fits:
        batch, heads, _, width = query.shape
        fits = shape[:3] == other[:3] and shape[0] == batch and shape[1] > 0 and heads % shape[1] == 0
        fits = fits and 0 < width == code_width(key) == code_width(value)
    if not fits:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(shape)} and value {tuple(other)} do not go together: "
            f"[B, H, Q, D] and twice [B, G, S, D], in int4 [B, G, S, D / 2], with H a multiple of G"
        )
    if width > LARGEST_HEAD_DIM:
        raise ValueError(f"attention takes a head_dim up to {LARGEST_HEAD_DIM}, not {width}")
    if key_group < 1 or value_group < 1 or window < 0:
        raise ValueError(
            f"key_group and value_group are at least 1 and window at least 0, not {key_group}, {value_group} and "
            f"{window}"
        )
    if mask is not None and mask.dtype != torch.bool and mask.dtype not in VALUE_DTYPES:
        raise ValueError(f"a mask is bool or float, not {dtype_name(mask.dtype)}")
    if length is not None:
        check_index("length", length, batch)
    return batch, shape[1], shape[2], width


def has_position_scores(
    query: torch.Tensor,
    position_query: torch.Tensor | None,
    position_table: torch.Tensor | None,
    position_start: torch.Tensor | None,
) -> bool:
    """Whether scores by position are asked for.

    Raises:
        ValueError: the three arguments do not go together, or not with the query.
    """
    if position_query is None and position_table is None and position_start is None:
        return False
    if position_query is None or position_table is None or position_start is None:
        raise ValueError("position_query, position_table and position_start go together: give all three or none")
    width = position_query.shape[-1] if position_query.dim() else 0
    is_table = position_table.dim() == 2 and position_table.shape[0] > 0 and position_table.shape[1] == width > 0
    if position_query.shape[:-1] != query.shape[:-1] or not is_table:
        raise ValueError(
            f"position_query {tuple(position_query.shape)} and position_table {tuple(position_table.shape)} do not go "
            f"together with a query {tuple(query.shape)}: [B, H, Q, E] and [P, E] with a query [B, H, Q, D]"
        )
    if position_query.dtype not in VALUE_DTYPES or position_table.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"position_query and position_table are float, not {dtype_name(position_query.dtype)} and "
            f"{dtype_name(position_table.dtype)}"
        )
    check_index("position_start", position_start, query.shape[0])
    return True


def check_query_scale(query_scale: torch.Tensor, query: torch.Tensor) -> tuple[int, ...]:
    """Strides of the scale of a query `[B, H, Q, D]` over B, H, Q and 1.

    Raises:
        ValueError: it does not belong to the query.
    """
    if query_scale.dtype not in VALUE_DTYPES:
        raise ValueError(f"query_scale must be float32, not {dtype_name(query_scale.dtype)}")
    return broadcast_strides(query_scale, (*query.shape[:3], 1))


def check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor | None,
    key_zero: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    value_zero: torch.Tensor | None,
    query_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    length: torch.Tensor | None,
    window: int,
    key_group: int,
    value_group: int,
    position_query: torch.Tensor | None,
    position_table: torch.Tensor | None,
    position_start: torch.Tensor | None,
) -> bool:
    """Whether scores by position are asked for; raises ValueError as `attention` does."""
    check_devices(
        query, key, value, key_scale, key_zero, value_scale, value_zero, query_scale, mask, length, position_query,
        position_table, position_start,
    )  # fmt: skip
    shape = check_operands(query, key, value, mask, length, window, key_group, value_group)
    parts = (
        ("key_scale", key_scale, key_group),
        ("key_zero", key_zero, key_group),
        ("value_scale", value_scale, value_group),
        ("value_zero", value_zero, value_group),
    )
    for name, part, group in parts:
        if part is not None:
            part_strides(name, part, shape, group)
    if query_scale is not None:
        check_query_scale(query_scale, query)
    if mask is not None:
        broadcast_strides(mask, (*query.shape[:3], shape[2]))
    return has_position_scores(query, position_query, position_table, position_start)
