"""The attention op: softmax(q k^T) v where k and v are codes; `ops/shared/codes.py` says how codes are stored.

`call.py` says what a call is: B batch, Q query tokens, S stored tokens, H query heads, G KV heads, D head_dim.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch

from ..shared.codes import CODE_RANGES, FP8_DTYPES, expand_scale, from_codes
from .arguments import LARGEST_COUNT, check_attention
from .call import AttentionCall, Coded, Ends, PositionScores, Visibility

KEY_BLOCK = 1024
"""Keys decoded at a time: bounds the memory of the reference, which never holds a decoded copy of the whole cache."""


def _decode(side: Coded, start: int, stop: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Float values `(code - zero) * scale` of tokens `start:stop`."""
    codes, scale, zero, group, bits, levels = side
    first = start // group * group

    def of_block(part: torch.Tensor) -> torch.Tensor:
        if part.dim() < 2 or part.shape[-2] == 1:
            return expand_scale(part.to(dtype), stop - start, width, group)
        part = part[..., start // group : -(-stop // group), :]
        part = expand_scale(part.to(dtype), stop - first, width, group)
        return part if part.shape[-2] == 1 else part[..., start - first :, :]

    values = from_codes(codes[:, :, start:stop], width, dtype, bits, levels)
    if zero is not None:
        values = values - of_block(zero)
    return values if scale is None else values * of_block(scale)


def _parts(side: Coded, front: torch.Tensor | None, tail: torch.Tensor | None) -> list[tuple[int, int, Coded]]:
    """Floats, codes and floats of K or V: from which slot to which, and what."""
    parts, first = [], 0
    for part in (front, side, tail):
        if part is not None:
            coded = part if isinstance(part, Coded) else Coded(part)
            parts.append((first, first + coded.codes.shape[2], coded))
            first = parts[-1][1]
    return parts


def _blocks(call: AttentionCall) -> Iterator[tuple[int, int, list[tuple[int, int, Coded]]]]:
    """Slots, from and to, of which K lies in one part, and V, and these: where in it the block starts, and the part."""
    ends: Ends = call.ends
    both = _parts(call.key, ends.key_front, ends.key_tail), _parts(call.value, ends.value_front, ends.value_tail)
    cuts = sorted({0, *(stop for parts in both for _, stop, _ in parts)})
    for first, last in pairwise(cuts):
        for start in range(first, last, KEY_BLOCK):
            found = [next(part for part in parts if part[0] <= start < part[1]) for parts in both]
            yield start, min(start + KEY_BLOCK, last), found


def quantized_query(query: torch.Tensor, scale: torch.Tensor, key_dtype: torch.dtype) -> torch.Tensor:
    """The float values of a query quantized to the fp8 type of K, or to int8 where the codes of K are integers.

    Args:
        query: `[B, H, Q, D]`, float32 or float64.
        scale: broadcastable to `[B, H, Q, 1]`.
        key_dtype: dtype of the codes of K.
    """
    dtype = key_dtype if key_dtype in FP8_DTYPES else torch.int8
    codes = (query / scale).clamp(*CODE_RANGES[dtype])
    return (codes.to(dtype).to(query.dtype) if dtype in FP8_DTYPES else codes.round()) * scale


def _in_use(decoded: torch.Tensor, length: torch.Tensor, start: int) -> torch.Tensor:
    """`[B, G, S, D]` with zeros for tokens behind the last, which are uninitialised memory."""
    tokens = torch.arange(start, start + decoded.shape[2], device=decoded.device)
    return decoded.masked_fill((tokens >= length.view(-1, 1))[:, None, :, None], 0)


def _visible(
    visibility: Visibility, length: torch.Tensor, queries: int, start: int, stop: int, dtype: torch.dtype
) -> torch.Tensor:
    """Additive mask in `dtype` of keys `start:stop`, broadcastable to `[B, H, Q, stop - start]`."""
    mask, causal, _, window = visibility
    keys = torch.arange(start, stop, device=length.device)
    length = length.view(-1, 1, 1, 1)
    hidden = keys >= length
    if mask is None and causal:
        newest = length - queries + torch.arange(queries, device=length.device)[:, None]
        hidden = hidden | (keys > newest)
        if window:
            hidden = hidden | (keys <= newest - min(window, LARGEST_COUNT))
    bias = torch.zeros(hidden.shape, dtype=dtype, device=length.device).masked_fill_(hidden, float("-inf"))
    if mask is None:
        return bias
    part = mask if mask.dim() == 0 or mask.shape[-1] == 1 else mask[..., start:stop]
    return bias + part.to(dtype) if part.dtype != torch.bool else bias.masked_fill(~part, float("-inf"))


def _position_scores(position: PositionScores, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """`[B, H, Q, stop - start]`: `query . table[first + n]` for the keys n in `start:stop`."""
    query, table, first = position
    rows = first.clamp(-LARGEST_COUNT, LARGEST_COUNT).view(-1, 1) + torch.arange(start, stop, device=first.device)
    return query.to(dtype) @ table[rows.clamp(0, table.shape[0] - 1)].to(dtype)[:, None].mT


def attention_lse_reference(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over stored codes, one block of keys at a time with a running softmax; and its log-sum-exp.

    It computes in float32, or in float64 where the query is float64, which serves to check all else.

    Returns:
        `[B, Q, H, D]`, of the query's dtype, and the natural logarithm of the sum of `exp(score)` over the keys that a
        query sees, `[B, H, Q]`, float32 or for a query in float64 float64; -inf where a query sees none. Outputs of the
        segments of a sequence are merged by it: their mean, weighted by `exp(lse)`.

    Raises:
        ValueError: dtypes, shapes, devices, groups or a window that do not go together, or that no kernel knows.
    """
    batch, groups, keys, width = check_attention(call)
    query, key, scaling, query_scale, visibility, position = (
        call.query, call.key, call.scaling, call.query_scale, call.visibility, call.position,
    )  # fmt: skip
    heads, queries = query.shape[1:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = query.to(dtype)
    if query_scale is not None:
        q = quantized_query(q, query_scale, key.codes.dtype)
    q = q.reshape(batch, groups, heads // groups * queries, width) * scaling
    best = torch.full((batch, heads, queries, 1), float("-inf"), dtype=dtype, device=q.device)
    total = torch.zeros_like(best)
    output = torch.zeros((batch, heads, queries, width), dtype=dtype, device=q.device)
    length = q.new_full((1,), keys, dtype=torch.int64) if visibility.length is None else visibility.length
    length = length.clamp(-LARGEST_COUNT, LARGEST_COUNT)
    for start, stop, parts in _blocks(call):
        key_block, value_block = (
            _in_use(_decode(part, start - first, stop - first, width, dtype), length, start) for first, _, part in parts
        )
        scores = (q @ key_block.mT).view(batch, heads, queries, stop - start)
        if position.query is not None:
            scores = scores + _position_scores(position, start, stop, dtype) * scaling
        scores = scores + _visible(visibility, length, queries, start, stop, dtype)
        new_best = torch.maximum(best, scores.amax(dim=-1, keepdim=True))
        shift = new_best.masked_fill(new_best == float("-inf"), 0)
        weights = torch.exp(scores - shift)
        fade = torch.exp(best - shift)
        total = total * fade + weights.sum(dim=-1, keepdim=True)
        grouped = weights.view(batch, groups, heads // groups * queries, stop - start)
        output = output * fade + (grouped @ value_block).view(batch, heads, queries, width)
        best = new_best
    output = output / total.masked_fill(total == 0, 1)
    return output.transpose(1, 2).contiguous().to(query.dtype), (best + total.log()).squeeze(-1)


def attention_reference(call: AttentionCall) -> torch.Tensor:
    """The output of `attention_lse_reference` alone."""
    return attention_lse_reference(call)[0]
