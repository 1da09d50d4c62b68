"""The attention op: softmax(q k^T) v where k and v are codes.

B batch, Q query tokens, S stored tokens, H query heads, G KV heads, D head_dim. Query head h reads KV head
`h // (H // G)`.
"""

import torch

KEY_BLOCK = 1024
"""Keys decoded at a time: bounds the memory of the reference, which never holds a decoded copy of the whole cache."""


def _decode(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Float values `(code - zero) * scale` of tokens `start:stop`; scale and zero may be per token or not."""

    def of_block(part: torch.Tensor) -> torch.Tensor:
        return part[..., start:stop, :] if part.shape[-2] != 1 else part

    values = codes[:, :, start:stop].to(dtype)
    if zero is not None:
        values = values - of_block(zero)
    return values if scale is None else values * of_block(scale)


def _visible(
    mask: torch.Tensor | None, causal: bool, queries: int, keys: int, start: int, stop: int, device: torch.device
) -> torch.Tensor | None:
    """Additive float mask of one block of keys, broadcastable to `[B, H, Q, block]`, or None if all are visible."""
    if mask is not None:
        part = mask[..., start:stop]
        if part.dtype != torch.bool:
            return part
        return torch.zeros(part.shape, device=device).masked_fill_(~part, float("-inf"))
    if causal and stop > keys - queries + 1:
        last_visible = torch.arange(keys - queries, keys, device=device)[:, None]
        hidden = torch.arange(start, stop, device=device)[None, :] > last_visible
        return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
    return None


def attention_reference(
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
) -> torch.Tensor:
    """Attention over stored codes, one block of keys at a time with a running softmax.

    It computes in float32, or in float64 where the query is float64, which serves to check all else.

    Args:
        query: `[B, H, Q, D]`, any float dtype.
        key, value: codes `[B, G, S, D]` (int8), or the float values themselves where the codec is none.
        key_scale, value_scale: float32, broadcastable to `[B, G, S, D]`: `[G, 1, D]` per channel, `[G, 1, 1]` per head,
            `[B, G, S, 1]` per token; None where `key`, `value` are float.
        key_zero, value_zero: zero points in units of codes, of the shape of their scale; None if symmetric.
        query_scale: `[H, 1, 1]` float32 to quantize the query to int8 first (FAQuant); None leaves it in float.
        mask: True (or, additive, 0) where a query sees a key, broadcastable to `[B, H, Q, S]`; None if there is none.
            A query that sees nothing gets zeros.
        scaling: factor of the scores, usually `1 / sqrt(D)`.
        causal: without a mask, query i sees the keys up to `S - Q + i`; ignored where a mask is given.

    Returns:
        `[B, Q, H, D]`, of the query's dtype.
    """
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = query.to(dtype)
    if query_scale is not None:
        q = (q / query_scale).round().clamp(-128, 127) * query_scale
    q = q.reshape(batch, groups, heads // groups * queries, width) * scaling
    best = torch.full((batch, heads, queries, 1), float("-inf"), dtype=dtype, device=q.device)
    total = torch.zeros_like(best)
    output = torch.zeros((batch, heads, queries, width), dtype=dtype, device=q.device)
    for start in range(0, keys, KEY_BLOCK):
        stop = min(start + KEY_BLOCK, keys)
        scores = (q @ _decode(key, key_scale, key_zero, start, stop, dtype).mT).view(batch, heads, queries, -1)
        bias = _visible(mask, causal, queries, keys, start, stop, q.device)
        scores = scores if bias is None else scores + bias
        new_best = torch.maximum(best, scores.amax(dim=-1, keepdim=True))
        shift = new_best.masked_fill(new_best == float("-inf"), 0)
        weights = torch.exp(scores - shift)
        fade = torch.exp(best - shift)
        total = total * fade + weights.sum(dim=-1, keepdim=True)
        decoded = _decode(value, value_scale, value_zero, start, stop, dtype)
        grouped = weights.view(batch, groups, heads // groups * queries, -1)
        output = output * fade + (grouped @ decoded).view(batch, heads, queries, width)
        best = new_best
    output = output / total.masked_fill(total == 0, 1)
    return output.transpose(1, 2).contiguous().to(query.dtype)
