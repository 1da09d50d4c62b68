"""QuantizedCache: transformers' cache contract on codes, against DynamicCache, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from octavo.common.errors import OctavoError
from octavo.common.runtime.attention import Codes
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.static_scales import LayerScales

from ....support import random_ids, tiny_config, with_cache
from .tiny import (
    GROUPS,
    LAYERS,
    SCHEMES,
    WIDTH,
    decoded,
    fill,
    generate,
    states,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# The methods of the contract, on codes.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_update_returns_handles_to_all_tokens(scheme: str, cache: Callable[..., QuantizedCache]) -> None:
    filled = cache(scheme)
    key, value = states(10)
    filled.update(key[:, :, :7], value[:, :, :7], 0)
    k, v = filled.update(key[:, :, 7:], value[:, :, 7:], 0)
    codec = load_scheme(scheme).key
    width, dtype = (codec.stored_width(WIDTH), codec.stored_dtype) if codec else (WIDTH, torch.float32)
    assert isinstance(k, Codes) and k.codes.shape == v.codes.shape == (1, GROUPS, 10, width)
    assert k.codes.dtype == v.codes.dtype == dtype
    assert (k.query_scale is not None) == (scheme == "ascend-fa")
    assert filled.get_seq_length() == 10 and filled.get_seq_length(1) == 0
    assert filled.get_mask_sizes(5, 0) == (15, 0)


def test_dynamic_codes_decode_within_half_a_step(cache: Callable[..., QuantizedCache]) -> None:
    filled = cache("int8-token")
    key, value = states(50)
    filled.update(key, value, 0)
    for values, back in zip((key, value), decoded(filled), strict=True):
        step = values.abs().amax(-1, keepdim=True) / 127
        assert ((back - values).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_crop_forgets_the_newest(scheme: str, cache: Callable[..., QuantizedCache]) -> None:
    filled, fresh = cache(scheme), cache(scheme)
    key, value = states(30)
    filled.update(key, value, 0)
    filled.layers[0].crop(-12)
    assert filled.get_seq_length() == 18
    filled.update(key[:, :, :5], value[:, :, :5], 0)
    fresh.update(torch.cat([key[:, :, :18], key[:, :, :5]], 2), torch.cat([value[:, :, :18], value[:, :, :5]], 2), 0)
    for a, b in zip(decoded(filled), decoded(fresh), strict=True):
        assert torch.equal(a, b)


def test_crop_as_dynamic_cache_does(stock: torch.nn.Module, cache: Callable[..., QuantizedCache]) -> None:
    filled, oracle = cache("float"), DynamicCache(config=stock.config)
    for each in (filled, oracle):
        for layer in range(LAYERS):
            each.update(*states(30, seed=layer), layer)
    for amount in (0, -1, -11):
        filled.crop(amount), oracle.crop(amount)
        assert filled.get_seq_length() == oracle.get_seq_length()
    for layer in range(LAYERS):
        assert torch.equal(decoded(filled, layer)[0], oracle.layers[layer].keys)
    with pytest.raises(ValueError, match="negative"):
        filled.crop(5)


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_reset_forgets_everything(scheme: str, max_length: int | None, cache: Callable[..., QuantizedCache]) -> None:
    used, fresh = cache(scheme, max_length=max_length), cache(scheme, max_length=max_length)
    fill(used, 40)
    used.reset()
    assert used.get_seq_length() == 0
    for each in (used, fresh):
        fill(each, 9, seed=8)
    for layer in range(LAYERS):
        assert torch.equal(decoded(used, layer)[0], decoded(fresh, layer)[0])


def test_a_reset_cache_takes_another_batch_size(cache: Callable[..., QuantizedCache]) -> None:
    used = cache("int8-token")
    fill(used, 9, batch=2)
    used.reset()
    fill(used, 9, batch=3)
    assert decoded(used)[0].shape[0] == 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("max_length", [None, 64])
def test_a_batch_of_another_size_is_refused(
    scheme: str, max_length: int | None, cache: Callable[..., QuantizedCache]
) -> None:
    used = cache(scheme, max_length=max_length)
    fill(used, 9, batch=1)
    with pytest.raises((ValueError, RuntimeError)):
        fill(used, 9, batch=3)


SELECTIONS: dict[str, Callable[[Any], None]] = {
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(3),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "batch_select_indices by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "offload and prefetch": lambda cache: [(layer.offload(), layer.prefetch()) for layer in cache.layers],
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_batch_methods_do_to_codes_what_they_do_to_floats(
    selection: str, scheme: str, stock: torch.nn.Module, cache: Callable[..., QuantizedCache]
) -> None:
    changed, oracle = cache(scheme), DynamicCache(config=stock.config)
    fill(changed, 20, batch=3)
    for layer in range(LAYERS):
        oracle.update(*decoded(changed, layer), layer)
    SELECTIONS[selection](changed), SELECTIONS[selection](oracle)
    rows = oracle.layers[0].keys.shape[0]
    for layer in range(LAYERS):
        for a, b in zip(decoded(changed, layer), (oracle.layers[layer].keys, oracle.layers[layer].values), strict=True):
            assert torch.equal(a, b)
    fill(changed, 1, batch=rows, seed=3)
    assert changed.get_seq_length() == 21


def test_batch_methods_before_the_first_token_do_nothing(cache: Callable[..., QuantizedCache]) -> None:
    for change in SELECTIONS.values():
        empty = cache("ascend-c8")
        change(empty)
        assert empty.get_seq_length() == 0
        fill(empty, 3, batch=2)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("max_length", [None, 50])
def test_early_initialization_allocates_and_changes_nothing(
    scheme: str, max_length: int | None, cache: Callable[..., QuantizedCache]
) -> None:
    early, late = cache(scheme, max_length=max_length), cache(scheme, max_length=max_length)
    early.early_initialization(2, GROUPS, WIDTH, torch.float32, torch.device("cpu"))
    assert early.is_initialized and early.get_seq_length() == 0 and early.nbytes() > 0
    allocated = early.nbytes()
    for each in (early, late):
        fill(each, 12, batch=2)
    assert early.nbytes() == allocated
    assert torch.equal(decoded(early)[1], decoded(late)[1])


# What is refused.


def test_a_static_scheme_needs_statistics(reader: torch.nn.Module) -> None:
    with pytest.raises(OctavoError, match="statistics"):
        QuantizedCache(reader.config, "ascend-c8")


def test_statistics_of_another_depth_are_refused(statistics: Path) -> None:
    with pytest.raises(OctavoError, match="another model: 3 layers, and this model has 5"):
        QuantizedCache(tiny_config(num_hidden_layers=5), "ascend-c8", statistics=statistics)
    with pytest.raises(OctavoError, match="1 layers"):
        QuantizedCache(tiny_config(), "ascend-c8", scales=[LayerScales()])


def test_an_unknown_scheme_is_refused(reader: torch.nn.Module) -> None:
    with pytest.raises(OctavoError, match="int8-token"):
        QuantizedCache(reader.config, "int7")


def test_linear_attention_is_refused() -> None:
    config = tiny_config()
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(OctavoError, match="linear_attention"):
        QuantizedCache(config)


@pytest.mark.parametrize("scheme", ["int8-token", "octavo-4"])
def test_a_cache_that_holds_more_than_the_prompt_is_refused_in_one_line(
    scheme: str, reader: torch.nn.Module, cache: Callable[..., QuantizedCache]
) -> None:
    ids, used = random_ids(1, 10), cache(scheme)
    expected = generate(reader, ids, **with_cache(used))
    with pytest.raises(OctavoError, match=r"no token comes .* which holds 20: call cache\.reset\(\)"):
        used.crop(20 - used.get_seq_length())
        generate(reader, ids, **with_cache(used))
    used.reset()
    assert torch.equal(generate(reader, ids, **with_cache(used)), expected)


def test_a_mask_that_does_not_cover_the_cache_is_refused(
    reader: torch.nn.Module, cache: Callable[..., QuantizedCache]
) -> None:
    used = cache("int8-token")
    reader(random_ids(1, 10), **with_cache(used))
    with pytest.raises(OctavoError, match="attention_mask is of 5 tokens, and 5 come to the 10 in the cache"):
        reader(random_ids(1, 5), attention_mask=torch.ones((1, 5), dtype=torch.long), **with_cache(used))
