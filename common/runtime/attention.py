"""The attention function that transformers' models call, and the mask that goes with it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from ...ops import attend, attention_lse
from ...ops.attention.call import ATTENTION_CALL, AttentionCall, Coded, Ends, PositionScores, Visibility
from ...ops.shared.registry import NAMESPACE
from ..errors import OctavoError
from .cache.views import FOLD, Codes, Piece, Segments, as_segments, block_size, pieces, runs
from .gradients import refuse_gradient
from .precision import without_autocast
from .rotary import steady_length
from .stored_form import as_stored_keys, as_values, left_out_scores

DECODED_BLOCK = 4096
"""Tokens decoded at a time, at most, where the attention op does not read the codes of a scheme."""
MOST_PARTS = 8
"""Outputs over parts of the keys that are kept before they become one."""
Weighed = tuple[torch.Tensor, torch.Tensor]
"""What `attention_lse` returns: `[B, Q, H, D]`, and `[B, H, Q]` the logarithms of the sums of exponentials."""
_NO_ENDS = Ends()
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
FLOATS_GIVEN = (
    "quantized attention is given float keys and values, not the codes of a QuantizedCache: pass cache=QuantizedCache("
    "model.config, scheme), past_key_values= before transformers 5.24; for attention in float, load the model anew "
    "without set_attn_implementation and prepare"
)


@dataclass(frozen=True)
class SlidingWindow:
    """In place of a mask tensor: a query sees the newest `size` of the keys that causality leaves it.

    `generate` makes the masks of compileable caches ahead of the model and takes each for a tensor `[B, 1, Q, S]`.
    """

    size: int
    ndim: ClassVar[int] = 4

    def contiguous(self) -> "SlidingWindow":
        """Itself, as of a tensor that is contiguous."""
        return self


class _Decoded:
    """Blocks of decoded tokens of K or V: the newest one is kept, since pieces of it come one after another."""

    def __init__(self, side: Segments, block: int) -> None:
        self.side, self.block = side, block
        self._start, self._values = -1, torch.empty(0)

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """Tokens `start:stop` of the codes, float32 `[B, G, S, D]`."""
        block = start // self.block * self.block
        if block != self._start:
            last = min(block + self.block, self.side.body.codes.shape[2])
            self._start, self._values = block, self.side.decoder(block, last)
        return self._values[:, :, start - block : stop - block]


@dataclass(frozen=True)
class _Call:
    """What calls of the op over the same queries have in common; `first` is the slot of the mask's first column."""

    query: torch.Tensor
    query_scale: torch.Tensor | None
    mask: torch.Tensor | None
    scaling: float
    causal: bool
    window: int
    position: PositionScores
    first: int = 0

    def codes(self, keys: Codes, values: Codes) -> torch.Tensor:
        """All tokens in one call of the op."""
        mask = None if self.mask is None else self.mask[..., : keys.codes.shape[2]]
        visibility, position = Visibility(mask, self.causal, keys.length, self.window), self.position
        if self.first and position.query is not None:
            position = position._replace(start=position.start + self.first)
        return attend(self._of(self.query, self.query_scale, keys, values, visibility, position))

    def _of(
        self, query: torch.Tensor, query_scale: torch.Tensor | None, keys: Codes, values: Codes,
        visibility: Visibility, position: PositionScores, ends: Ends = _NO_ENDS,
    ) -> AttentionCall:  # fmt: skip
        """The call of the op."""
        key = Coded(keys.codes, keys.scale, keys.zero, keys.group, keys.bits, keys.levels)
        value = Coded(values.codes, values.scale, values.zero, values.group, values.bits, values.levels)
        return AttentionCall(query, key, value, self.scaling, query_scale, visibility, position, ends)

    def segments(self, keys: Segments, values: Segments) -> torch.Tensor:
        """A call of the op, where it reads floats beside codes, for all queries that see the same as codes."""
        if not _is_one_call(self, keys, values):
            return self._by_pieces(keys, values)
        found = runs(keys, values, self.query.shape[2])
        outputs = [self._run(keys, values, start, seen) for start, seen in found]
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _run(self, keys: Segments, values: Segments, start: int, seen: int) -> torch.Tensor:
        """The queries of a run, before the oldest of which `start` tokens are stored, and after the newest `seen`."""
        query, mask, position = self.query, self.mask, self.position
        before = keys.total - query.shape[2]
        if (start, seen) != (before, keys.total):
            query = query[:, :, start - before : seen - before]
            if mask is not None and mask.shape[-2] > 1:
                mask = mask[..., start - before : seen - before, :]
        if mask is not None and mask.shape[-1] > 1:
            mask = mask[..., : seen - self.first]
        if position.query is not None:
            rows = position.query[:, :, start - before : seen - before]
            position = PositionScores(rows, position.table, position.start + self.first)
        key_front, key, key_tail = keys.strips(self.first, seen)
        value_front, value, value_tail = values.strips(self.first, seen)
        visibility = Visibility(mask, self.causal, None, self.window)
        ends = Ends(key_front, key_tail, value_front, value_tail)
        return attend(self._of(query, None, key, value, visibility, position, ends))

    def _by_pieces(self, keys: Segments, values: Segments) -> torch.Tensor:
        """Piece by piece, each weighed by its sum of exponentials."""
        size = block_size(keys, values, DECODED_BLOCK)
        decoded = _Decoded(keys, size), _Decoded(values, size)
        found: dict[tuple[int, int], list[Weighed]] = {}
        for piece in pieces(keys, values, self.query.shape[2], size):
            key, value = (self._part(side, piece, block) for side, block in zip((keys, values), decoded, strict=True))
            parts = found.setdefault(piece.queries, [])
            parts.append(self._weighed(key, value, piece))
            if len(parts) == MOST_PARTS:
                parts[:] = [_merged(parts)]
        outputs = [_merged(found[queries])[0] for queries in sorted(found)]
        return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]).to(self.query.dtype)

    @staticmethod
    def _part(side: Segments, piece: Piece, decoded: _Decoded) -> Codes:
        """The tokens of a piece."""
        start, stop = piece.slots
        first, last = side.edges(piece.seen)
        if stop <= first or start >= last:
            return Codes(side.floats(start, stop))
        if side.decoder is not None:
            return Codes(decoded(start - side.start, stop - side.start))
        return side.body.part(start - side.start, stop - side.start)

    def _weighed(self, keys: Codes, values: Codes, piece: Piece) -> Weighed:
        """The queries of a piece over its keys."""
        (first, last), (start, stop) = piece.queries, piece.slots
        query, mask, position = self.query, self.mask, self.position
        if (first, last) != (0, query.shape[2]):
            query = query[:, :, first:last]
            mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., first:last, :]
        if mask is not None and mask.shape[-1] > 1:
            mask = mask[..., start - self.first : stop - self.first]
        if position.query is not None:
            position = PositionScores(position.query[:, :, first:last], position.table, position.start + start)
        sees_less = last - first > 1 or self.window
        length = query.new_full((1,), piece.seen - start, dtype=torch.int64) if sees_less else None  # no copy, no wait
        query_scale = self.query_scale if keys.scale is not None else None
        visibility = Visibility(mask, self.causal, length, self.window)
        return attention_lse(*ATTENTION_CALL.flat(self._of(query, query_scale, keys, values, visibility, position)))


