"""Storage of codes that grows: what one layer keeps of K, or of V.

B batch, G KV heads, S tokens, D head_dim, W groups of channels that have a scale of their own.
"""

import math
from collections.abc import Callable

import torch

from ..ops import encode, encode_token
from .attention import Codes
from .errors import OctavoError
from .scheme import Codec

SMALLEST_CAPACITY = 64
CAPACITY_STEP = 32
"""Storage is a multiple of it: the pages in which an Ascend NPU reads int8 codes are."""


def capacity_for(tokens: int) -> int:
    """The smallest storage size that holds `tokens`: 64, 96, 128, and then four sizes per power of two.

    Sizes grow geometrically, so that appending copies each token a bounded number of times, and never by more than a
    quarter beyond 128, so that little is left unused; powers of two are among them.
    """
    if tokens <= SMALLEST_CAPACITY:
        return SMALLEST_CAPACITY
    step = max(CAPACITY_STEP, 1 << (math.ceil(math.log2(tokens)) - 3))
    return -(-tokens // step) * step


class CodeStore:
    """The codes of K or of V of one layer, in storage `[B, G, capacity, D]` of which `length` tokens are in use.

    Args:
        codec: how values are coded; None stores them as they are.
        scales: static scale and zero of the codec, each of a shape broadcastable to `[G, 1, D]`; None where dynamic.
        max_length: allocate this many tokens at once and never grow; None grows as needed.
    """

    def __init__(
        self, codec: Codec | None, scales: tuple[torch.Tensor, torch.Tensor | None] | None, max_length: int | None
    ) -> None:
        self.codec = codec
        self.max_length = max_length
        self.length = 0
        self._static_scale, self._static_zero = scales if scales is not None else (None, None)
        self._codes: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None  # [B, G, capacity, W] where dynamic
        self._zero: torch.Tensor | None = None  # likewise, where affine

    def allocate(self, like: torch.Tensor, tokens: int) -> None:
        """Make room for `tokens` tokens in all, of the batch, heads, width and device of `like` (`[B, G, *, D]`)."""
        if self.max_length is not None and tokens > self.max_length:
            raise OctavoError(
                f"the cache holds max_length={self.max_length} tokens and {tokens} are needed; make it larger"
            )
        if self._codes is not None and self._codes.shape[:2] != like.shape[:2]:
            raise OctavoError(
                f"the cache holds {self._codes.shape[0]} sequences of {self._codes.shape[1]} heads, and "
                f"{like.shape[0]} of {like.shape[1]} come; use a new cache"
            )
        if self._codes is not None and tokens <= self._codes.shape[2]:
            return
        capacity = self.max_length if self.max_length is not None else capacity_for(tokens)
        width = like.shape[-1]

        def storage(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((*like.shape[:2], capacity, columns), dtype=dtype, device=like.device)

        if self.codec is None:
            self._codes = self._moved(self._codes, storage(width, like.dtype))
        else:
            self._codes = self._moved(self._codes, storage(self.codec.stored_width(width), self.codec.stored_dtype))
            if self.codec.dynamic:
                groups = self.codec.channel_groups(width)
                self._scale = self._moved(self._scale, storage(groups, torch.float32))
                if not self.codec.symmetric:
                    self._zero = self._moved(self._zero, storage(groups, torch.float32))
        if self._static_scale is not None:
            self._static_scale = self._static_scale.to(like.device)
            self._static_zero = None if self._static_zero is None else self._static_zero.to(like.device)

    def _moved(self, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        if old is not None and self.length > 0:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def append(self, values: torch.Tensor) -> None:
        """Encode new tokens `[B, G, S, D]` behind those that are stored."""
        start, stop = self.length, self.length + values.shape[2]
        self.allocate(values, stop)

        def new_part(storage: torch.Tensor | None) -> torch.Tensor | None:
            return None if storage is None else storage[:, :, start:stop]

        codes = self._codes[:, :, start:stop]
        if self.codec is None:
            codes.copy_(values)
        elif self.codec.dynamic:
            encode_token(values, codes, new_part(self._scale), new_part(self._zero))
        else:
            encode(values, self._static_scale, self._static_zero, codes)
        self.length = stop

    def write(self, values: torch.Tensor, position: torch.Tensor) -> None:
        """Encode new tokens `[B, G, S, D]` at `position`, int64 `[1]`, which stays on the device; storage is allocated.

        `length` does not count them.
        """
        if self.codec is None:
            tokens = position + torch.arange(values.shape[2], device=values.device)
            self._codes.index_copy_(2, tokens, values)
        elif self.codec.dynamic:
            encode_token(values, self._codes, self._scale, self._zero, position=position)
        else:
            encode(values, self._static_scale, self._static_zero, self._codes, position=position)

    def codes(self, length: torch.Tensor | None = None) -> Codes:
        """What is stored, as views: no copy, nothing decoded. With `length`, int64 `[1]`, the whole storage."""
        tokens = self.length if length is None else self._codes.shape[2]

        def in_use(storage: torch.Tensor | None, static: torch.Tensor | None) -> torch.Tensor | None:
            return static if storage is None else storage[:, :, :tokens]

        scale, zero = in_use(self._scale, self._static_scale), in_use(self._zero, self._static_zero)
        return Codes(self._codes[:, :, :tokens], scale, zero, length=length)

    def map_storage(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each storage tensor by `change(tensor)`: a selection along the batch, or a move to another device."""
        self._codes = change(self._codes)
        self._scale = None if self._scale is None else change(self._scale)
        self._zero = None if self._zero is None else change(self._zero)

    def parts(self) -> list[torch.Tensor]:
        """The storage tensors: codes, and where dynamic their scales and zeros, `[B, G, capacity, *]`."""
        return [part for part in (self._codes, self._scale, self._zero) if part is not None]

    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(part.untyped_storage().nbytes() for part in self.parts())

    def clear(self) -> None:
        """Forget all tokens, and the storage unless it is of a fixed length."""
        self.length = 0
        if self.max_length is None:
            self._codes = self._scale = self._zero = None
