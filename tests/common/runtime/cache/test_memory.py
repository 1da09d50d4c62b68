"""Bytes that a cache allocates, and how often storage moves."""

from collections.abc import Callable

import pytest

from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.code_storage import SMALLEST_CAPACITY, capacity_for
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sizes import kept_kv_bytes, kv_bytes_per_token
from octavo.common.runtime.schemes.kv_scheme import load_scheme

from ....support import tiny_config
from .tiny import (
    GROUPS,
    LAYERS,
    WIDTH,
    fill,
    states,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def storage_sizes(cache: QuantizedCache) -> list[int]:
    """Bytes of every storage behind what the handles of a cache show, each storage once."""
    storages = {}
    for layer in cache.layers:
        for store in (layer.key_store, layer.value_store):
            handle = store.codes()
            for part in (handle.codes, handle.scale if store.codec and store.codec.dynamic else None):
                if part is not None:
                    storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return list(storages.values())


@pytest.mark.parametrize("step", [2048, 1])
def test_c8_takes_a_byte_per_value(step: int, cache: Callable[..., QuantizedCache]) -> None:
    filled = cache("ascend-c8")
    for _ in range(0, 2048, step):
        fill(filled, step)
    assert storage_sizes(filled) == [2048 * GROUPS * WIDTH] * (2 * LAYERS)
    assert filled.nbytes() == 2048 * 2 * GROUPS * WIDTH * LAYERS
    static = sum(store.codes().scale.nbytes for part in filled.layers for store in (part.key_store, part.value_store))
    assert static == 2 * LAYERS * GROUPS * WIDTH * 4, "the scales are a constant, whatever the length"


def test_dynamic_scales_take_four_bytes_per_token_and_head(cache: Callable[..., QuantizedCache]) -> None:
    filled = cache("int8-token")
    fill(filled, 2048)
    assert filled.nbytes() == sum(storage_sizes(filled)) == 2048 * 2 * GROUPS * (WIDTH + 4) * LAYERS


def test_what_is_used_is_told_apart_from_what_is_allocated(cache: Callable[..., QuantizedCache]) -> None:
    of_token = 2 * GROUPS * (WIDTH + 4) * LAYERS
    for filled in (cache("int8-token", max_length=500), cache("int8-token")):
        assert filled.used_nbytes() == 0
        fill(filled, 300)
        fill(filled, 1)
        assert filled.used_nbytes() == 301 * of_token < filled.nbytes()
        filled.crop(-41)
        assert filled.used_nbytes() == 260 * of_token


def test_a_fixed_length_is_allocated_once_and_refuses_more(cache: Callable[..., QuantizedCache]) -> None:
    fixed = cache("ascend-c8", max_length=100)
    fill(fixed, 1)
    place = fixed.layers[0].key_store.codes().codes.data_ptr()
    for _ in range(99):
        fill(fixed, 1)
    assert fixed.layers[0].key_store.codes().codes.data_ptr() == place
    assert fixed.nbytes() == fixed.used_nbytes() == 100 * 2 * GROUPS * WIDTH * LAYERS
    assert fixed.layers[0].get_max_length() == 100
    with pytest.raises(OctavoError, match="max_length=100"):
        fill(fixed, 1)


def test_appending_copies_a_bounded_number_of_times(cache: Callable[..., QuantizedCache]) -> None:
    growing = cache("ascend-c8")
    store = growing.layers[0].key_store
    places, copied, last = 0, 0, None
    key, value = states(1)
    for length in range(3000):
        growing.update(key, value, 0)
        place = store.codes().codes.data_ptr()
        if place != last:
            places, copied, last = places + 1, copied + length, place
    assert places <= 4 * 7 + 1, "four sizes per power of two between 64 and 4096"
    assert copied <= 6 * 3000, "each token is moved a bounded number of times"


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 80, 81, 127, 128, 129, 1000, 2047, 2048, 2049, 100_000])
def test_capacity_wastes_less_than_a_quarter(tokens: int) -> None:
    assert tokens <= capacity_for(tokens) <= max(2 * SMALLEST_CAPACITY, tokens * 1.25)
    assert capacity_for(capacity_for(tokens)) == capacity_for(tokens)


@pytest.mark.parametrize("scheme", ["float", "int8-token", "k8v4"])
def test_layers_that_slide_count_with_the_tokens_of_their_window(scheme: str) -> None:
    types = ["sliding_attention", "full_attention", "full_attention"]
    config, chosen = tiny_config(layer_types=types, sliding_window=11), load_scheme(scheme)
    token = kv_bytes_per_token(config, chosen, 4)
    assert kept_kv_bytes(config, chosen, 7, 4) == 7 * token
    assert kept_kv_bytes(config, chosen, 100, 4) == round((10 + 2 * 100) * token / 3)
