"""The attention op: softmax(q k^T) v where k and v are codes; `ops/shared/codes.py` says how codes are stored.

B batch, Q query tokens, S stored tokens, H query heads, G KV heads, D head_dim. Query head h reads KV head
`h // (H // G)`.
"""

from typing import Any

import torch

from ..shared.codes import CODE_RANGES, FP8_DTYPES, expand_scale, from_codes
from .arguments import LARGEST_COUNT, check_attention

KEY_BLOCK = 1024
"""Keys decoded at a time: bounds the memory of the reference, which never holds a decoded copy of the whole cache."""


def _decode(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    group: int,
    start: int,
    stop: int,
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Float values `(code - zero) * scale` of tokens `start:stop`, of which `start` is a multiple of `group`."""

    def of_block(part: torch.Tensor) -> torch.Tensor:
        part = part if part.dim() < 2 or part.shape[-2] == 1 else part[..., start // group : -(-stop // group), :]
        return expand_scale(part.to(dtype), stop - start, width, group)

    values = from_codes(codes[:, :, start:stop], width, dtype)
    if zero is not None:
        values = values - of_block(zero)
    return values if scale is None else values * of_block(scale)


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
    mask: torch.Tensor | None,
    length: torch.Tensor,
    causal: bool,
    window: int,
    queries: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Additive mask in `dtype` of keys `start:stop`, broadcastable to `[B, H, Q, stop - start]`."""
    keys = torch.arange(start, stop, device=length.device)
    length = length.view(-1, 1, 1, 1)
    hidden = keys >= length
    if mask is None and causal:
        newest = length - queries + torch.arange(queries, device=length.device)[:, None]
        hidden = hidden | (keys > newest)
        if window:
            hidden = hidden | (keys <= newest - window)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=length.device).masked_fill_(hidden, float("-inf"))
    if mask is None:
        return bias
    part = mask if mask.dim() == 0 or mask.shape[-1] == 1 else mask[..., start:stop]
    return bias + part.to(dtype) if part.dtype != torch.bool else bias.masked_fill(~part, float("-inf"))


