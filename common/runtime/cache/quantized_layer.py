"""The cache of one decoder layer: transformers' contract on codes.

B batch, G KV heads, S tokens, D head_dim. `attention.py` has the function that reads the codes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ...errors import OctavoError
from ..key_center import KeyCenter
from ..precision import without_autocast
from ..rotary import basis_of, hadamard
from ..schemes.kv_scheme import CROP_ROOM, Scheme
from ..schemes.tensor_codec import Codec
from ..static_scales import LayerScales
from .cache_file import Tensors, constants_of, named, part_of
from .code_store import CodeStore
from .segment_store import SegmentStore
from .sliding import Sliding
from .views import Codes, Segments


def _wants_gradient(key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)


class QuantizedLayer(CacheLayerMixin):
    """The cache of one decoder layer, with the whole contract of `transformers`' cache layers on codes.

    Args:
        scheme: of this layer.
        scales: its static scales, where the scheme has any.
        max_length, crop_room: as in `QuantizedCache`.
        frequencies: angles per token of the rotary pairs `[D / 2]`.
        window: newest tokens that a query sees, of which the layer keeps as many as it needs (`Sliding`); None: all.
    """

    is_croppable = True

    def __init__(
        self,
        scheme: Scheme,
        scales: LayerScales | None = None,
        max_length: int | None = None,
        frequencies: torch.Tensor | None = None,
        crop_room: int = CROP_ROOM,
        window: int | None = None,
    ) -> None:
        super().__init__()
        scales = scales or LayerScales()
        self.scheme = scheme
        self.max_length = max_length
        self.crop_room = crop_room
        self._scales, self.is_folded = scales, scales.folded
        self._frequencies = torch.zeros(0) if frequencies is None else frequencies
        step = max(scheme.step(scheme.key), scheme.step(scheme.value))
        self.sliding = None if window is None else Sliding(window, crop_room, step)
        self.window, self.is_sliding = window, window is not None
        self.key_store = self._store(scheme.key, scales.key, scales.key_levels, frequencies, scheme.sinks)
        self.value_store = self._store(scheme.value, scales.value, scales.value_levels)
        self.query_scale = scales.query if scheme.query is not None else None
        if scheme.query is not None and scheme.query.fixed_scale:
            self.query_scale = torch.full((1, 1, 1), scheme.query.fixed_scale)
        self._center = self._key_basis = self._value_basis = None
        if scheme.center_key and scales.key_mean is not None:
            self._center = KeyCenter(scales.key_mean, self._frequencies)
        if scheme.key_basis and scales.key_basis is not None:
            self._key_basis = basis_of(scales.key_basis)
        if scheme.value_basis and scales.value_basis is not None:
            self._value_basis = basis_of(scales.value_basis)
        self._key_mean: torch.Tensor | None = None  # [B, G, 1, D], where the scheme smooths K
        self._mean_of = 0  # tokens that it is the mean of

    def _store(
        self,
        codec: Codec | None,
        scales: tuple[torch.Tensor, torch.Tensor | None] | None,
        levels: torch.Tensor | None,
        frequencies: torch.Tensor | None = None,
        first_slot: int = 0,
    ) -> CodeStore | SegmentStore:
        sliding = self.sliding
        if sliding is not None and self.scheme.is_delayed(codec):  # so many tokens behind the codes are still floats
            sliding = dataclasses.replace(sliding, window=sliding.window - self.scheme.window)
        codes = CodeStore(codec, scales, self.max_length, levels, frequencies, first_slot, sliding)
        return SegmentStore(self.scheme, codec, codes, self.crop_room) if self.scheme.is_segmented else codes

    def __repr__(self) -> str:
        return f"QuantizedLayer(scheme={self.scheme.name!r}, length={self.get_seq_length()})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate storage of the shapes, dtype and device of the first `[B, G, S, D]` states."""
        self._check_bases()
        self.device = key_states.device
        self.key_store.allocate(key_states, key_states.shape[2])
        self.value_store.allocate(value_states, value_states.shape[2])
        if self.query_scale is not None:
            self.query_scale = self.query_scale.to(self.device)
        self.is_initialized = True

    def _check_bases(self) -> None:
        """Raise an `OctavoError` if the scales lack a mean or a basis that the scheme stores K or V by."""
        scheme = self.scheme
        for field, wanted, found in (
            ("center_key", scheme.center_key, self._center),
            ("key_basis", scheme.key_basis, self._key_basis),
            ("value_basis", scheme.value_basis, self._value_basis),
        ):
            if wanted and found is None:
                raise OctavoError(
                    f"scheme {scheme.name}: the scales of this cache hold nothing for {field!r}; give statistics= of a "
                    "calibration for it"
                )

    @without_autocast
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[Codes | Segments, Codes | Segments]:
        """Encode and append new `[B, G, S, D]` states; return handles to all codes, for the attention function.

        With `prefill="float"` the first call hands out the states themselves, and only later ones the codes.
        """
        wants_gradient = _wants_gradient(key_states, value_states)
        key_states, value_states = key_states.detach(), value_states.detach()  # storage would hold the graph
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        is_first = self.key_store.length == 0
        keys = self.key_store.append(self._prepared_key(key_states))
        values = self.value_store.append(self._prepared_value(value_states))
        if is_first and self.scheme.prefill == "float":
            keys, values = Codes(key_states), Codes(value_states)
        else:
            keys, values = self._handles(keys, values)
        keys.wants_gradient = wants_gradient
        self.key_store.trim()
        self.value_store.trim()
        return keys, values

    def _prepared_key(self, states: torch.Tensor) -> torch.Tensor:
        """K as it is stored: without its mean, and rotated or in a basis, where the scheme says so."""
        if self.scheme.center_key:
            states = self._center.left_out(states, self.key_store.length).to(states.dtype)
        if self.scheme.smooth_key:
            if self._key_mean is None:
                self._key_mean = states.mean(dim=2, keepdim=True, dtype=torch.float32).to(states.dtype)
                self._mean_of = states.shape[2]
            states = states - self._key_mean.to(states.dtype)
        if self.scheme.key_basis:
            return self._key_basis.of(states)
        return hadamard(states) if self.scheme.rotate_key else states

    def _prepared_value(self, states: torch.Tensor) -> torch.Tensor:
        if self.scheme.value_basis:
            return self._value_basis.of(states)
        return hadamard(states) if self.scheme.rotate_value else states

    def _handles(self, keys: Codes | Segments, values: Codes | Segments) -> tuple[Codes | Segments, Codes | Segments]:
        body = keys if isinstance(keys, Codes) else keys.body
        body.query_scale = self.query_scale
        body.window = 0 if self.sliding is None else self.sliding.window
        body.before_rope = self.scheme.key is not None and self.scheme.key.before_rope
        keys.rotated, values.rotated = self.scheme.rotate_key, self.scheme.rotate_value
        keys.center = self._center
        for handle, basis in ((keys, self._key_basis), (values, self._value_basis)):
            handle.dual = None if basis is None else basis.inverse(self.device)
        keys.folded = True if self.is_folded else None if self.scheme.fold_bias else False
        return keys, values

    def get_seq_length(self) -> int:
        """Number of tokens that came, of which a sliding layer keeps the newest."""
        return self.key_store.length

    def get_max_length(self) -> int:
        """Number of tokens that fit, or -1 if there is no limit."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `query_length` new tokens covers."""
        if query_length == 0:
            raise OctavoError(
                f"no token comes that is not in the cache, which holds {self.get_seq_length()}: call cache.reset() "
                "before the same prompt, or give a new cache"
            )
        past = self.get_seq_length()
        offset = 0 if self.sliding is None else max(0, past + 1 - self.sliding.window)
        return past + query_length - offset, offset

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise an `OctavoError` if `crop` could not leave what would be there had those tokens never come."""
        if tokens_to_remove > 0:
            raise OctavoError(
                f"crop({tokens_to_remove}): takes the number of tokens to remove as a negative integer, "
                f"crop({-tokens_to_remove})"
            )
        present = self.get_seq_length()
        length = max(0, present + tokens_to_remove)
        if self._key_mean is not None and 0 < length < self._mean_of:
            raise OctavoError(
                f"crop({tokens_to_remove}): scheme {self.scheme.name} stores k less the mean of the first "
                f"{self._mean_of} tokens ('smooth_key'), of which some would go; remove all, or use a new cache"
            )
        stores = [part for part in (self.key_store, self.value_store) if isinstance(part, SegmentStore)]
        shortest = max((store.shortest() for store in stores), default=0)
        self._check_room(all(store.can_crop(length) for store in stores), present, length, shortest, "floats")
        if self.sliding is not None:
            shortest = self.sliding.shortest(max(self.key_store.first, self.value_store.first))
            kept = f"enough beside a sliding window of {self.sliding.window}"
            self._check_room(not 0 < length < shortest, present, length, shortest, kept)

    def _check_room(self, is_kept: bool, present: int, length: int, shortest: int, what: str) -> None:
        if not is_kept:
            raise OctavoError(
                f"crop({length - present}): crop_room={self.crop_room} keeps {what} for {present - shortest} tokens to "
                f"be removed, not {present - length}; make the cache with crop_room={present - length} "
                "(QuantizedCache, or model.new_cache of a converted model), or give a new one the tokens that stay"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens (a negative number, as in transformers).

        What is left is what would be there had they never come.

        Raises:
            OctavoError: a number above 0; more tokens than `crop_room` keeps floats, or a sliding window, for; some,
                but not all, of the first pass of a scheme with `smooth_key`. Nothing is changed then.
        """
        self.check_crop(tokens_to_remove)
        length = max(0, self.get_seq_length() + int(tokens_to_remove))
        self.key_store.crop(length)
        self.value_store.crop(length)
        if length == 0:
            self._key_mean = None

    def reset(self) -> None:
        """Forget all tokens."""
        self.key_store.clear()
        self.value_store.clear()
        self._key_mean = None
        self.is_initialized = self.max_length is not None and self.is_initialized

    def _map_storage(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.inference_mode(False):  # storage outlives the mode it is changed in
            self.key_store.map_storage(change)
            self.value_store.map_storage(change)
            self._key_mean = None if self._key_mean is None else change(self._key_mean)

    def saved(self) -> tuple[dict[str, Any], Tensors]:
        """Counts and tensors from which `restore` makes this layer again, its constants included."""
        tokens = int(self.get_seq_length())
        key_counts, keys = self.key_store.saved(tokens)
        value_counts, values = self.value_store.saved(tokens)
        counts = {"key": key_counts, "value": value_counts, "mean_of": self._mean_of, "folded": self.is_folded}
        counts["window"] = self.window
        others = {"frequencies": self._frequencies}
        if self._key_mean is not None:
            others["key_mean"] = self._key_mean
        return counts, {**named("key.", keys), **named("value.", values), **constants_of(self._scales), **others}

    def restore(self, counts: dict[str, Any], tensors: Tensors, like: torch.Tensor) -> None:
        """The inverse of `saved`, of an empty layer, for tokens like `[B, G, 0, D]`.

        Raises:
            OctavoError: the tensors are not of such tokens.
        """
        self.device = like.device
        self.key_store.restore(counts["key"], part_of(tensors, "key."), like)
        self.value_store.restore(counts["value"], part_of(tensors, "value."), like)
        if self.key_store.length != self.value_store.length:
            raise OctavoError(f"there are {self.key_store.length} keys and {self.value_store.length} values")
        self._key_mean = tensors["key_mean"].to(like.device) if "key_mean" in tensors else None
        self._mean_of = counts["mean_of"]
        if self.query_scale is not None:
            self.query_scale = self.query_scale.to(like.device)
        self.is_initialized = self.key_store.length > 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` of the batch becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self._map_storage(lambda storage: storage.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of the batch that `indices` (integers or booleans) names, in that order."""
        self._map_storage(lambda storage: storage[indices.to(storage.device)])

    def offload(self) -> None:
        """Move the codes to the CPU."""
        self._map_storage(lambda storage: storage.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the codes back to the device of the layer."""
        self._map_storage(lambda storage: storage.to(self.device, non_blocking=True))


class StaticQuantizedLayer(QuantizedLayer):
    """A layer of a fixed length that counts its tokens on the device, for `torch.compile` and CUDA graphs.

    As in transformers' static cache, nothing checks that the tokens fit: the host does not know how many there are.
    Nor does it forget: its storage stays where it is and as large as it is.
    """

    is_compileable = True

    def __init__(self, scheme: Scheme, scales: LayerScales | None, max_length: int, *args: Any) -> None:
        if not scheme.is_compileable:
            raise OctavoError(
                f"compileable=True: scheme {scheme.name} keeps tokens in float, decodes codes or has a rule of scales "
                "that no op encodes by; leave it out"
            )
        super().__init__(scheme, scales, max_length, *args)
        self.cumulative_length = torch.zeros(1, dtype=torch.int64)
        self.is_first = True  # the next update, as far as the host knows: it cannot ask how many tokens there are

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As in `QuantizedLayer`; addresses of storage and count are marked as constant for CUDA graphs."""
        super().lazy_initialization(key_states, value_states)
        with torch.inference_mode(False):  # it outlives this pass, and a later one may count outside of that mode
            self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            self._mark_addresses()

    def _mark_addresses(self) -> None:
        for part in (*self.key_store.parts(), *self.value_store.parts(), self.cumulative_length):
            torch._dynamo.mark_static_address(part)

    @without_autocast
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[Codes | Segments, Codes | Segments]:
        """Encode and append new `[B, G, S, D]` states; return handles to the whole storage with its length."""
        wants_gradient = _wants_gradient(key_states, value_states)
        key_states, value_states = key_states.detach(), value_states.detach()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.key_store.write(self._prepared_key(key_states), self.cumulative_length)
        self.value_store.write(self._prepared_value(value_states), self.cumulative_length)
        self.cumulative_length.add_(key_states.shape[2])
        is_first, self.is_first = self.is_first, False
        length = self.cumulative_length
        if is_first and self.scheme.prefill == "float":
            keys, values = Codes(key_states), Codes(value_states)
        else:
            keys, values = self._handles(self.key_store.codes(length), self.value_store.codes(length))
        keys.wants_gradient = wants_gradient
        return keys, values

    def restore(self, counts: dict[str, Any], tensors: Tensors, like: torch.Tensor) -> None:
        """As in `QuantizedLayer`."""
        super().restore(counts, tensors, like)
        tokens = self.key_store.length
        self.key_store.length = self.value_store.length = 0  # the device counts them
        self.cumulative_length = torch.tensor([tokens], device=like.device)
        self.is_first = tokens == 0
        if self.is_initialized:
            self._mark_addresses()

    def get_seq_length(self) -> int | torch.Tensor:
        """Number of tokens stored, on the device."""
        return self.cumulative_length[0] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers: all that there is room for."""
        return self.max_length, 0

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise an `OctavoError` of a number above 0; every other crop can be served."""
        if tokens_to_remove > 0:
            super().check_crop(tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens (a negative number, as in transformers)."""
        self.check_crop(tokens_to_remove)
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
        if self.scheme.prefill == "float":  # else nothing asks, and the host need not wait for the device
            self.is_first = not self.cumulative_length.item()

    def reset(self) -> None:
        """Forget all tokens."""
        self.cumulative_length.zero_()
        self.is_initialized, self.is_first = False, True
