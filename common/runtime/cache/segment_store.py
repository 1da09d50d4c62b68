"""Storage of K or V where a layer keeps its first or newest tokens in float, or codes groups of tokens at a time.

B batch, G KV heads, S tokens, D head_dim.
"""

from collections.abc import Callable

import torch

from ...errors import OctavoError
from ..precision import kept_dtype
from ..schemes.kv_scheme import CROP_ROOM, Scheme
from ..schemes.tensor_codec import Codec
from .code_store import CodeStore
from .views import Codes, Segments


class SegmentStore:
    """K or V of one layer: `sinks` float tokens, then codes, then a float window, as the scheme says.

    Where tokens become codes later than they come, the floats of some tokens are kept beside their codes, so that after
    a crop the window is what it was: the tail begins where codes ended `crop_room` tokens ago.

    Where the layer slides, codes are forgotten as `CodeStore` does. The front, a few tokens, stays, and is read as long
    as a query sees it.

    Args:
        scheme: of the layer; its sinks, window and groups of tokens count.
        codec: of this tensor.
        body: where the codes go.
        crop_room: how many of the newest tokens can always be cropped.
    """

    def __init__(self, scheme: Scheme, codec: Codec | None, body: CodeStore, crop_room: int = CROP_ROOM) -> None:
        self.scheme, self.codec, self.body, self.crop_room = scheme, codec, body, crop_room
        self._front: torch.Tensor | None = None
        self._tail: torch.Tensor | None = None  # [B, G, capacity, D], of which `_kept` tokens are in use
        self._kept = 0
        self._offset = 0  # tokens between the front and the tail, all of them codes
        self._has_front = scheme.sinks > 0 and codec is not None
        self._is_delayed = scheme.is_delayed(codec)
        self._step = scheme.step(codec)
        self._handle: Codes | None = None  # of the codes as they were at `_handle_of`
        self._handle_of: tuple[torch.Tensor | None, int, int] = (None, 0, 0)

    @property
    def sinks(self) -> int:
        """Number of tokens in the front."""
        return 0 if self._front is None else self._front.shape[2]

    @property
    def first(self) -> int:
        """The slot from which on all tokens are stored."""
        return self.sinks + self.body.first if self.body.first else 0

    @property
    def length(self) -> int:
        """Number of tokens stored."""
        return self.sinks + (self._offset + self._kept if self._is_delayed else self.body.length)

    def expect(self, tokens: int) -> None:
        """As of `CodeStorage`."""
        self.body.expect(self.scheme.coded(self.codec, tokens))

    def _room(self) -> int:
        """Tokens that the storage of the tail holds: as many as are ever kept, and one that comes."""
        if not self._is_delayed:
            return 0
        most = self.scheme.window + self._step + self.crop_room
        return most if self.body.max_length is None else min(most, self.body.max_length)

    def allocate(self, like: torch.Tensor, tokens: int) -> None:
        """Make room for `tokens` tokens of the shape of `like`, `[B, G, *, D]`, and keep floats in its dtype."""
        self.body.check_room(tokens)
        self.body.allocate(like, self.scheme.coded(self.codec, tokens))
        dtype = kept_dtype(like.dtype)
        if self._tail is None:
            self._tail = self._new_tail(like, dtype)
            self._front = self._tail[:, :, :0].clone() if self._has_front else None
        elif self._tail.dtype != dtype:
            with torch.inference_mode(False):
                self._tail = self._tail.to(dtype)
            self._front = None if self._front is None else self._front.to(dtype)

    def _new_tail(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode(False):  # it outlives this pass, and a later one may write outside of that mode
            return like.new_empty((*like.shape[:2], self._room(), like.shape[3]), dtype=dtype)

    def append(self, values: torch.Tensor) -> Segments:
        """Store new tokens `[B, G, S, D]`; return what this pass's queries read."""
        if self._only_extends_tail(values):
            stop = self._kept + values.shape[2]
            self._tail[:, :, self._kept : stop] = values
            self._kept = stop
            return Segments(self._front, self._body(), self._tail[:, :, :stop], self.length, self._coded)
        self.allocate(values, self.length + values.shape[2])
        missing = self.scheme.sinks - self.sinks
        if self._front is not None and missing > 0:
            self._front = torch.cat((self._front, values[:, :, :missing].to(self._front.dtype)), dim=2)
            values = values[:, :, missing:]
        tail = self._tail[:, :, : self._kept]
        if self._is_delayed:
            tail = self._append_to_tail(values)
        elif values.shape[2]:
            self.body.append(values)
        return Segments(self._front, self._body(), tail, self.length, self._coded)

    def _only_extends_tail(self, values: torch.Tensor) -> bool:
        """Whether new tokens fit behind those in the tail, and no others become codes or leave it for that."""
        tail, most = self._tail, self.body.max_length
        if not self._is_delayed or tail is None or (self._has_front and self.sinks < self.scheme.sinks):
            return False
        stop, total = self._kept + values.shape[2], self.length + values.shape[2]
        return (
            stop <= tail.shape[2]
            and (most is None or total <= most)
            and tail.dtype == kept_dtype(values.dtype)
            and tail.shape[:2] == values.shape[:2]
            and tail.shape[3] == values.shape[3]
            and self._coded(total) == self.body.length
            and self._coded(total - self.crop_room) <= self._offset
        )

    def _body(self) -> Codes:
        """The codes, as the same views while they are the same."""
        body = self.body
        of = body.storage, body.length, body.forgotten
        if self._handle is None or self._handle_of[0] is not of[0] or self._handle_of[1:] != of[1:]:
            self._handle, self._handle_of = body.codes(), of
        return self._handle

    def _append_to_tail(self, values: torch.Tensor) -> torch.Tensor:
        """Code the tokens that are due; returns the tail before older tokens than may be needed again leave it."""
        stop = self._kept + values.shape[2]
        fits = stop <= self._tail.shape[2]
        if fits:
            self._tail[:, :, self._kept : stop] = values
            tail = self._tail[:, :, :stop]
        else:
            tail = torch.cat((self._tail[:, :, : self._kept], values.to(self._tail.dtype)), dim=2)
        self._kept = stop
        total, done = self.sinks + self._offset + stop, self.body.length
        due = self.scheme.coded(self.codec, total)
        if due > done:
            self.body.append(tail[:, :, done - self._offset : due - self._offset])
        leaving = max(0, self.scheme.coded(self.codec, total - self.crop_room) - self._offset)
        if leaving or not fits:  # into storage of its own: the queries of this pass read what was there before
            self._offset, self._kept = self._offset + leaving, stop - leaving
            self._tail = self._new_tail(tail, tail.dtype)
            self._tail[:, :, : self._kept] = tail[:, :, leaving:]
        return tail

    def _coded(self, tokens: int) -> int:
        if not self._is_delayed:
            return self.body.length
        return max(0, tokens - self.scheme.sinks - self.scheme.window) // self._step * self._step

    def shortest(self) -> int:
        """The length from which on each up to the present one can be cropped to; 0 can always be."""
        if not self._is_delayed or self._offset == 0:
            return 0
        return self.scheme.sinks + self.scheme.window + self._offset

    def can_crop(self, length: int) -> bool:
        """Whether all that is to be in float with `length` tokens is."""
        coded = self.scheme.coded(self.codec, length)
        return not self._is_delayed or self._offset <= coded or self.sinks + coded >= length

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, of which `can_crop` is true."""
        if length >= self.length:
            return
        front = min(self.sinks, length)
        self._front = None if self._front is None else self._front[:, :, :front].clone()
        if not self._is_delayed:
            self.body.crop(length - front)
            return
        coded = self.scheme.coded(self.codec, length)
        self.body.crop(min(coded, self.body.length))
        self._offset = min(self._offset, coded)
        self._kept = length - front - self._offset

    def trim(self) -> None:
        """As `CodeStore.trim`."""
        self.body.trim()

    def map_storage(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As `CodeStore.map_storage`."""
        self.body.map_storage(change)
        self._tail = None if self._tail is None else change(self._tail)
        self._front = None if self._front is None else change(self._front)

    def parts(self) -> list[torch.Tensor]:
        """The storage tensors, `[B, G, *, *]`."""
        return [*(part for part in (self._front, self._tail) if part is not None), *self.body.parts()]

    def saved(self, tokens: int) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """As `CodeStore.saved`."""
        counts, parts = self.body.saved(self.body.length)
        floats = {"front": self._front, "tail": None if self._tail is None else self._tail[:, :, : self._kept]}
        used = {name: part for name, part in floats.items() if part is not None} if tokens else {}
        return {**counts, "offset": self._offset, "tokens": tokens}, {**parts, **used}

    def restore(self, counts: dict[str, int], parts: dict[str, torch.Tensor], like: torch.Tensor) -> None:
        """As `CodeStore.restore`."""
        floats = {name: part for name, part in parts.items() if name in ("front", "tail")}
        self.body.restore(counts, {name: part for name, part in parts.items() if name not in floats}, like)
        if counts["tokens"] == 0:
            return
        tail, front = floats["tail"].to(like.device), floats.get("front")
        for name, part in floats.items():
            if part.shape[:2] != like.shape[:2] or part.shape[3] != like.shape[3] or part.shape[2] > counts["tokens"]:
                raise OctavoError(f"{name} of {tuple(part.shape)} is not of tokens of this model, {tuple(like.shape)}")
        self._tail = self._new_tail(like, tail.dtype)
        self._kept, self._offset = tail.shape[2], counts["offset"]
        self._tail[:, :, : self._kept] = tail
        self._front = None if front is None else front.to(like.device)

    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(part.untyped_storage().nbytes() for part in self.parts())

    def clear(self) -> None:
        """Forget all tokens."""
        self.body.clear()
        self._front = self._tail = None
        self._kept = self._offset = 0
