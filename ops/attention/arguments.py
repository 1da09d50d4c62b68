"""What every version of the attention ops refuses, and how far positions count."""

import torch

from ..shared.codes import check_levels, code_width
from ..shared.operands import (
    STORED_DTYPES,
    VALUE_DTYPES,
    broadcast_strides,
    check_devices,
    check_index,
    dtype_name,
    part_strides,
)
from .call import ATTENTION_CALL, AttentionCall, Coded, Ends, PositionScores, Visibility

LARGEST_COUNT = 2**29
"""Lengths, windows and rows of the table of scores by position count as this where they are larger, so that no sum of
them wraps, in 32 bits either; so do negative ones beyond its negative."""
LARGEST_HEAD_DIM = 2**16
"""Up to which sums of products of codes are exact in 32 bits."""


def _check_operands(query: torch.Tensor, keys: Coded, values: Coded, ends: Ends) -> tuple[int, int, int, int]:
    """The shape `[B, G, S, D]` of K and V, their tokens in float counted in."""
    key, value = keys.codes, values.codes
    shape, other = key.shape, value.shape
    if query.dtype not in VALUE_DTYPES or key.dtype not in STORED_DTYPES or value.dtype not in STORED_DTYPES:
        raise ValueError(
            f"attention takes a query in float, and K and V in int8, uint8, fp8 or float, not "
            f"{dtype_name(query.dtype)}, {dtype_name(key.dtype)} and {dtype_name(value.dtype)}"
        )
    fits = query.dim() == 4 and len(shape) == 4 and len(other) == 4
    if fits:
        batch, heads, _, width = query.shape
        fits = shape[:2] == other[:2] and shape[0] == batch and shape[1] > 0 and heads % shape[1] == 0
        fits = fits and 0 < width == code_width(key, keys.bits) == code_width(value, values.bits)
        tokens = shape[2] + _tokens("key", ends.key_front, ends.key_tail, (*shape[:2], width) if fits else None)
        others = other[2] + _tokens("value", ends.value_front, ends.value_tail, (*shape[:2], width) if fits else None)
        fits = fits and tokens == others
    if not fits:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(shape)} and value {tuple(other)} do not go together: "
            f"[B, H, Q, D] and twice [B, G, S, D], in int4 [B, G, S, D / 2], with H a multiple of G, S with the tokens "
            f"in float before and behind"
        )
    for name, side in (("key", keys), ("value", values)):
        try:
            check_levels(side.codes.dtype, side.bits, side.levels)
        except ValueError as error:
            raise ValueError(f"{name}_levels: {error}") from None
    if width > LARGEST_HEAD_DIM:
        raise ValueError(f"attention takes a head_dim up to {LARGEST_HEAD_DIM}, not {width}")
    return batch, shape[1], tokens, width


def _tokens(
    name: str, front: torch.Tensor | None, tail: torch.Tensor | None, shape: tuple[int, int, int] | None
) -> int:
    """How many tokens are in float, of heads of a shape `[B, G, D]`, if that is known."""
    parts = {"front": front, "tail": tail}
    for part, floats in parts.items():
        if floats is None:
            continue
        is_shaped = floats.dim() == 4 and shape in (None, (*floats.shape[:2], floats.shape[3]))
        if floats.dtype not in VALUE_DTYPES or not is_shaped:
            raise ValueError(
                f"{name}_{part} {tuple(floats.shape)} in {dtype_name(floats.dtype)} is no float [B, G, *, D]"
            )
    return sum(floats.shape[2] for floats in parts.values() if floats is not None)


def whole_codes_only(call: AttentionCall) -> str | None:
    """Why a kernel that reads whole codes of 4 and 8 bits, or floats alone, does not serve a call; None if it does."""
    if any(part is not None for part in call.ends):
        return "it reads codes or floats, not both in one call"
    for side in (call.key, call.value):
        if side.levels is not None or (side.codes.dtype == torch.uint8 and side.bits != 4):
            return "it reads neither codes of 2 and 3 bits nor codebooks"
    return None


def _check_parts(name: str, side: Coded, shape: tuple[int, int, int, int]) -> None:
    if side.scale is not None:
        part_strides(f"{name}_scale", side.scale, shape, side.group)
    if side.zero is not None:
        part_strides(f"{name}_zero", side.zero, shape, side.group)


def _check_query_scale(query_scale: torch.Tensor, query: torch.Tensor) -> None:
    if query_scale.dtype not in VALUE_DTYPES:
        raise ValueError(f"query_scale must be float32, not {dtype_name(query_scale.dtype)}")
    broadcast_strides(query_scale, (*query.shape[:3], 1))


def _check_visibility(visibility: Visibility, query: torch.Tensor, keys: int) -> None:
    mask, _, length, _ = visibility
    if mask is not None:
        if mask.dtype != torch.bool and mask.dtype not in VALUE_DTYPES:
            raise ValueError(f"a mask is bool or float, not {dtype_name(mask.dtype)}")
        broadcast_strides(mask, (*query.shape[:3], keys))
    if length is not None:
        check_index("length", length, query.shape[0])


def _check_position(position: PositionScores, query: torch.Tensor) -> None:
    rows, table, start = position
    if rows is None and table is None and start is None:
        return
    if rows is None or table is None or start is None:
        raise ValueError("position_query, position_table and position_start go together: give all three or none")
    width = rows.shape[-1] if rows.dim() else 0
    is_table = table.dim() == 2 and table.shape[0] > 0 and table.shape[1] == width > 0
    if rows.shape[:-1] != query.shape[:-1] or not is_table:
        raise ValueError(
            f"position_query {tuple(rows.shape)} and position_table {tuple(table.shape)} do not go together with a "
            f"query {tuple(query.shape)}: [B, H, Q, E] and [P, E] with a query [B, H, Q, D]"
        )
    if rows.dtype not in VALUE_DTYPES or table.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"position_query and position_table are float, not {dtype_name(rows.dtype)} and {dtype_name(table.dtype)}"
        )
    check_index("position_start", start, query.shape[0])


def check_call(call: AttentionCall) -> tuple[int, int, int, int]:
    """The shape `[B, G, S, D]` of K and V of a call whose tensors are on one device.

    Raises:
        ValueError: dtypes, shapes, groups or a window that do not go together, or that none of the kernels knows.
    """
    query, key, value, _, query_scale, visibility, position, ends = call
    shape = _check_operands(query, key, value, ends)
    if key.group < 1 or value.group < 1 or visibility.window < 0:
        raise ValueError(
            f"key_group and value_group are at least 1 and window at least 0, not {key.group}, {value.group} and "
            f"{visibility.window}"
        )
    _check_visibility(visibility, query, shape[2])
    for name, side in (("key", key), ("value", value)):
        _check_parts(name, side, (*shape[:2], side.codes.shape[2], shape[3]))
    if query_scale is not None and any(part is not None for part in ends):
        raise ValueError("query_scale goes with codes; leave it out where tokens are in float before or behind them")
    if query_scale is not None:
        _check_query_scale(query_scale, query)
    _check_position(position, query)
    return shape


def check_attention(call: AttentionCall) -> tuple[int, int, int, int]:
    """`check_call`; raises ValueError also where tensors are on different devices."""
    check_devices(*[value for value in ATTENTION_CALL.flat(call) if isinstance(value, torch.Tensor)])
    return check_call(call)
