"""The parts of a cache that a decoder's layers read and write, for passes through all of them in one call."""

from typing import Any
from weakref import ref

import torch

from ...ops.attention.call import Coded
from ...ops.decoder.call import DecoderLayer, LayerBiases
from ...ops.decoder.cpu import PackedLayer, pack_layer, pack_layers
from ...ops.shared.codes import FP8_DTYPES
from .cache.code_store import CodeStore
from .cache.quantized_cache import QuantizedCache
from .cache.quantized_layer import QuantizedLayer
from .cache.views import FOLD
from .fused_decoder import FusedDecoder
from .fused_layers import NotFused


def _serves_store(store: Any) -> bool:
    """Whether the kernel encodes into a store."""
    if type(store) is not CodeStore:
        return False
    return store.codec is None or store.codec.is_one_op


def serves_layer(layer: QuantizedLayer) -> bool:
    """Whether the kernel encodes and reads what a layer of a cache stores."""
    scheme = layer.scheme
    if (
        scheme.prefill == "float"
        or scheme.smooth_key
        or scheme.has_bases
        or not all(map(_serves_store, (layer.key_store, layer.value_store)))
    ):
        return False
    is_fp8 = scheme.key is not None and scheme.key.stored_dtype in FP8_DTYPES
    return not (scheme.query is not None and is_fp8)


def _stores(cache: QuantizedCache) -> list[CodeStore]:
    return [store for layer in cache.layers for store in (layer.key_store, layer.value_store)]


def _refusal(fused: FusedDecoder, cache: QuantizedCache) -> str | None:
    """Why layers and cache do not belong together, or None. What is wrong with that, the modules know."""
    if len(cache.layers) != len(fused.plain):
        return "the cache is of another number of layers"
    if [layer.window for layer in cache.layers] != fused.windows:
        return "the layers of the cache slide otherwise"
    for layer, attention in zip(cache.layers, fused.attentions, strict=True):
        is_folding = hasattr(attention, FOLD)
        if layer.is_folded != is_folding and (layer.is_folded or not layer.scheme.fold_bias):
            return "the cache counts biases in that are folded, or the other way round"
    return None


class FusedCache:
    """A decoder's layers together with their parts of a cache, packed for the kernel.

    Storage is not kept alive, so that what is grown out of is free at once.

    Args:
        fused: the decoder.
        cache: the cache.

    Raises:
        NotFused: they do not belong together.
    """

    def __init__(self, fused: FusedDecoder, cache: QuantizedCache) -> None:
        refusal = _refusal(fused, cache)
        if refusal is not None:
            raise NotFused(refusal)
        self.is_served = all(map(serves_layer, cache.layers))
        self._storage: list[ref] = []
        self._forgotten: list[int] = []
        self._others: tuple = ()
        self._layers: list[PackedLayer] = []
        self.packed = b""

    def refresh(
        self, fused: FusedDecoder, cache: QuantizedCache, tables: list, biases: list[LayerBiases], like: torch.Tensor,
        tokens: int,
    ) -> None:  # fmt: skip
        """Make room for `tokens` tokens in all of the shape of `like`, and pack again what has changed.

        That is storage that was moved, tables that have grown, and tokens that were forgotten.

        Raises:
            NotFused: a tensor is of a dtype that the kernel does not load.
            OctavoError: the tokens do not fit, or are of another batch or of other heads than those that are stored.
        """
        _make_room(cache, like, tokens)
        stores = _stores(cache)
        others = (*tables, *[part for of_layer in biases for part in of_layer])
        is_same = _are([found() for found in self._storage], [store.storage for store in stores])
        is_same = is_same and _are(others, self._others)
        layers = self._layers
        if not is_same:
            for store in stores:
                store.allocate(like, tokens)  # heads are checked
            layers = [
                packed_layer(_with_cache(fused, index, layer, tables[index], biases[index]))._replace(
                    layer=fused.plain[index]
                )
                for index, layer in enumerate(cache.layers)
            ]
        forgotten = [layer.key_store.forgotten for layer in cache.layers]
        if not is_same or forgotten != self._forgotten:
            self.packed = pack_layers(layers, forgotten)
        self._storage = self._storage if is_same else [ref(store.storage) for store in stores]
        self._layers, self._others, self._forgotten = layers, others, forgotten


def fused_cache(fused: FusedDecoder, cache: QuantizedCache) -> FusedCache:
    """What is known of a decoder and a cache.

    Raises:
        NotFused: they do not belong together.
    """
    found = fused.caches.get(cache)
    if found is None:
        found = fused.caches[cache] = FusedCache(fused, cache)
    return found


def _make_room(cache: QuantizedCache, like: torch.Tensor, tokens: int) -> None:
    for layer in cache.layers:
        for store in (layer.key_store, layer.value_store):
            codes = store.storage
            if codes is None or tokens - store.forgotten > codes.shape[2] or codes.shape[0] != like.shape[0]:
                store.allocate(like, tokens)
            else:
                store.check_room(tokens)
        if not layer.is_initialized:
            layer.lazy_initialization(like, like)


def advance(cache: QuantizedCache, tokens: int) -> None:
    """Let every layer know of so many tokens in all, which were encoded into its storage."""
    for store in _stores(cache):
        store.length = tokens
        if store.sliding is not None:
            store.trim()


def _are(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(map(lambda one, other: one is other, some, others))


def packed_layer(layer: DecoderLayer) -> PackedLayer:
    """A layer as the kernel takes it.

    Raises:
        NotFused: a tensor is of a dtype that it does not load.
    """
    packed = pack_layer(layer)
    if packed is None:
        raise NotFused("a tensor is of a dtype that the kernel does not load")
    return packed


def _coded_store(store: CodeStore) -> Coded:
    """All of a store's room."""
    scale = store._static_scale if store._scale is None else store._scale
    zero = store._static_zero if store._scale is None else store._zero
    return Coded(store._codes, scale, zero)


def _with_cache(
    fused: FusedDecoder, index: int, layer: QuantizedLayer, table: torch.Tensor | None, biases: Any
) -> DecoderLayer:
    scheme = layer.scheme
    return fused.plain[index]._replace(
        key_codes=_coded_store(layer.key_store),
        value_codes=_coded_store(layer.value_store),
        query_scale=layer.query_scale,
        biases=biases,
        rotation=table,
        window=fused.windows[index] or 0,
        rotate_key=scheme.rotate_key,
        rotate_value=scheme.rotate_value,
        is_key_dynamic=scheme.key is not None and scheme.key.dynamic,
        is_value_dynamic=scheme.value is not None and scheme.value.dynamic,
    )
