"""Bytes of a KV cache, found by filling one on the meta device: its own code says them, and nothing is allocated.

B batch, G KV heads, S tokens, D head_dim.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedConfig

from ..common.runtime.cache.quantized_layer import QuantizedLayer
from ..common.runtime.cache.sliding import sliding_windows
from ..common.runtime.checkpoint.buffers import constant_shapes
from ..common.runtime.model_sizes import attention_sizes
from ..common.runtime.passes import tokens_of_chunk
from ..common.runtime.schemes.kv_scheme import CROP_ROOM, Scheme
from ..common.runtime.schemes.tensor_codec import Codec
from ..common.runtime.static_scales import LayerScales


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a cache over all layers and sequences.

    Attributes:
        kept: of what is in use: codes, scales, zeros, outliers, sinks, float windows, floats that a crop may need.
        allocated: of the storage that this lies in, which grows in steps of a quarter at most (`cache.nbytes()`).
        constants: of static scales, zeros, codebooks and bases, of which a layer has one set, whatever it holds.
    """

    kept: int
    allocated: int
    constants: int

    def __add__(self, other: "CacheSize") -> "CacheSize":
        return CacheSize(
            *(sum(pair) for pair in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )

    def times(self, layers: int, batch: int) -> "CacheSize":
        """The size of so many layers of so many sequences each."""
        return CacheSize(self.kept * layers * batch, self.allocated * layers * batch, self.constants * layers)


def _bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _empty_scales(scheme: Scheme, sizes: tuple[int, int, int]) -> tuple[LayerScales, int]:
    """Static scales of a layer on the meta device, and their bytes."""
    shapes = constant_shapes(scheme, *sizes)
    parts = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    key, value = (
        (parts[f"{side}_scale"], parts.get(f"{side}_zero")) if f"{side}_scale" in parts else None
        for side in ("key", "value")
    )
    levels = parts.get("key_levels"), parts.get("value_levels")
    return LayerScales(key, value, parts.get("query_scale"), *levels), _bytes(parts.values())


def _passes(scheme: Scheme, tokens: int, batch: int, window: int | None) -> tuple[int, ...]:
    """Tokens of the passes in which a prompt comes: chunks matter to layers that slide, whose storage forgets."""
    if window is None or scheme.prefill == "float" or scheme.smooth_key:
        return (tokens,)
    chunk = tokens_of_chunk(batch)
    whole, rest = divmod(tokens, chunk)
    return (chunk,) * whole + (rest,) * bool(rest)


def _settled(tokens: int, batch: int, capacity: int) -> int:
    """Fewer tokens behind which storage that slides is as large: whole chunks less, once it forgets at each."""
    chunk = tokens_of_chunk(batch)
    spare = tokens - 2 * (capacity + chunk)
    return tokens - max(0, spare) // chunk * chunk


def _plain_rule(codec: Codec | None) -> Codec | None:
    """A codec whose scales follow from the values as quickly as may be, which changes none of their sizes."""
    return codec if codec is None or codec.rule == "range" else dataclasses.replace(codec, rule="range")


@lru_cache(maxsize=4096)
def _layer_size(
    scheme: Scheme,
    window: int | None,
    sizes: tuple[int, int, int],
    passes: tuple[int, ...],
    dtype: torch.dtype,
    room: int,
) -> CacheSize:
    """The size of one layer of one sequence behind some passes."""
    _, kv_heads, head_dim = sizes
    scales, constants = _empty_scales(scheme, sizes)
    scheme = dataclasses.replace(
        scheme, key=_plain_rule(scheme.key), value=_plain_rule(scheme.value), center_key=False, key_basis="",
        value_basis="",
    )  # fmt: skip
    layer = QuantizedLayer(scheme, scales, None, torch.empty(head_dim // 2, device="meta"), room, window)
    stores = layer.key_store, layer.value_store
    for store in stores:
        store.expect(sum(passes))
    for tokens in passes:
        states = torch.empty((1, kv_heads, tokens, head_dim), dtype=dtype, device="meta")
        layer.update(states, states)
    kept = sum(_bytes(store.saved(sum(passes))[1].values()) for store in stores)
    return CacheSize(kept, sum(store.nbytes() for store in stores), constants)


def cache_size(
    config: PreTrainedConfig,
    scheme: Scheme,
    tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    crop_room: int = CROP_ROOM,
    settles: bool = False,
) -> CacheSize:
    """The size of a `QuantizedCache` that holds `tokens` tokens of each of `batch` sequences.

    Args:
        config: of the model; sizes of attention and which layers slide count.
        scheme: of the cache.
        tokens: of a prompt, in each sequence.
        batch: B.
        dtype: of the model's states, in which a cache of floats keeps them; windows and sinks are in 16 bits.
        crop_room: as of `QuantizedCache`.
        settles: whether `kept` of layers that slide may be that of fewer tokens, which is quicker; `allocated` is
            exact.
    """
    config = config.get_text_config(decoder=True)
    windows, sizes = sliding_windows(config), attention_sizes(config)
    scheme = scheme.counted(config.num_hidden_layers, windows)
    kinds = Counter((scheme.of_layer(index), window) for index, window in enumerate(windows))
    total = CacheSize(0, 0, 0)
    with torch.inference_mode():
        for (of_layer, window), count in kinds.items():
            length = tokens if window is None or not settles else _settled(tokens, batch, window + crop_room)
            passes = _passes(of_layer, length, batch, window)
            total += _layer_size(of_layer, window, sizes, passes, dtype, crop_room).times(count, batch)
    return total
