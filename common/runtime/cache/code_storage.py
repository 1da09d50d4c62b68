"""Storage of codes: tensors that grow, forget what no query will see, and are saved and restored.

B batch, G KV heads, S tokens, D head_dim, W groups of channels that have a scale of their own.
"""

import math
from collections.abc import Callable

import torch

from ...errors import OctavoError
from ..schemes.tensor_codec import Codec
from .dynamic_scales import known_levels
from .sliding import STORAGE_STEP, Sliding

SMALLEST_CAPACITY = 64
_STORAGE_PARTS = ("codes", "scale", "zero", "signs", "residual", "outliers", "channels", "second", "wide")


def capacity_for(tokens: int) -> int:
    """The smallest storage size that holds `tokens`: 64, 96, 128, and then four sizes per power of two.

    Sizes grow geometrically, so that appending copies each token a bounded number of times, and never by more than a
    quarter beyond 128, so that little is left unused; powers of two are among them.
    """
    if tokens <= SMALLEST_CAPACITY:
        return SMALLEST_CAPACITY
    step = max(STORAGE_STEP, 1 << (math.ceil(math.log2(tokens)) - 3))
    return -(-tokens // step) * step


class CodeStorage:
    """Where the codes of K or of V of one layer lie, `[B, G, capacity, D]`, with all that belongs to them.

    Of `length` tokens the first `forgotten` are stored no longer: token n lies in row `n - forgotten`.

    Args:
        codec: how values are coded; None stores them as they are.
        scales: static scale and zero of the codec, each of a shape broadcastable to `[G, 1, D]`; None where dynamic.
        max_length: allocate this many tokens at once and never grow; None grows as needed.
        levels: codebook of a codec with calibrated levels, float32 `[2**bits]`.
        frequencies: angles per slot of the rotary pairs `[D / 2]`, for a codec that stores K as before RoPE.
        first_slot: tokens of a sequence that come before those of this storage, its sinks.
        sliding: which tokens need not be kept; None keeps all.
    """

    def __init__(
        self,
        codec: Codec | None,
        scales: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        max_length: int | None = None,
        levels: torch.Tensor | None = None,
        frequencies: torch.Tensor | None = None,
        first_slot: int = 0,
        sliding: Sliding | None = None,
    ) -> None:
        self.codec = codec
        self.first_slot = first_slot
        self.max_length = max_length
        self.sliding = sliding
        self.length = self.forgotten = 0
        self._expected = 0
        if codec is not None and codec.fixed_scale and not codec.dynamic:
            scales = torch.full((1, 1, 1), codec.fixed_scale), None
        self._static_scale, self._static_zero = scales if scales is not None else (None, None)
        self._levels, self._frequencies = levels, frequencies
        self._codes: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None  # [B, G, capacity / scale group, W] where dynamic
        self._zero: torch.Tensor | None = None  # likewise, where affine
        self._signs: torch.Tensor | None = None  # [B, G, capacity, D / 8] uint8, where codes leave a sign
        self._residual: torch.Tensor | None = None  # the scales of the signs, as `_scale`
        self._outliers: torch.Tensor | None = None  # [B, G, capacity, outliers] float16, where the codec keeps some
        self._channels: torch.Tensor | None = None  # their channels, or those of wider codes of a group, uint8
        self._second: torch.Tensor | None = None  # [B, G, capacity, 1] or [B, G, capacity / tile, D], of a tile
        self._wide: torch.Tensor | None = None  # [B, G, capacity / scale group, *] uint8, the bits of wider codes

    @property
    def _group(self) -> int:
        return 1 if self.codec is None else self.codec.token_group

    @property
    def storage(self) -> torch.Tensor | None:
        """Where the codes lie, another tensor once they have been moved."""
        return self._codes

    def check_room(self, tokens: int) -> None:
        """Raise an `OctavoError` if a storage of fixed length does not hold so many tokens."""
        if self.max_length is not None and tokens > self.max_length:
            raise OctavoError(
                f"the cache holds max_length={self.max_length} tokens and {tokens} are needed; make it larger"
            )

    def expect(self, tokens: int) -> None:
        """Be told how many tokens there will be soon, in all: room that is made for fewer is made for so many at once.

        A sliding storage makes room for those it keeps.
        """
        self._expected = tokens

    def allocate(self, like: torch.Tensor, tokens: int) -> None:
        """Make room for `tokens` tokens in all, of the batch, heads, head_dim and device of `like` (`[B, G, *, D]`).

        Without a codec the storage takes the dtype of `like`, so that no pass reads a mixture.

        Raises:
            OctavoError: they do not fit into a fixed length, or are of another batch, or of other heads.
        """
        self.check_room(tokens)
        if self._codes is None:
            self._create(like, self._capacity_for(self._with_expected(tokens) - self.forgotten))
            return
        self._check_fits(like)
        if self.codec is None:
            with torch.inference_mode(False):
                self._codes = self._codes.to(like.dtype)
        capacity, first = self._codes.shape[2], self._first_needed()
        if tokens - self.forgotten <= capacity:
            return
        if tokens - first <= capacity:
            self._drop_before(first)
        else:
            self._move(self._capacity_for(self._with_expected(tokens) - first), first)

    def _with_expected(self, tokens: int) -> int:
        return tokens if self.sliding is not None else max(tokens, self._expected)

    def _check_fits(self, like: torch.Tensor) -> None:
        head_dim = like.shape[-1]
        columns = head_dim if self.codec is None else self.codec.stored_width(head_dim)
        if self._codes.shape[:2] != like.shape[:2] or self._codes.shape[3] != columns:
            raise OctavoError(
                f"the cache holds {self._codes.shape[0]} sequences of {self._codes.shape[1]} heads in "
                f"{self._codes.shape[3]} columns, and {like.shape[0]} of {like.shape[1]} in {columns} come; use a new "
                "cache"
            )

    def _capacity_for(self, tokens: int) -> int:
        """Rows of storage for `tokens` tokens: whole groups."""
        most = None if self.sliding is None else self.sliding.capacity
        if self.max_length is None:
            rows = capacity_for(tokens)
            rows = rows if most is None or tokens > most else min(rows, most)
        else:
            rows = self.max_length if most is None else min(self.max_length, max(most, tokens))
        return -(-rows // self._group) * self._group

    def _create(self, like: torch.Tensor, capacity: int) -> None:
        head_dim = like.shape[-1]

        def empty(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
            with torch.inference_mode(False):  # it outlives this pass, and a later one may write outside of that mode
                return torch.empty((*like.shape[:2], rows, columns), dtype=dtype, device=like.device)

        if self.codec is None:
            self._codes = empty(capacity, head_dim, like.dtype)
            return
        self._codes = empty(capacity, self.codec.stored_width(head_dim), self.codec.stored_dtype)
        if self.codec.dynamic:
            num_groups, dtype = self.codec.channel_groups(head_dim), self.codec.stored_scale_dtype
            rows = capacity // self.codec.scale_group
            self._scale = empty(rows, num_groups, dtype)
            self._zero = empty(rows, num_groups, dtype) if self.codec.has_zero else None
            tokens, seconds = self.codec.second_scales(head_dim)
            self._second = empty(capacity // tokens, seconds, dtype) if seconds else None
            wide = self.codec.wide_channels(head_dim)
            if wide:
                self._channels = empty(rows, wide, torch.uint8)
                self._wide = empty(rows, wide * self.codec.scale_group * self.codec.wide_bits // 8, torch.uint8)
        if self.codec.residual_sign:
            self._signs = empty(capacity, head_dim // 8, torch.uint8)
            self._residual = empty(capacity, num_groups, dtype)
        if self.codec.outliers:
            self._outliers = empty(capacity, self.codec.outliers, torch.float16)
            self._channels = empty(capacity, self.codec.outliers, torch.uint8)
        if self.codec.levels != "calibrated":
            self._levels = known_levels(self.codec, like.device)
        for name in ("_static_scale", "_static_zero", "_levels", "_frequencies"):
            part = getattr(self, name)
            setattr(self, name, None if part is None else part.to(like.device))

    def _first_needed(self) -> int:
        """The oldest token that has to be kept, with those that are stored now."""
        needed = 0 if self.sliding is None else self.sliding.first_needed(self.length)
        return max(self.forgotten, needed)

    def _move(self, capacity: int, first: int) -> None:
        """Move to storage of `capacity` rows; of the tokens before `first` nothing is kept."""
        before = self._codes.shape[2]
        start, stop = first - self.forgotten, self.length - self.forgotten

        def moved(old: torch.Tensor) -> torch.Tensor:
            group = before // old.shape[2]  # tokens of a row
            with torch.inference_mode(False):
                new = old.new_empty((*old.shape[:2], capacity // group, old.shape[3]))
            kept = old[:, :, start // group : -(-stop // group)]
            new[:, :, : kept.shape[2]] = kept
            return new

        self.map_storage(moved)
        self.forgotten = first

    def _drop_before(self, first: int) -> None:
        """Forget the tokens before `first`, within the same storage, whose other tokens move to the front."""
        amount, kept = first - self.forgotten, self.length - first
        for part in self.parts():
            group = self._codes.shape[2] // part.shape[2]
            shift, rows = amount // group, -(-kept // group)
            for to in range(0, rows, shift):  # no further than what it reads is away
                last = min(to + shift, rows)
                part[:, :, to:last] = part[:, :, to + shift : last + shift]
        self.forgotten = first

    def trim(self) -> None:
        """Give back storage that a long pass needed and later ones do not. Handles of that pass stay what they are."""
        if self.sliding is None or self._codes is None:
            return
        capacity = self._capacity_for(self.sliding.capacity)
        if self._codes.shape[2] > capacity:
            self._move(capacity, self._first_needed())

    @property
    def first(self) -> int:
        """The oldest token that is stored."""
        return self.forgotten

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; what is forgotten of them does not come back."""
        self.length, self.forgotten = length, min(self.forgotten, length)

    def map_storage(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each storage tensor by `change(tensor)`: a selection along the batch, or a move to another device."""
        for name in _STORAGE_PARTS:
            part = getattr(self, f"_{name}")
            setattr(self, f"_{name}", None if part is None else change(part))

    def parts(self) -> list[torch.Tensor]:
        """The storage tensors: codes, and what there is beside them, `[B, G, capacity / tokens of a row, *]`."""
        return list(self._named_parts().values())

    def _named_parts(self) -> dict[str, torch.Tensor]:
        parts = {name: getattr(self, f"_{name}") for name in _STORAGE_PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    def saved(self, tokens: int) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """Counts and views from which `restore` makes the same storage again, of `tokens` tokens in all."""
        if tokens == 0:
            return {"length": 0, "forgotten": 0, "capacity": 0}, {}
        counts = {"length": tokens, "forgotten": self.forgotten, "capacity": self._codes.shape[2]}
        parts = {name: self._of_rows(part, tokens - self.forgotten) for name, part in self._named_parts().items()}
        return counts, parts

    def _of_rows(self, part: torch.Tensor, rows: int) -> torch.Tensor:
        """What belongs to the first `rows` rows of codes, of any storage tensor."""
        return part[:, :, : -(-rows // (self._codes.shape[2] // part.shape[2]))]

    def restore(self, counts: dict[str, int], parts: dict[str, torch.Tensor], like: torch.Tensor) -> None:
        """The inverse of `saved`, of an empty store, for tokens like `[B, G, 0, D]`.

        Raises:
            OctavoError: the tensors are not of such tokens.
        """
        self.length, self.forgotten = counts["length"], counts["forgotten"]
        if self.length == 0:
            return
        like = like.to(parts["codes"].dtype) if self.codec is None else like
        self._create(like, counts["capacity"])
        storage = self._named_parts()
        if storage.keys() != parts.keys():
            raise OctavoError(f"tensors {sorted(parts)} are not those of the scheme, {sorted(storage)}")
        for name, part in parts.items():
            rows = self._of_rows(storage[name], self.length - self.forgotten)
            if (rows.shape, rows.dtype) != (part.shape, part.dtype):
                raise OctavoError(f"{name} of {tuple(part.shape)} is not of tokens of this model, {tuple(rows.shape)}")
            rows.copy_(part)

    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(part.untyped_storage().nbytes() for part in self.parts())

    def clear(self) -> None:
        """Forget all tokens, and the storage unless it is of a fixed length."""
        self.length = self.forgotten = self._expected = 0
        if self.max_length is None:
            self.map_storage(lambda part: None)
