"""Storage of K or V where a layer keeps its first or newest tokens in float, or codes groups of tokens at a time.

B batch, G KV heads, S tokens, D head_dim.
"""

from collections.abc import Callable

import torch

from .codec import Codec
from .handles import Segments
from .scheme import Scheme
from .store import CodeStore


def _tokens(part: torch.Tensor | None) -> int:
    return 0 if part is None else part.shape[2]


class SegmentStore:
    """K or V of one layer: `sinks` float tokens, then codes, then a float window, as the scheme says.

    Args:
        scheme: of the layer; its sinks, window and groups of tokens count.
        codec: of this tensor.
        body: where the codes go.
    """

    def __init__(self, scheme: Scheme, codec: Codec | None, body: CodeStore) -> None:
        self.scheme, self.codec, self.body = scheme, codec, body
        self._front: torch.Tensor | None = None
        self._tail: torch.Tensor | None = None
        self._has_front = scheme.sinks > 0 and codec is not None
        self._is_delayed = codec is not None and (scheme.window > 0 or scheme.step(codec) > 1)

    @property
    def length(self) -> int:
        """Number of tokens stored."""
        return _tokens(self._front) + self.body.length + _tokens(self._tail)

    def allocate(self, like: torch.Tensor, tokens: int) -> None:
        """Make room for `tokens` tokens of the shape of `like`, `[B, G, *, D]`."""
        if self._tail is None:
            dtype = torch.float16 if like.dtype == torch.float32 else like.dtype
            self._tail = like.new_empty((*like.shape[:2], 0, like.shape[3]), dtype=dtype)
            self._front = self._tail if self._has_front else None
        self.body.check_room(tokens)
        self.body.allocate(like, self.scheme.coded(self.codec, tokens))

    def append(self, values: torch.Tensor) -> Segments:
        """Store new tokens `[B, G, S, D]`; return what this pass's queries read."""
        self.allocate(values, self.length + values.shape[2])
        if self._front is not None:
            missing = self.scheme.sinks - self._front.shape[2]
            self._front = torch.cat((self._front, values[:, :, :missing].to(self._front.dtype)), dim=2)
            values = values[:, :, missing:]
        tail = self._tail
        if self._is_delayed:
            tail = torch.cat((tail, values.to(tail.dtype)), dim=2)
            total = _tokens(self._front) + self.body.length + tail.shape[2]
            leaving = self.scheme.coded(self.codec, total) - self.body.length
            if leaving > 0:
                self.body.append(tail[:, :, :leaving])
            self._tail = tail[:, :, leaving:].clone() if leaving > 0 else tail
        elif values.shape[2]:
            self.body.append(values)
        return Segments(self._front, self.body.codes(), tail, self.length, self._coded)

    def _coded(self, tokens: int) -> int:
        return self.scheme.coded(self.codec, tokens) if self._is_delayed else self.body.length

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; those that were codes and belong to the float window now are decoded."""
        if length >= self.length:
            return
        front = min(_tokens(self._front), length)
        self._front = None if self._front is None else self._front[:, :, :front]
        if not self._is_delayed:
            self.body.crop(length - front)
            return
        coded = min(self.scheme.coded(self.codec, length), self.body.length)
        if coded < self.body.length:
            decoded = self.body.decoded(coded, self.body.length)
            self._tail = torch.cat((decoded.to(self._tail.dtype), self._tail), dim=2)
        self._tail = self._tail[:, :, : length - front - coded].clone()
        self.body.crop(coded)

    def map_storage(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As `CodeStore.map_storage`."""
        self.body.map_storage(change)
        self._tail = None if self._tail is None else change(self._tail)
        self._front = None if self._front is None else change(self._front)

    def parts(self) -> list[torch.Tensor]:
        """The storage tensors, `[B, G, *, *]`."""
        return [*(part for part in (self._front, self._tail) if part is not None), *self.body.parts()]

    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(part.untyped_storage().nbytes() for part in self.parts())

    def clear(self) -> None:
        """Forget all tokens."""
        self.body.clear()
        self._front = self._tail = None
