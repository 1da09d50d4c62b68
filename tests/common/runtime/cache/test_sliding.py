"""Layers that forget what their window hides: logits are those of a cache that keeps all, in bounded memory."""

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.errors import OctavoError
from octavo.common.runtime.attention import SlidingWindow, quantized_attention
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sliding import Sliding, sliding_windows
from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM, PRESETS, Scheme, load_scheme
from octavo.common.runtime.static_scales import Statistics, scales_of
from octavo.common.stock_model import prepare
from octavo.ops.shared.registry import NAMESPACE

from ....support import random_ids, randomized, shortened, tiny_config, with_cache
from ....tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW, LAYERS, GROUPS, HEADS, WIDTH = 8, 3, 2, 4, 32
SIZES = {"num_hidden_layers": LAYERS, "head_dim": WIDTH}
LONG = 450
CUTS = ((LONG,), (300, 1, 40, 1, 89, *(1,) * 19), (380, *(1,) * 70))
SCHEMES = {
    **{name: shortened(load_scheme(name)) for name in PRESETS},
    "a float window longer than the window": Scheme.from_dict({**load_scheme("octavo-4").to_dict(), "window": 100}),
    "layers that differ": Scheme.from_dict({**load_scheme("octavo-2").to_dict(), "layers": {"1": "int8-token"}}),
}


def settings_of(config: transformers.PreTrainedConfig, *left_out: str) -> dict[str, Any]:
    return {name: value for name, value in config.to_diff_dict().items() if name not in ("model_type", *left_out)}


def sliding_mistral(window: int = WINDOW) -> torch.nn.Module:
    """Every layer slides; its config has no `layer_types`."""
    config = transformers.MistralConfig(**settings_of(tiny_config(**SIZES)), sliding_window=window)
    return randomized(transformers.MistralForCausalLM(config))


def mixed_qwen2(window: int = WINDOW) -> torch.nn.Module:
    """Two layers that slide and one that sees all, as Gemma 3 has them; with biases."""
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    config = transformers.Qwen2Config(
        **settings_of(tiny_config(**SIZES), "head_dim"), head_dim=WIDTH, layer_types=types, use_sliding_window=True,
        sliding_window=window,
    )  # fmt: skip
    return randomized(transformers.Qwen2ForCausalLM(config))


MODELS = {"mistral": sliding_mistral, "qwen2": mixed_qwen2}