def _is_one_call(call: _Call, keys: Segments, values: Segments) -> bool:
    """Whether the op reads floats and codes of these segments together."""
    is_read = call.query.device.type == "cpu" and call.query_scale is None
    return is_read and keys.decoder is None and values.decoder is None


def _merged(parts: list[Weighed]) -> Weighed:
    """Attention over all keys from that over some each."""
    if len(parts) == 1:
        return parts[0]
    sums = torch.stack([lse for _, lse in parts])
    total = sums.logsumexp(dim=0)
    shares = torch.exp(sums - total).nan_to_num(0.0).transpose(2, 3)[..., None]  # -inf - -inf where none is seen
    return (torch.stack([output for output, _ in parts]).float() * shares).sum(dim=0), total


def _hides_the_first(mask: torch.Tensor) -> bool:
    """Whether the oldest query of some sequence does not see the first slot of the mask, whatever windows hide."""
    oldest = mask[..., 0, 0]
    return not bool((oldest if oldest.dtype == torch.bool else oldest == 0).all())


def _check_slots(module: torch.nn.Module, tokens: int, mask: torch.Tensor | SlidingWindow | None) -> None:
    """Raise an `OctavoError` unless slots tell by which angles RoPE turned the keys of so many stored tokens."""
    if isinstance(mask, torch.Tensor) and _hides_the_first(mask):
        raise OctavoError(
            "this scheme stores K as before RoPE and serves no padding at the left; give such sequences one by one"
        )
    config = getattr(module, "config", None)
    most = None if config is None else steady_length(config, module.layer_idx)
    if most is not None and tokens > most:
        raise OctavoError(
            f"this scheme stores K as before RoPE, whose angles are others beyond {most} tokens (LongRoPE); give a "
            "scheme without 'before_rope', or shorter sequences"
        )


