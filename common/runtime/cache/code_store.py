"""Storage of codes that grows: what one layer keeps of K, or of V.

B batch, G KV heads, S tokens, D head_dim, W groups of channels that have a scale of their own.
"""

import copy
import math
from collections.abc import Callable

import torch

from ....ops import decode, encode, encode_token
from ....ops.shared.codes import LARGEST_ZERO
from ...errors import OctavoError
from ..rotary import rotated_by_slot
from ..schemes.tensor_codec import Codec
from .dynamic_scales import gaussian_levels, group_scale, llamacpp_codes
from .sliding import Sliding
from .views import Codes

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


def split_outliers(
    values: torch.Tensor, distance: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take out the `count` values of each token and head that lie farthest out.

    Args:
        values: float32 `[B, G, S, D]`.
        distance: how far out each is, of the same shape.

    Returns:
        values with the mean of their token in those places; the outliers, float16 `[B, G, S, count]`; and their
        channels, uint8.
    """
    channels = distance.topk(count, dim=-1).indices
    outliers = values.gather(-1, channels)
    rest = (values.sum(dim=-1, keepdim=True) - outliers.sum(dim=-1, keepdim=True)) / (values.shape[-1] - count)
    return values.scatter(-1, channels, rest.expand_as(outliers)), outliers.half(), channels.to(torch.uint8)


class CodeStore:
    """The codes of K or of V of one layer, in storage `[B, G, capacity, D]`.

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
        if codec is not None and codec.fixed_scale:
            scales = torch.full((1, 1, 1), codec.fixed_scale), None
        self._static_scale, self._static_zero = scales if scales is not None else (None, None)
        self._levels, self._frequencies = levels, frequencies
        self._codes: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None  # [B, G, capacity / token group, W] where dynamic
        self._zero: torch.Tensor | None = None  # likewise, where affine
        self._outliers: torch.Tensor | None = None  # [B, G, capacity, outliers] float16, where the codec keeps some
        self._channels: torch.Tensor | None = None  # their channels, uint8

    @property
    def _group(self) -> int:
        return 1 if self.codec is None else self.codec.token_group

    def check_room(self, tokens: int) -> None:
        """Raise an `OctavoError` if a storage of fixed length does not hold so many tokens."""
        if self.max_length is not None and tokens > self.max_length:
            raise OctavoError(
                f"the cache holds max_length={self.max_length} tokens and {tokens} are needed; make it larger"
            )

    def allocate(self, like: torch.Tensor, tokens: int) -> None:
        """Make room for `tokens` tokens in all, of the batch, heads, head_dim and device of `like` (`[B, G, *, D]`).

        Without a codec the storage takes the dtype of `like`, so that no pass reads a mixture.

        Raises:
            OctavoError: they do not fit into a fixed length, or are of another batch, or of other heads.
        """
        self.check_room(tokens)
        if self._codes is None:
            self._create(like, self._capacity_for(tokens - self.forgotten))
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
            self._move(self._capacity_for(tokens - first), first)

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
            self._scale = empty(capacity // self._group, num_groups, dtype)
            self._zero = empty(capacity // self._group, num_groups, dtype) if self.codec.has_zero else None
        if self.codec.outliers:
            self._outliers = empty(capacity, self.codec.outliers, torch.float16)
            self._channels = empty(capacity, self.codec.outliers, torch.uint8)
        if self.codec.levels == "gaussian":
            self._levels = gaussian_levels(self.codec.bits, like.device)
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

    def append(self, values: torch.Tensor) -> Codes:
        """Encode new tokens `[B, G, S, D]`, S a multiple of the codec's token group, behind those that are stored.

        Returns:
            a handle to all that is stored then.
        """
        self.allocate(values, self.length + values.shape[2])
        start = self.length - self.forgotten
        stop = start + values.shape[2]
        codes, codec = self._codes[:, :, start:stop], self.codec
        if codec is None:
            codes.copy_(values)
        elif codec.dynamic and codec.is_native and codec.rule == "range" and codec.token_group == 1:
            encode_token(values, codes, self._of(self._scale, start, stop), self._of(self._zero, start, stop))
        elif not codec.dynamic and codec.is_native:
            encode(values, self._static_scale, self._static_zero, codes)
        else:
            self._encode(values.float(), start, stop)
        self.length += values.shape[2]
        return self.codes()

    def _of(self, part: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
        """Rows of a scale, zero or list of outliers that belong to rows `start:stop` of codes, whole groups."""
        if part is None:
            return None
        return part[:, :, start // self._group : -(-stop // self._group)]

    def _slot(self, row: int) -> int:
        """The slot of a row of the storage."""
        return self.first_slot + self.forgotten + row

    def _encode(self, values: torch.Tensor, start: int, stop: int) -> None:
        """Encode `[B, G, S, D]` float32 in PyTorch's terms: what no fused op does in one."""
        codec = self.codec
        if codec.before_rope:
            values = rotated_by_slot(values, self._frequencies, self._slot(start), backwards=True)
        if codec.outliers:
            if codec.dynamic:
                distance = (values - values.mean(dim=-1, keepdim=True)).abs()
            else:
                distance = (values / self._static_scale + (0 if self._static_zero is None else self._static_zero)).abs()
            values, outliers, channels = split_outliers(values, distance, codec.outliers)
            self._of(self._outliers, start, stop).copy_(outliers)
            self._of(self._channels, start, stop).copy_(channels)
        codes = self._codes[:, :, start:stop]
        if codec.rule == "llamacpp":
            self._encode_llamacpp(values, start, stop)
            return
        if not codec.dynamic:
            encode(values, self._static_scale, self._static_zero, codes, bits=codec.bits, levels=self._levels)
            return
        group = codec.token_group
        if group > 1:
            groups = values.unflatten(2, (-1, group)).transpose(-1, -2)  # [B, G, T, D, group]
        else:
            groups = values.unflatten(-1, (codec.channel_groups(values.shape[-1]), -1))  # [B, G, S, W, n]
        scale, zero = group_scale(codec, groups)
        self._of(self._scale, start, stop).copy_(scale)
        if zero is not None:
            self._of(self._zero, start, stop).copy_(zero)
            zero = zero.float()
        scale = scale.float()
        if group > 1:  # groups of tokens take the place of heads, so that each has one scale for all of its tokens
            values = values.flatten(0, 1).unflatten(1, (-1, group))
            codes = codes.flatten(0, 1).unflatten(1, (-1, group))
            scale = scale.flatten(0, 1)[:, :, None]
            zero = None if zero is None else zero.flatten(0, 1)[:, :, None]
        encode(values, scale, zero, codes, bits=codec.bits, levels=self._levels)

    def _encode_llamacpp(self, values: torch.Tensor, start: int, stop: int) -> None:
        codec = self.codec
        groups = values.unflatten(-1, (codec.channel_groups(values.shape[-1]), -1))
        codes, scale, minimum = llamacpp_codes(groups, codec.bits, codec.has_zero)
        if codec.has_zero:  # x = d * (code + 8) + m; of a d of nearly 0 nothing is left beside m, so x = m * (-8 + 9)
            is_flat = minimum.float().abs() >= scale.float() * LARGEST_ZERO
            zero = torch.where(is_flat, -9.0, -8 - minimum.float() / scale.float())
            self._of(self._zero, start, stop).copy_(zero)
            codes = torch.where(is_flat[..., None], -8.0, codes)
            scale = torch.where(is_flat, minimum, scale)
        self._of(self._scale, start, stop).copy_(scale)
        one = torch.ones(1, device=values.device)
        encode(codes.flatten(-2), one, None, self._codes[:, :, start:stop])

    def write(self, values: torch.Tensor, position: torch.Tensor) -> None:
        """Encode new tokens `[B, G, S, D]` at `position`, int64 `[1]`, which stays on the device; storage is allocated.

        `length` does not count them. Without a codec they take the dtype of the storage, which does not move.
        """
        if self.codec is None:
            tokens = position + torch.arange(values.shape[2], device=values.device)
            self._codes.index_copy_(2, tokens, values.to(self._codes.dtype))
        elif self.codec.dynamic:
            encode_token(values, self._codes, self._scale, self._zero, position=position)
        else:
            encode(values, self._static_scale, self._static_zero, self._codes, position=position)

    def decoded(self, start: int, stop: int) -> torch.Tensor:
        """The values that rows `start:stop` of codes, whole groups, stand for: float32 `[B, G, S, D]`."""
        codes, codec = self._codes[:, :, start:stop], self.codec
        if codec is None:
            return codes.float()
        scale = self._static_scale if self._scale is None else self._of(self._scale, start, stop)
        zero = self._static_zero if self._scale is None else self._of(self._zero, start, stop)
        values = decode(codes, scale, zero, codec.token_group, bits=codec.bits, levels=self._levels)
        if codec.outliers:
            channels = self._of(self._channels, start, stop).long()
            values.scatter_(-1, channels, self._of(self._outliers, start, stop).float())
        if codec.before_rope:
            values = rotated_by_slot(values, self._frequencies, self._slot(start))
        return values

    def codes(self, length: torch.Tensor | None = None) -> Codes:
        """What is stored, as views: no copy, nothing decoded. With `length`, int64 `[1]`, the whole storage."""
        rows = self.length - self.forgotten if length is None else self._codes.shape[2]

        def in_use(storage: torch.Tensor | None, static: torch.Tensor | None) -> torch.Tensor | None:
            return static if storage is None else self._of(storage, 0, rows)

        scale, zero = in_use(self._scale, self._static_scale), in_use(self._zero, self._static_zero)
        decoder = None
        if self.codec is not None and not self.codec.is_native:
            as_it_is = self if self.sliding is None else copy.copy(self)  # its storage may be another after this pass
            decoder = as_it_is.decoded
        codes = self._codes[:, :, :rows]
        return Codes(codes, scale, zero, length=length, group=self._group, first=self.forgotten, decoder=decoder)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; what is forgotten of them does not come back."""
        self.length, self.forgotten = length, min(self.forgotten, length)

    def map_storage(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each storage tensor by `change(tensor)`: a selection along the batch, or a move to another device."""
        for name in ("_codes", "_scale", "_zero", "_outliers", "_channels"):
            part = getattr(self, name)
            setattr(self, name, None if part is None else change(part))

    def parts(self) -> list[torch.Tensor]:
        """The storage tensors: codes, and where there are any scales, zeros, outliers, `[B, G, capacity, *]`."""
        parts = (self._codes, self._scale, self._zero, self._outliers, self._channels)
        return [part for part in parts if part is not None]

    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(part.untyped_storage().nbytes() for part in self.parts())

    def clear(self) -> None:
        """Forget all tokens, and the storage unless it is of a fixed length."""
        self.length = self.forgotten = 0
        if self.max_length is None:
            self._codes = self._scale = self._zero = self._outliers = self._channels = None