@lru_cache
def reader(name: str, is_folded: bool = True) -> torch.nn.Module:
    """A model that reads codes, with its biases folded or not; in float64, where cuts of a prompt agree."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    if is_folded:
        return prepare(model)
    model.set_attn_implementation(NAMESPACE)
    return model


@lru_cache
def statistics(name: str) -> Statistics:
    torch.manual_seed(0)
    model, samples = MODELS[name](), [{"input_ids": random_ids(1, 250)}]
    return calibrate_whole(model, samples, map(load_scheme, PRESETS))


def keeps_all(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    """The config of a cache that forgets nothing."""
    config = copy.deepcopy(config)
    config.sliding_window = None
    return config


def pair(scheme: Scheme, name: str = "mistral", **arguments: Any) -> tuple[QuantizedCache, QuantizedCache]:
    """A cache that forgets, and one that keeps all."""
    arguments["scales"] = scales_of(scheme, statistics(name)) if scheme.is_static else None
    config = reader(name).config
    return tuple(QuantizedCache(each, scheme, **arguments) for each in (config, keeps_all(config)))


def logits(model: torch.nn.Module, ids: torch.Tensor, cache: QuantizedCache, cuts: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(part, **with_cache(cache)).logits for part in ids.split(cuts, dim=1)], dim=1)


def has_forgotten(cache: QuantizedCache) -> bool:
    return all(layer.key_store.first > 0 for layer in cache.layers if layer.is_sliding)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_a_cache_that_keeps_all(scheme: str, name: str) -> None:
    ids, chosen = random_ids(1, LONG), SCHEMES[scheme]
    for cuts in CUTS[:2]:
        sliding, keeping = pair(chosen, name)
        found, wanted = (logits(reader(name, chosen.fold_bias), ids, cache, cuts) for cache in (sliding, keeping))
        # In float32, in which codes are decoded, and stored outliers and scales tip over in float16.
        error = (found - wanted).square().mean().sqrt() / wanted.std()
        assert error < TOLERANCES["logits rmse with codes tipped over"]
        assert has_forgotten(sliding) and sliding.get_seq_length() == LONG
        assert sliding.nbytes() < keeping.nbytes()


def states(tokens: int, heads: int = GROUPS, seed: int = 0) -> torch.Tensor:
    return torch.randn((2, heads, tokens, WIDTH), generator=torch.Generator().manual_seed(seed))


def window_mask(past: int, queries: int, first: int) -> torch.Tensor:
    """What each of `queries` tokens behind `past` sees of those from slot `first` on, with padding at the left."""
    keys, newest = torch.arange(first, past + queries), torch.arange(past, past + queries)[:, None]
    seen = (keys <= newest) & (keys > newest - WINDOW)
    return torch.stack((seen, seen & (keys >= 5)))[:, None]


MASKS = ("no mask", "a mask of the window", "a mask of all")
MASKED = ("float", "int8-token", "ascend-fa", "octavo-4", "kivi-2")


@pytest.mark.parametrize(
    ("scheme", "masked"), [(name, mask) for name in SCHEMES for mask in MASKS if name in MASKED or mask == MASKS[0]]
)
def test_attention_is_that_over_all_tokens(scheme: str, masked: str) -> None:
    chosen = SCHEMES[scheme]
    for cuts in CUTS:
        sliding, keeping, past = *pair(chosen), 0
        for number, size in enumerate(cuts):
            query, key, value = (states(size, heads, 3 * number + part) for part, heads in enumerate((HEADS, 2, 2)))
            outputs = []
            for cache in (sliding, keeping):
                mask: Any = SlidingWindow(WINDOW)
                if masked != "no mask":
                    first = cache.get_mask_sizes(size, 0)[1] if masked == "a mask of the window" else 0
                    mask = window_mask(past, size, first)
                module = torch.nn.Module().eval()
                outputs.append(quantized_attention(module, query, *cache.update(key, value, 0), mask)[0])
            tolerance = TOLERANCES["attention" if chosen.key is None or not chosen.rotate_key else "logits"]
            torch.testing.assert_close(*outputs, atol=tolerance, rtol=0)
            past += size


def parts_kept(cache: QuantizedCache, first: int) -> list[torch.Tensor]:
    """Codes and scales of the first layer's tokens from `first` on, in whole groups, as bytes."""
    parts = []
    for store in (cache.layers[0].key_store, cache.layers[0].value_store):
        body = getattr(store, "body", store)
        for part in body.parts():
            group = body._codes.shape[2] // part.shape[2]
            rows = part[:, :, (first - body.forgotten) // group : (body.length - body.forgotten) // group]
            parts.append(rows.contiguous().view(torch.uint8))
    return parts


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_kept_is_bit_for_bit_what_it_was(scheme: str) -> None:
    sliding, keeping = pair(SCHEMES[scheme])
    key, value = (states(3 * LONG, seed=seed) for seed in (1, 2))
    largest = 0
    for k, v in zip(*(part.split((LONG, *(1,) * LONG, LONG), dim=2) for part in (key, value)), strict=True):
        for cache in (sliding, keeping):
            cache.update(k, v, 0)
        largest = max(largest, sliding.nbytes())
    layer = sliding.layers[0]
    first = max(getattr(store, "body", store).forgotten for store in (layer.key_store, layer.value_store))
    assert first > 0 and layer.key_store.first <= 3 * LONG + 1 - WINDOW - CROP_ROOM
    assert all(torch.equal(*both) for both in zip(parts_kept(sliding, first), parts_kept(keeping, first), strict=True))
    once = pair(SCHEMES[scheme])[0]
    once.update(key[:, :, :LONG], value[:, :, :LONG], 0)
    assert largest == once.nbytes(), "however long it goes on"
    places = [store.parts()[-1].data_ptr() for store in (layer.key_store, layer.value_store)]
    for _ in range(2):
        sliding.update(key[:, :, :1], value[:, :, :1], 0)
    assert places == [store.parts()[-1].data_ptr() for store in (layer.key_store, layer.value_store)]


def test_masks_are_sized_as_by_dynamic_cache() -> None:
    config = reader("qwen2").config
    ours, oracle = QuantizedCache(config, "int8-token", crop_room=0), DynamicCache(config=config)
    assert ours.is_sliding == oracle.is_sliding == [True, True, False]
    assert (
        QuantizedCache(reader("mistral").config).is_sliding == DynamicCache(config=reader("mistral").config).is_sliding
    )
    for size in (3, 1, 4, 1, 200, 1, 1, 30):
        for layer in range(LAYERS):
            assert ours.get_mask_sizes(size, layer) == oracle.get_mask_sizes(size, layer)
            for cache in (ours, oracle):
                cache.update(states(size), states(size), layer)
            assert ours.get_seq_length(layer) == oracle.get_seq_length(layer)


def test_layers_that_slide_are_those_of_dynamic_cache() -> None:
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert sliding_windows(tiny_config()) == [None] * 3
    assert sliding_windows(transformers.MistralConfig(num_hidden_layers=2, sliding_window=None)) == [None] * 2
    assert sliding_windows(transformers.MistralConfig(num_hidden_layers=2)) == [4096] * 2
    shortened = tiny_config(layer_types=types, sliding_window=5)
    assert sliding_windows(shortened) == [5, None, None]
    shortened.num_hidden_layers = 2
    assert QuantizedCache(shortened).is_sliding == [True, False]


# What is forgotten, and what is not.


@pytest.mark.parametrize("scheme", ["float", "int8-token", "octavo-4", "kivi-2"])
def test_crops_within_the_room_are_as_if_the_tokens_had_never_come(scheme: str) -> None:
    cropped, fresh = (pair(SCHEMES[scheme], crop_room=20)[0] for _ in range(2))
    for number, size in enumerate((LONG, 1, 30, 1, 1, 200)):
        for layer in range(LAYERS):
            key, value = (states(size, seed=2 * number + part) for part in range(2))
            wrong = states(20, seed=99)
            outputs = []
            for cache in (cropped, fresh):
                handles = cache.update(key, value, layer)
                query = states(size, HEADS)
                mask = SlidingWindow(WINDOW)
                outputs.append(quantized_attention(torch.nn.Module().eval(), query, *handles, mask)[0])
            torch.testing.assert_close(*outputs, atol=TOLERANCES["logits"], rtol=0)
            cropped.update(wrong[:, :, :7], wrong[:, :, :7], layer)
            cropped.update(wrong[:, :, 7:], wrong[:, :, 7:], layer)
        cropped.crop(-20)
        assert cropped.get_seq_length() == fresh.get_seq_length()


def test_a_crop_deeper_than_what_is_kept_is_refused_by_all_layers() -> None:
    used = QuantizedCache(reader("qwen2").config, "int8-token", crop_room=5)
    for layer in range(LAYERS):
        used.update(states(LONG), states(LONG), layer)
    with pytest.raises(OctavoError, match=r"crop_room=5 keeps enough beside a sliding window of 8 for 5 .*=100 \("):
        used.crop(-100)
    assert [layer.get_seq_length() for layer in used.layers] == [LONG] * LAYERS
    used.crop(-5)
    used.crop(-LONG)
    assert used.get_seq_length() == 0
    for layer in range(LAYERS):
        used.update(states(3), states(3), layer)
    assert used.get_seq_length() == 3 and used.layers[0].key_store.first == 0


@pytest.mark.parametrize("max_length", [None, 512])
def test_a_reset_cache_and_one_of_other_rows_begin_anew(max_length: int | None) -> None:
    used, fresh = (QuantizedCache(reader("mistral").config, "octavo-4", max_length=max_length) for _ in range(2))
    used.update(states(LONG), states(LONG), 0)
    used.reset()
    for cache in (used, fresh):
        cache.update(states(300, seed=1), states(300, seed=2), 0)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.layers[0].offload(), cache.layers[0].prefetch()
    for one, other in zip(parts_kept(used, 256), parts_kept(fresh, 256), strict=True):
        assert torch.equal(one, other)
    assert used.nbytes() == fresh.nbytes()
    if max_length:
        with pytest.raises(OctavoError, match="max_length=512"):
            used.update(states(300), states(300), 0)


def test_a_model_whose_mask_hides_nothing_is_refused() -> None:
    """A full mask over a cache that has forgotten: in each form that a mask comes in."""
    used = QuantizedCache(reader("mistral").config, "int8-token")
    used.update(states(LONG), states(LONG), 0)
    query, handles = states(1, HEADS), used.update(states(1), states(1), 0)
    full = torch.ones((1, 1, 1, LONG + 1), dtype=torch.bool)
    for mask in (None, SlidingWindow(LONG), full, full.float() - 1, full[..., :5], full[..., :1]):
        with pytest.raises(OctavoError, match=r"mask .* has forgotten"):
            quantized_attention(torch.nn.Module().eval(), query, *handles, mask)


# Generation.


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 90},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["float", "int8-token", "octavo-4"])
def test_generation_is_that_of_a_cache_that_keeps_all(scheme: str, way: str, name: str) -> None:
    batch = 1 if way == "prompt lookup" else 2
    ids = random_ids(batch, 20).repeat(1, 12)
    mask = torch.ones_like(ids)
    mask[-1, : 0 if batch == 1 else 17] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **WAYS[way]}
    sliding, keeping = pair(SCHEMES[scheme], name)
    found, wanted = (reader(name).generate(ids, **with_cache(each), **arguments) for each in (sliding, keeping))
    assert torch.equal(found, wanted) and sliding.nbytes() < keeping.nbytes()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [0, 17])
def test_the_float_scheme_equals_the_model_of_transformers(name: str, padding: int) -> None:
    torch.manual_seed(0)
    stock, ids = MODELS[name]().double(), random_ids(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    with torch.inference_mode():
        wanted = stock(ids, attention_mask=mask).logits
        cache, found = pair(SCHEMES["float"], name)[0], []
        for start in range(0, LONG, 90):
            stop = min(start + 90, LONG)
            arguments = {"attention_mask": mask[:, :stop], **with_cache(cache)}
            found.append(reader(name)(ids[:, start:stop], **arguments).logits)
    torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=0)
    assert has_forgotten(cache)


def test_storage_is_the_window_the_room_and_a_chunk() -> None:
    assert Sliding(4096, 64).capacity == 4095 + 64 + 256 + 1
    assert Sliding(1024, 64, 128).capacity % 128 == 0
    assert Sliding(4096, 64).first_needed(5000) == 5000 + 1 - 4096 - 64
    assert Sliding(4096, 64, 32).first_needed(5000) == 832
    assert Sliding(8, 0).first_needed(7) == 0 and Sliding(-100, 0).first_needed(7) == 7