def _tokens_of(handle: Codes | Segments) -> int:
    return handle.total if hasattr(handle, "edges") else handle.first + handle.codes.shape[2]


def _over_stored(
    mask: torch.Tensor | SlidingWindow | None, keys: Codes | Segments, first: int, queries: int
) -> torch.Tensor | SlidingWindow | None:
    """The mask of a sliding layer over the slots from `first` on, those before which are forgotten.

    Its own columns end with the newest token and begin where the window of the oldest query does, or with slot 0.

    Raises:
        OctavoError: it shows a query a slot before `first`, or leaves out some that the window does not hide.
    """
    total = _tokens_of(keys)
    if not isinstance(mask, torch.Tensor):
        is_hidden = first <= max(0, total - queries + 1 - mask.size if mask is not None else 0)
    elif not keys.window or mask.dim() == 0 or mask.shape[-1] == 1:
        is_hidden = first == 0
    else:
        start = max(0, total - mask.shape[-1])
        if first < start <= max(0, total - queries + 1 - keys.window):
            return functional.pad(mask, (start - first, 0), value=False if mask.dtype == torch.bool else -torch.inf)
        before, mask = mask[..., : max(0, first - start)], mask[..., max(0, first - start) :]
        is_hidden = start == first or (
            start < first and not bool((before if mask.dtype == torch.bool else before == 0).any())
        )
    if not is_hidden:
        raise OctavoError(
            f"the mask does not go with a cache that has forgotten {first} tokens, as its config's sliding_window "
            f"({keys.window}) says: give it the config of this model, or one with sliding_window=None"
        )
    return mask


