"""The KV cache that encodes each token once and hands out codes, never a decoded copy.

B batch, G KV heads, S tokens, D head_dim. Importing this module registers the attention function that reads the codes.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from ..ops import encode, encode_token
from .attention import Codes, register_attention
from .errors import OctavoError
from .scheme import Codec, Scheme, load_scheme
from .statistics import LayerScales, Scales, load_statistics, scales_of

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


def head_dim_of(config: PreTrainedConfig) -> int:
    """D of a model: what its config says, or the hidden size shared among the query heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_bytes_per_token(config: PreTrainedConfig, scheme: Scheme, float_bytes: int) -> int:
    """Bytes that one token takes in the cache, over all layers."""
    values = config.num_key_value_heads * head_dim_of(config)
    total = 0
    for index in range(config.num_hidden_layers):
        part = scheme.of_layer(index)
        for codec in (part.key, part.value):
            total += values * (float_bytes if codec is None else 1)
            total += 4 * config.num_key_value_heads if codec is not None and codec.dynamic else 0
    return total


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
        self._scale: torch.Tensor | None = None  # [B, G, capacity, 1] where dynamic

    @property
    def _is_dynamic(self) -> bool:
        return self.codec is not None and self.codec.dynamic

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
        batch, heads, _, width = like.shape
        dtype = like.dtype if self.codec is None else torch.int8
        self._codes = self._moved(
            self._codes, torch.empty((batch, heads, capacity, width), dtype=dtype, device=like.device)
        )
        if self._is_dynamic:
            scale = torch.empty((batch, heads, capacity, 1), dtype=torch.float32, device=like.device)
            self._scale = self._moved(self._scale, scale)
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
        codes = self._codes[:, :, start:stop]
        if self.codec is None:
            codes.copy_(values)
        elif self.codec.dynamic:
            encode_token(values, codes, self._scale[:, :, start:stop])
        else:
            encode(values, self._static_scale, self._static_zero, codes)
        self.length = stop

    def codes(self) -> Codes:
        """What is stored, as views: no copy, nothing decoded."""
        scale = self._scale[:, :, : self.length] if self._is_dynamic else self._static_scale
        return Codes(self._codes[:, :, : self.length], scale, self._static_zero)

    def map_storage(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each storage tensor by `change(tensor)`: a selection along the batch, or a move to another device."""
        self._codes = change(self._codes)
        if self._scale is not None:
            self._scale = change(self._scale)

    def parts(self) -> list[torch.Tensor]:
        """The storage tensors: codes, and where dynamic their scales, `[B, G, capacity, D or 1]`."""
        return [part for part in (self._codes, self._scale) if part is not None]

    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(part.untyped_storage().nbytes() for part in self.parts())

    def clear(self) -> None:
        """Forget all tokens, and the storage unless it is of a fixed length."""
        self.length = 0
        if self.max_length is None:
            self._codes = self._scale = None


class QuantizedLayer(CacheLayerMixin):
    """The cache of one decoder layer, with the whole contract of `transformers`' cache layers on codes."""

    is_sliding = False
    is_croppable = True

    def __init__(self, scheme: Scheme, scales: LayerScales | None = None, max_length: int | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self.max_length = max_length
        self.key_store = CodeStore(scheme.key, scales.key if scales else None, max_length)
        self.value_store = CodeStore(scheme.value, scales.value if scales else None, max_length)
        self.query_scale = scales.query if scales and scheme.query is not None else None

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

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[Codes, Codes] | tuple[torch.Tensor, torch.Tensor]:
        """Encode and append new `[B, G, S, D]` states; return handles to all codes, for the attention function.

        With `prefill="float"` the first call returns the states themselves, and only later ones the codes.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        is_first = self.key_store.length == 0
        self.key_store.append(key_states)
        self.value_store.append(value_states)
        if is_first and self.scheme.prefill == "float":
            return key_states, value_states
        keys = self.key_store.codes()
        keys.query_scale = self.query_scale
        return keys, self.value_store.codes()

    def get_seq_length(self) -> int:
        """Number of tokens stored."""
        return self.key_store.length

    def get_max_length(self) -> int:
        """Number of tokens that fit, or -1 if there is no limit."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `query_length` new tokens covers."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens (a negative number, as in transformers)."""
        if tokens_to_remove > 0:
            raise OctavoError("crop takes the number of tokens to remove as a negative integer")
        length = max(0, self.get_seq_length() + tokens_to_remove)
        self.key_store.length = self.value_store.length = length

    def reset(self) -> None:
        """Forget all tokens."""
        self.key_store.clear()
        self.value_store.clear()
        self.is_initialized = self.max_length is not None and self.is_initialized

    def _map_storage(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.key_store.map_storage(change)
            self.value_store.map_storage(change)

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


class QuantizedCache(Cache):
    """A cache that stores codes, for any decoder-only model of transformers that attends over all tokens.

    Two lines make a stock model use it: `model.set_attn_implementation("octavo")`, and then
    `model.generate(..., past_key_values=QuantizedCache(model.config, scheme="int8-token"))`.

    Args:
        config: the model's config.
        scheme: name of a preset, or a `Scheme`.
        statistics: file of calibration statistics, from which a static scheme takes its scales.
        scales: the scales themselves, one `LayerScales` per layer, instead of statistics.
        max_length: allocate room for this many tokens at once and never move; None grows geometrically.
        offloading: keep on the accelerator only the layer in use (as in `DynamicCache`).

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
    ) -> None:
        config = config.get_text_config(decoder=True)
        self.scheme = load_scheme(scheme)
        others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if others:
            raise OctavoError(
                f"QuantizedCache serves attention over k and v; this model has {', '.join(sorted(others))}"
            )
        count = config.num_hidden_layers
        if scales is None and self.scheme.is_static:
            if statistics is None:
                raise OctavoError(
                    f"scheme {self.scheme.name} has static scales; pass statistics=FILE, which --save_statistics writes"
                )
            scales = scales_of(self.scheme, load_statistics(statistics))
        if scales is not None and len(scales) != count:
            raise OctavoError(f"there are scales for {len(scales)} layers and the model has {count}: another model's?")
        layers = [
            QuantizedLayer(self.scheme.of_layer(index), scales[index] if scales else None, max_length)
            for index in range(count)
        ]
        super().__init__(layers=layers, offloading=offloading)

    def nbytes(self) -> int:
        """Bytes allocated for codes and dynamic scales, unused capacity included."""
        return sum(layer.key_store.nbytes() + layer.value_store.nbytes() for layer in self.layers)


register_attention()
