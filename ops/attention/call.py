"""What a call of the attention ops is: the one definition, from which signatures, schema and the C struct follow.

B batch, Q query tokens, S stored tokens, H query heads, G KV heads, D head_dim. `reference.py` says what it means.
"""

from typing import NamedTuple

import torch

from ..shared.call_form import CallForm


class Coded(NamedTuple):
    """K or V: values `(code - zero) * scale`.

    Attributes:
        codes: `[B, G, S, D]` in int8 or fp8, `[B, G, S, D / 2]` in uint8 for int4, or the float values themselves where
            the codec is none. K and V may differ in this. uint8 holds codes of fewer `bits`, `[B, G, S, D * bits / 8]`.
        scale: float32 or float16, `[B, 1 or left out, G, T, W]` with T rows of tokens and W groups of channels:
            `[G, 1, D]` per channel, `[G, 1, 1]` per head, `[B, G, S, 1]` per token, `[B, G, S, D / n]` per token and n
            channels, `[B, G, ceil(S / group), D]` per channel and `group` tokens. None where `codes` are float.
        zero: zero points in units of codes, shaped as a scale; None if symmetric.
        group: consecutive tokens that share a row of scale and zero.
        bits: 2, 3 or 4 of a code in uint8; of other dtypes it says nothing.
        levels: float32 `[2 ** bits]`, a codebook: what the indices in uint8 stand for, before zero and scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    group: int = 1
    bits: int = 4
    levels: torch.Tensor | None = None


class Ends(NamedTuple):
    """Tokens in float before and behind the codes of K and V: with them, these are the S tokens that are attended to.

    Of K and V there are as many tokens in all; where their codes begin and end may differ.

    Attributes:
        key_front, value_front: `[B, G, *, D]`, float, the oldest; None if there are none.
        key_tail, value_tail: likewise the newest.
    """

    key_front: torch.Tensor | None = None
    key_tail: torch.Tensor | None = None
    value_front: torch.Tensor | None = None
    value_tail: torch.Tensor | None = None


class Visibility(NamedTuple):
    """Which keys a query sees.

    Attributes:
        mask: True (or, additive, 0) where a query sees a key, broadcastable to `[B, H, Q, S]`; None if there is none. A
            query that sees nothing gets zeros.
        causal: without a mask, query i sees the keys up to `length - Q + i`; ignored where a mask is given.
        length: int32 or int64 `[B]` or `[1]`: tokens in use of the S stored ones, a number that stays on the device;
            what lies behind is hidden and may be anything, NaN included. None: all S. More than S where K and V are a
            segment of a sequence: the tokens from the segment's first on, so that causality and window are those of
            the sequence. 0 or less: none. It counts up to 2^29, as do `window` and the position's `start`.
        window: with `causal` and without a mask, a query sees only the newest `window` of the keys that causality
            leaves it, its own included (sliding window); 0: all of them.
    """

    mask: torch.Tensor | None = None
    causal: bool = True
    length: torch.Tensor | None = None
    window: int = 0


class PositionScores(NamedTuple):
    """Scores by position: that of query m and key n is `scaling * (q_m . k_n + query_m . table[start + n])`.

    They are used as they are, whatever the query's scale. All three or none.

    Attributes:
        query: `[B, H, Q, E]`, any float dtype.
        table: `[P, E]`, float. Rows beyond the table are its first or last.
        start: int32 or int64 `[B]` or `[1]`: row of the first key, a number that stays on the device.
    """

    query: torch.Tensor | None = None
    table: torch.Tensor | None = None
    start: torch.Tensor | None = None


class AttentionCall(NamedTuple):
    """A call of `attention` or `attention_lse`.

    Attributes:
        query: `[B, H, Q, D]`, any float dtype. Head h reads KV head `h // (H // G)`.
        key, value: what is attended to.
        scaling: factor of the scores, usually `1 / sqrt(D)`.
        query_scale: broadcastable to `[B, H, Q, 1]` float32: quantize the query to int8, or to the fp8 type of K, first
            (FAQuant: `[H, 1, 1]`); None leaves it in float.
        visibility: which keys a query sees.
        position: scores by position.
        ends: tokens in float beside the codes, of a query in float.
    """

    query: torch.Tensor
    key: Coded
    value: Coded
    scaling: float
    query_scale: torch.Tensor | None = None
    visibility: Visibility = Visibility()
    position: PositionScores = PositionScores()
    ends: Ends = Ends()

    @property
    def keys(self) -> int:
        """S, the number of tokens in codes and in float."""
        front, tail = self.ends.key_front, self.ends.key_tail
        return self.key.codes.shape[2] + sum(part.shape[2] for part in (front, tail) if part is not None)


ATTENTION_CALL = CallForm(AttentionCall, nameless=("codes", "visibility", "ends"))
"""The flat arguments: query, key, value, scaling; key_scale, key_zero, key_group, key_bits, key_levels, those of value,
query_scale; mask, causal, length, window; position_query, position_table, position_start; key_front, key_tail,
value_front, value_tail."""