@without_autocast
def quantized_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Codes | Segments | torch.Tensor,
    value: Codes | Segments | torch.Tensor,
    attention_mask: torch.Tensor | SlidingWindow | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over what `QuantizedCache.update` returned.

    Float keys and values are what comes when something, a new version of transformers say, has put another cache or
    none in the place of ours: causal attention refuses them. That of an encoder beside the decoder is served.

    Args:
        module: the attention module, for its `is_causal`.
        query: `[B, H, Q, D]`.
        key, value: handles to `[B, G, S, D]`.
        attention_mask: True where a query sees a key, or additive; broadcastable to `[B, H, Q, S]`. What
            `causal_or_explicit_mask` made.

    Returns:
        `[B, Q, H, D]` and None in place of attention weights.

    Raises:
        OctavoError: an argument that the op does not serve, named; no codes.
    """
    if dropout or (module.training and torch.is_grad_enabled()):
        raise OctavoError("quantized attention is for inference and has no gradients: call model.eval()")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise OctavoError(f"quantized attention does not serve {name!r}, which this model's attention passes")
    if kwargs.get("output_attentions"):
        raise OctavoError("quantized attention returns no attention weights; leave output_attentions=False")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and isinstance(key, torch.Tensor):
        raise OctavoError(FLOATS_GIVEN)
    # Not `isinstance(key, Codes)`: another copy of this very code, beside another checkpoint, has a class of its own.
    keys = Codes(key) if isinstance(key, torch.Tensor) else key
    values = Codes(value) if isinstance(value, torch.Tensor) else value
    fold = getattr(module, FOLD, None)
    if keys.folded and fold is None:
        raise OctavoError(
            "the static scales of this cache are for keys and values without their biases; call "
            "octavo.prepare(model) first"
        )
    if keys.folded is False and fold is not None:
        raise OctavoError(
            "the scheme of this cache counts the biases of k and v in (fold_bias=False), and this model folds them; "
            "call set_attn_implementation on a model loaded anew instead of octavo.prepare"
        )
    if keys.before_rope:
        _check_slots(module, _tokens_of(keys), attention_mask)
    first = max(keys.first, values.first)
    attention_mask = _over_stored(attention_mask, keys, first, query.shape[2])
    is_plain = not any(hasattr(side, "edges") or side.decoder for side in (keys, values))
    call = _Call(
        as_stored_keys(query, keys),
        keys.query_scale,
        attention_mask if isinstance(attention_mask, torch.Tensor) else None,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal,
        attention_mask.size if isinstance(attention_mask, SlidingWindow) else 0,
        left_out_scores(query, keys, _tokens_of(keys), fold, kwargs.get("position_ids")),
        first,
    )
    output = call.codes(keys, values) if is_plain else call.segments(as_segments(keys), as_segments(values))
    output = as_values(output, values)
    if fold is not None:
        output = fold.with_value_bias(output)
    if torch.is_grad_enabled() and (query.requires_grad or getattr(keys, "wants_gradient", False)):
        output = refuse_gradient(output, query if query.requires_grad else None, "quantized attention")
    return output, None


def _sliding_window(mask_function: Callable) -> int:
    """The window of what `sliding_window_causal_mask_function` of transformers returns; 0 for every other function."""
    if mask_function.__code__ is not sliding_window_causal_mask_function(1).__code__:
        return 0
    parts = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return 0
    is_overlay = parts[0].__code__ is sliding_window_overlay(1).__code__
    return inspect.getclosurevars(parts[0]).nonlocals["sliding_window"] if is_overlay else 0


def _hides_nothing(padding: torch.Tensor | None) -> bool:
    """Whether a padding mask is known to hide no token; what it holds is not known to a graph that is compiled."""
    return padding is None or (not torch.compiler.is_compiling() and bool(padding.all()))


def _check_covers(mask: Any, past: int | torch.Tensor, new: int) -> None:
    """Raise an `OctavoError` if a padding mask `[B, S]` ends before the newest token, where the host knows how many.

    `generate` comes to that with a prompt that the cache it is given holds already, all of it or more.
    """
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and isinstance(past, int) and mask.shape[1] < past + new:
        raise OctavoError(
            f"attention_mask is of {mask.shape[1]} tokens, and {new} come to the {past} in the cache: call "
            "cache.reset() before the same prompt, give a new cache, or a mask of all tokens"
        )


def causal_or_explicit_mask(
    *args: Any,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | SlidingWindow | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | SlidingWindow | None:
    """No mask tensor where causality says it all, with a sliding window or without; otherwise SDPA's boolean one.

    Raises:
        OctavoError: a padding mask that does not cover the tokens stored and those that come.
    """
    _check_covers(attention_mask, kwargs.get("q_offset", 0), kwargs.get("q_length", 0))
    if isinstance(attention_mask, SlidingWindow):  # made ahead, and asked for again by a model of sliding layers alone
        return attention_mask
    if allow_is_causal_skip and _hides_nothing(attention_mask):
        if mask_function is causal_mask_function and local_size is None:
            return None
        # a graph cannot look into a function for its window
        if not torch.compiler.is_compiling() and (window := _sliding_window(mask_function)):
            return SlidingWindow(window)
    return sdpa_mask(
        *args,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def register_attention() -> None:
    """Make the attention function known to transformers under the name of this copy of the code."""
    AttentionInterface.register(NAMESPACE, quantized_attention)
    AttentionMaskInterface.register(NAMESPACE, causal_or_explicit_mask)


register_attention()
