"""The KV cache that encodes each token once and hands out codes, never a decoded copy.

B batch, G KV heads, S tokens, D head_dim. `attention.py` has the function that reads the codes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from ...errors import OctavoError
from ..model_sizes import check_cache_sizes, head_dim_of
from ..precision import without_autocast
from ..rotary import hadamard, rope_constants
from ..schemes.kv_scheme import CROP_ROOM, Scheme, load_scheme
from ..schemes.tensor_codec import Codec
from ..static_scales import LayerScales, Scales, load_statistics, scales_of
from .code_store import CodeStore
from .segment_store import SegmentStore
from .views import Codes, Segments


def _wants_gradient(key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)


class QuantizedLayer(CacheLayerMixin):
    """The cache of one decoder layer, with the whole contract of `transformers`' cache layers on codes."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        scheme: Scheme,
        scales: LayerScales | None = None,
        max_length: int | None = None,
        frequencies: torch.Tensor | None = None,
        crop_room: int = CROP_ROOM,
    ) -> None:
        super().__init__()
        scales = scales or LayerScales()
        self.scheme = scheme
        self.max_length = max_length
        self.crop_room = crop_room
        self.is_folded = scales.folded
        self.key_store = self._store(
            scheme.key, CodeStore(scheme.key, scales.key, max_length, scales.key_levels, frequencies, scheme.sinks)
        )
        self.value_store = self._store(
            scheme.value, CodeStore(scheme.value, scales.value, max_length, scales.value_levels)
        )
        self.query_scale = scales.query if scheme.query is not None else None
        if scheme.query is not None and scheme.query.fixed_scale:
            self.query_scale = torch.full((1, 1, 1), scheme.query.fixed_scale)
        self._key_mean: torch.Tensor | None = None  # [B, G, 1, D], where the scheme smooths K
        self._mean_of = 0  # tokens that it is the mean of

    def _store(self, codec: Codec | None, codes: CodeStore) -> CodeStore | SegmentStore:
        return SegmentStore(self.scheme, codec, codes, self.crop_room) if self.scheme.is_segmented else codes

    def __repr__(self) -> str:
        return f"QuantizedLayer(scheme={self.scheme.name!r}, length={self.get_seq_length()})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate storage of the shapes, dtype and device of the first `[B, G, S, D]` states."""
        self.device = key_states.device
        self.key_store.allocate(key_states, key_states.shape[2])
        self.value_store.allocate(value_states, value_states.shape[2])
        if self.query_scale is not None:
            self.query_scale = self.query_scale.to(self.device)
        self.is_initialized = True

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
        return keys, values

    def _prepared_key(self, states: torch.Tensor) -> torch.Tensor:
        """K as it is stored: without its mean and rotated, where the scheme says so."""
        if self.scheme.smooth_key:
            if self._key_mean is None:
                self._key_mean = states.mean(dim=2, keepdim=True, dtype=torch.float32).to(states.dtype)
                self._mean_of = states.shape[2]
            states = states - self._key_mean.to(states.dtype)
        return hadamard(states) if self.scheme.rotate_key else states

    def _prepared_value(self, states: torch.Tensor) -> torch.Tensor:
        return hadamard(states) if self.scheme.rotate_value else states

    def _handles(self, keys: Codes | Segments, values: Codes | Segments) -> tuple[Codes | Segments, Codes | Segments]:
        body = keys if isinstance(keys, Codes) else keys.body
        body.query_scale = self.query_scale
        body.before_rope = self.scheme.key is not None and self.scheme.key.before_rope
        keys.rotated, values.rotated = self.scheme.rotate_key, self.scheme.rotate_value
        keys.folded = True if self.is_folded else None if self.scheme.fold_bias else False
        return keys, values

    def get_seq_length(self) -> int:
        """Number of tokens stored."""
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
        return self.get_seq_length() + query_length, 0

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
        if not all(store.can_crop(length) for store in stores):
            most = present - max(store.shortest() for store in stores)
            raise OctavoError(
                f"crop({tokens_to_remove}): crop_room={self.crop_room} keeps floats for {most} tokens to be removed, "
                f"not {present - length}; make the cache with crop_room={present - length} (QuantizedCache, or "
                "model.new_cache of a converted model), or give a new one the tokens that stay"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens (a negative number, as in transformers).

        What is left is what would be there had they never come.

        Raises:
            OctavoError: a number above 0; more tokens than `crop_room` keeps floats for; some, but not all, of the
                first pass of a scheme with `smooth_key`. Nothing is changed then.
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


class QuantizedCache(Cache):
    """A cache that stores codes, for any decoder-only model of transformers that attends over all tokens.

    Two lines make a stock model use it: `prepare(model)` of `folds.py`, and then
    `model.generate(..., cache=QuantizedCache(model.config, scheme="int8-token"))`.

    Args:
        config: the model's config.
        scheme: name of a preset, or a `Scheme`.
        statistics: file of calibration statistics, from which a static scheme takes its scales.
        scales: the scales themselves, one `LayerScales` per layer, instead of statistics.
        max_length: allocate room for this many tokens at once and never move; None grows geometrically.
        offloading: keep on the accelerator only the layer in use (as in `DynamicCache`).
        compileable: count the tokens on the device, so that `torch.compile` and CUDA graphs serve every step with one
            graph; needs `max_length`, and nobody checks that the tokens fit.
        crop_room: how many of the newest tokens `crop` can always remove, as speculative decoding does with those that
            it rejects. Schemes that code tokens later than they come keep the floats of so many beside their codes, in
            16 bits; the others can be cropped anywhere.

    Raises:
        OctavoError: unknown scheme; a static scheme without statistics; statistics of another model; layers that the
            cache does not serve (linear attention).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        scheme: str | Scheme = "int8-token",
        statistics: str | Path | None = None,
        scales: Scales | None = None,
        max_length: int | None = None,
        offloading: bool = False,
        compileable: bool = False,
        crop_room: int = CROP_ROOM,
    ) -> None:
        if type(crop_room) is not int or crop_room < 0:
            raise OctavoError(f"crop_room={crop_room!r} is no number of tokens, 0 for none")
        if compileable and (max_length is None or offloading):
            raise OctavoError("compileable=True needs max_length, and excludes offloading")
        model_config, config = config, config.get_text_config(decoder=True)
        self.scheme = load_scheme(scheme)
        others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if others:
            raise OctavoError(
                f"QuantizedCache serves attention over k and v; this model has {', '.join(sorted(others))}"
            )
        check_cache_sizes(config)
        count = config.num_hidden_layers
        if self.scheme.layers_named > count:
            raise OctavoError(
                f"scheme {self.scheme.name}: names layer {self.scheme.layers_named - 1} of a model of {count} layers"
            )
        if scales is None and self.scheme.is_static:
            if statistics is None:
                raise OctavoError(
                    f"scheme {self.scheme.name} has static scales; pass statistics=FILE, which --save_statistics writes"
                )
            found = load_statistics(statistics)
            found.check_model(model_config)
            scales = scales_of(self.scheme, found)
        if scales is not None and len(scales) != count:
            raise OctavoError(f"there are scales for {len(scales)} layers and the model has {count}: another model's?")
        layer_class = StaticQuantizedLayer if compileable else QuantizedLayer
        layers = [
            layer_class(
                self.scheme.of_layer(index),
                scales[index] if scales else None,
                max_length,
                rope_constants(config, head_dim_of(config), index)[0],
                crop_room,
            )
            for index in range(count)
        ]
        super().__init__(layers=layers, offloading=offloading)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens in every layer, or in none, as `QuantizedLayer.crop` says."""
        amount = int(tokens_to_remove)  # a tensor in some versions of transformers
        for layer in self.layers:
            layer.check_crop(amount)
        super().crop(amount)

    def nbytes(self) -> int:
        """Bytes allocated for codes and dynamic scales, unused capacity included."""
        return sum(layer.key_store.nbytes() + layer.value_store.nbytes() for layer in self.layers)
