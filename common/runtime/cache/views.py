"""What attention is handed: in place of K or V codes, or segments of codes and of floats.

B batch, G KV heads, S tokens, D head_dim. Slots count the tokens of a sequence from 0, padding included.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch

from ....ops.shared.registry import NAMESPACE
from ...errors import OctavoError
from ..key_center import KeyCenter

FOLD = "octavo_fold"
"""Attribute of an attention module whose biases are folded (`bias_fold.py`)."""
NO_TENSOR = (
    "a quantized cache hands out codes, which have no {!r}; call octavo.prepare(model) first, or "
    f"model.set_attn_implementation({NAMESPACE!r}), which leaves biases of k in the cache; a model for which that was "
    "done computes with keys and values by itself, and is not served"
)


def _refuse_function(function: Callable) -> NoReturn:
    """What a function of torch runs into that takes codes for a tensor."""
    raise OctavoError(NO_TENSOR.format(getattr(function, "__name__", function)))


@dataclass
class Codes:
    """Views of the stored codes and what decodes them.

    Attributes:
        codes: `[B, G, S, D]` as `ops/shared/codes.py` says, or float values where the scheme leaves them in float.
        scale, zero: as the attention op takes them; None where not used.
        query_scale: with K only, `[H or 1, 1, 1]`: scale by which the queries are quantized; None leaves them in float.
        length: int64 `[1]` on the device, where not all of the S tokens are in use; None where they are.
        group, bits, levels: as the attention op takes them.
        first: tokens that came before these and are forgotten, since no query sees them.
        window: tokens that a query sees, of a layer that forgets the others; 0: all.
        decoder: where the attention op does not read such codes, the float32 values `[B, G, *, D]` of rows from, to.
        rotated: whether the values are rotated by `hadamard`.
        dual: with `[G, D, D]`, what undoes the basis that the values are in: queries are multiplied by its transpose,
            which is K's business, and outputs by itself, V's; None where channels are as they were.
        center: of K, what brings back the mean that is left out; None where nothing is.
        folded: whether the values have to be without the bias of their projection; None where either serves.
        before_rope: whether K is stored as it was before RoPE, by slots, which padding at the left would shift.
        wants_gradient: whether the states of this pass require a gradient, which codes do not pass on.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None
    length: torch.Tensor | None = None
    group: int = 1
    first: int = 0
    window: int = 0
    decoder: Callable[[int, int], torch.Tensor] | None = None
    rotated: bool = False
    dual: torch.Tensor | None = None
    center: KeyCenter | None = None
    folded: bool | None = None
    before_rope: bool = False
    wants_gradient: bool = False
    bits: int = 4
    levels: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """What another attention function runs into when it takes codes for a tensor."""
        raise AttributeError(NO_TENSOR.format(name))

    @classmethod
    def __torch_function__(cls, function: Callable, *_: Any, **__: Any) -> NoReturn:
        """Likewise by a function of torch."""
        _refuse_function(function)

    def part(self, start: int, stop: int) -> "Codes":
        """Rows `start:stop` of the codes, of which `start` is a multiple of the group."""
        if start == 0 and stop == self.codes.shape[2]:
            return self

        def rows(part: torch.Tensor | None) -> torch.Tensor | None:
            if part is None or part.dim() < 4 or part.shape[-2] == 1:
                return part
            return part[:, :, start // self.group : -(-stop // self.group)]

        codes = self.codes[:, :, start:stop]
        return dataclasses.replace(self, codes=codes, scale=rows(self.scale), zero=rows(self.zero), decoder=None)


@dataclass
class Segments:
    """K or V of a layer that keeps some tokens in float, or codes that have to be decoded.

    Attributes:
        front: `[B, G, *, D]`, the first tokens in float, or None. It stays when no query sees it any more.
        body: the codes of the tokens that follow, but those that are forgotten.
        tail: `[B, G, *, D]`, in float, up to the newest token: all that were before this pass, and this pass's.
        total: tokens stored.
        coded: of a number of tokens, those behind the front that are codes once so many are stored.
        rotated, dual, center, folded, wants_gradient: as in `Codes`.
    """

    front: torch.Tensor | None
    body: Codes
    tail: torch.Tensor
    total: int
    coded: Callable[[int], int]
    rotated: bool = False
    folded: bool | None = None
    wants_gradient: bool = False
    dual: torch.Tensor | None = None
    center: KeyCenter | None = None

    def __getattr__(self, name: str) -> Any:
        """As in `Codes`."""
        raise AttributeError(NO_TENSOR.format(name))

    @classmethod
    def __torch_function__(cls, function: Callable, *_: Any, **__: Any) -> NoReturn:
        """As in `Codes`."""
        _refuse_function(function)

    @property
    def query_scale(self) -> torch.Tensor | None:
        """As in `Codes`."""
        return self.body.query_scale

    @property
    def window(self) -> int:
        """As in `Codes`."""
        return self.body.window

    @property
    def before_rope(self) -> bool:
        """As in `Codes`."""
        return self.body.before_rope

    @property
    def decoder(self) -> Callable[[int, int], torch.Tensor] | None:
        """As in `Codes`."""
        return self.body.decoder

    @property
    def start(self) -> int:
        """The slot of the first token of the body that is stored."""
        return self.body.first + (0 if self.front is None else self.front.shape[2])

    @property
    def first(self) -> int:
        """The slot from which on all tokens are stored."""
        return self.start if self.body.first else 0

    def edges(self, tokens: int) -> tuple[int, int]:
        """Slots where codes begin and end, as a query sees them after which `tokens` tokens are stored."""
        first = 0 if self.front is None else self.front.shape[2]
        return first, first + self.coded(tokens)

    def strips(self, oldest: int, seen: int) -> tuple[torch.Tensor | None, Codes, torch.Tensor | None]:
        """Slots `oldest:seen` as a query sees them after which `seen` tokens are stored: floats, codes and floats."""
        front, begin, offset = None, self.start, self.total - self.tail.shape[2]
        first, last = self.edges(seen)
        start = max(first, oldest)
        last = max(start, min(last, seen))
        if oldest < first:
            front = self.front if oldest == 0 and first <= seen else self.front[:, :, oldest : min(first, seen)]
        tail = self.tail[:, :, last - offset : seen - offset] if last < seen else None
        return front, self.body.part(start - begin, last - begin), tail

    def floats(self, start: int, stop: int) -> torch.Tensor:
        """Slots `start:stop` of the front or of the tail."""
        if self.front is not None and stop <= self.front.shape[2]:
            return self.front[:, :, start:stop]
        offset = self.total - self.tail.shape[2]
        return self.tail[:, :, start - offset : stop - offset]


def as_segments(handle: Codes | Segments) -> Segments:
    """Codes as a single segment."""
    if hasattr(handle, "edges"):
        return handle
    total = handle.first + handle.codes.shape[2]
    return Segments(None, handle, handle.codes[:, :, :0], total, lambda _: total)


@dataclass(frozen=True)
class Piece:
    """Queries and keys that one call of the op serves.

    Attributes:
        queries: of this pass, from and to.
        seen: tokens stored after the last of these queries.
        slots: of K and V, from and to, which lie in one segment of each.
    """

    queries: tuple[int, int]
    seen: int
    slots: tuple[int, int]


def runs(keys: Segments, values: Segments, queries: int) -> Iterator[tuple[int, int]]:
    """Runs of queries that see the same tokens as codes: how many tokens are stored before and after each."""

    def edges(tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return keys.edges(tokens), values.edges(tokens)

    start = keys.total - queries
    if queries == 1:
        yield start, keys.total
        return
    while start < keys.total:
        low, high = start + 1, keys.total + 1  # the edges at `low` are those at start + 1, those at `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            if edges(middle) == edges(start + 1):
                low = middle
            else:
                high = middle
        yield start, low
        start = low


def block_size(keys: Segments, values: Segments, most: int) -> int:
    """Tokens that are decoded at a time, at most `most`: whole groups of K and of V, of which one divides the other."""
    group = max(keys.body.group, values.body.group)
    return max(group, most // group * group)


def pieces(keys: Segments, values: Segments, queries: int, block: int) -> list[Piece]:
    """The calls that serve the newest `queries` tokens, by slot; codes that have to be decoded in blocks of `block`.

    They leave out the tokens that K or V has forgotten.
    """
    result = []
    before = keys.total - queries
    oldest = max(keys.first, values.first)
    for start, seen in runs(keys, values, queries):
        cuts = {oldest, seen}
        for side in (keys, values):
            first, last = side.edges(seen)
            cuts |= {first, last, *(range(side.start + block, last, block) if side.decoder is not None else ())}
        slots = sorted(cut for cut in cuts if oldest <= cut <= seen)
        chosen = (start - before, seen - before)
        result += [Piece(chosen, seen, pair) for pair in pairwise(slots)]
    return sorted(result, key=lambda piece: piece.slots)