def _position_scores(
    query: torch.Tensor, table: torch.Tensor, first: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """`[B, H, Q, stop - start]`: `query . table[first + n]` for the keys n in `start:stop`."""
    rows = first.clamp(-LARGEST_COUNT, LARGEST_COUNT).view(-1, 1) + torch.arange(start, stop, device=first.device)
    return query @ table[rows.clamp(0, table.shape[0] - 1)].to(query.dtype)[:, None].mT


def attention_lse_reference(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over stored codes, one block of keys at a time with a running softmax; and its log-sum-exp.

    It computes in float32, or in float64 where the query is float64, which serves to check all else.

    Args:
        query: `[B, H, Q, D]`, any float dtype.
        key, value: codes `[B, G, S, D]` in int8 or fp8, `[B, G, S, D / 2]` in uint8 for int4, or the float values
            themselves where the codec is none. K and V may differ in this.
        key_scale, value_scale: float32 or float16, `[B, 1 or left out, G, T, W]` with T rows of tokens and W groups of
            channels: `[G, 1, D]` per channel, `[G, 1, 1]` per head, `[B, G, S, 1]` per token, `[B, G, S, D / n]` per
            token and n channels, `[B, G, ceil(S / key_group), D]` per channel and `key_group` tokens. None where `key`,
            `value` are float.
        key_zero, value_zero: zero points in units of codes, shaped as a scale; None if symmetric.
        query_scale: broadcastable to `[B, H, Q, 1]` float32: quantize the query to int8, or to the fp8 type of K, first
            (FAQuant: `[H, 1, 1]`); None leaves it in float.
        mask: True (or, additive, 0) where a query sees a key, broadcastable to `[B, H, Q, S]`; None if there is none.
            A query that sees nothing gets zeros.
        scaling: factor of the scores, usually `1 / sqrt(D)`.
        causal: without a mask, query i sees the keys up to `length - Q + i`; ignored where a mask is given.
        length: int32 or int64 `[B]` or `[1]`: tokens in use of the S stored ones, a number that stays on the device;
            what lies behind is hidden and may be anything, NaN included. None: all S. More than S where K and V are a
            segment of a sequence: the tokens from the segment's first on, so that causality and window are those of
            the sequence. 0 or less: none. It counts up to 2^29, as do `window` and `position_start`.
        window: with `causal` and without a mask, a query sees only the newest `window` of the keys that causality
            leaves it, its own included (sliding window); 0: all of them.
        key_group, value_group: consecutive tokens that share a row of the scale and zero of K, of V.
        position_query: `[B, H, Q, E]`, any float dtype; with the next two it adds scores by position: that of query m
            and key n is `scaling * (q_m . k_n + position_query_m . position_table[position_start + n])`. It is used as
            it is, whatever `query_scale`. All three or none.
        position_table: `[P, E]`, float. Rows beyond the table are its first or last.
        position_start: int64 `[B]` or `[1]`: row of the first key, a number that stays on the device.

    Returns:
        `[B, Q, H, D]`, of the query's dtype, and the natural logarithm of the sum of `exp(score)` over the keys that a
        query sees, `[B, H, Q]`, float32 or for a query in float64 float64; -inf where a query sees none. Outputs of the
        segments of a sequence are merged by it: their mean, weighted by `exp(lse)`.

    Raises:
        ValueError: dtypes, shapes, devices, groups or a window that do not go together, or that no kernel knows.
    """
    has_positions = check_attention(
        query, key, value, key_scale, key_zero, value_scale, value_zero, query_scale, mask, length, window, key_group,
        value_group, position_query, position_table, position_start,
    )  # fmt: skip
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = query.to(dtype)
    if query_scale is not None:
        q = quantized_query(q, query_scale, key.dtype)
    q = q.reshape(batch, groups, heads // groups * queries, width) * scaling
    best = torch.full((batch, heads, queries, 1), float("-inf"), dtype=dtype, device=q.device)
    total = torch.zeros_like(best)
    output = torch.zeros((batch, heads, queries, width), dtype=dtype, device=q.device)
    if length is None:
        length = torch.tensor([keys], device=q.device)
    length, window = length.clamp(-LARGEST_COUNT, LARGEST_COUNT), min(window, LARGEST_COUNT)
    block = KEY_BLOCK * key_group * value_group  # starts are multiples of both
    for start in range(0, keys, block):
        stop = min(start + block, keys)
        decoded = _in_use(_decode(key, key_scale, key_zero, key_group, start, stop, width, dtype), length, start)
        scores = (q @ decoded.mT).view(batch, heads, queries, stop - start)
        if has_positions:
            terms = _position_scores(position_query.to(dtype), position_table, position_start, start, stop)
            scores = scores + terms * scaling
        scores = scores + _visible(mask, length, causal, window, queries, start, stop, dtype)
        new_best = torch.maximum(best, scores.amax(dim=-1, keepdim=True))
        shift = new_best.masked_fill(new_best == float("-inf"), 0)
        weights = torch.exp(scores - shift)
        fade = torch.exp(best - shift)
        total = total * fade + weights.sum(dim=-1, keepdim=True)
        decoded = _in_use(
            _decode(value, value_scale, value_zero, value_group, start, stop, width, dtype), length, start
        )
        grouped = weights.view(batch, groups, heads // groups * queries, stop - start)
        output = output * fade + (grouped @ decoded).view(batch, heads, queries, width)
        best = new_best
    output = output / total.masked_fill(total == 0, 1)
    return output.transpose(1, 2).contiguous().to(query.dtype), (best + total.log()).squeeze(-1)


def attention_reference(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The output of `attention_lse_reference` alone, of the same arguments."""
    return attention_lse_reference(*args, **kwargs)[0]
