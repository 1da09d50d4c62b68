"""Planned bytes of a cache beside those of one that is filled with real tokens."""

import pytest
import torch
from transformers import PreTrainedConfig

from octavo import QuantizedCache, Scheme, load_scheme
from octavo.common.runtime.checkpoint.buffers import constant_shapes
from octavo.common.runtime.passes import tokens_of_chunk
from octavo.common.runtime.schemes.kv_scheme import PRESETS
from octavo.common.runtime.static_scales import LayerScales
from octavo.planning.cache import CacheSize, cache_size

from ...support import tiny_config

HEAD_DIM = 64
OWN = (
    Scheme.from_dict({"name": "mixed", **{"layers": {"0": "octavo-4", "1": "kvquant-3"}}}),
    Scheme.from_dict({**load_scheme("kivi-4").to_dict(), "name": "float ends", "float_layers": [0, 2], "sinks": 3}),
)


def sliding_config() -> PreTrainedConfig:
    """A layer of three sees all, the others 100 tokens."""
    config = tiny_config(head_dim=HEAD_DIM)
    config.sliding_window = 100
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return config


def constant(scheme: Scheme, config: PreTrainedConfig) -> LayerScales:
    """Static scales of one layer, all of them 0.1."""
    shapes = constant_shapes(scheme, config.num_attention_heads, config.num_key_value_heads, HEAD_DIM)
    parts = {name: torch.full(shape, 0.1) for name, shape in shapes.items()}
    levels = {name: torch.linspace(-1, 1, part.numel()) for name, part in parts.items() if "levels" in name}
    sides = [
        (parts[f"{side}_scale"], parts.get(f"{side}_zero")) if f"{side}_scale" in parts else None
        for side in ("key", "value")
    ]
    bases = {name: torch.eye(HEAD_DIM).expand(part.shape) for name, part in parts.items() if "basis" in name}
    return LayerScales(
        *sides, parts.get("query_scale"), levels.get("key_levels"), levels.get("value_levels"),
        key_mean=parts.get("key_mean"), **bases,
    )  # fmt: skip


def filled(scheme: Scheme, config: PreTrainedConfig, batch: int, passes: list[int]) -> QuantizedCache:
    """A cache that holds random tokens."""
    scheme = scheme.counted(config.num_hidden_layers)
    scales = [constant(scheme.of_layer(index), config) for index in range(config.num_hidden_layers)]
    cache = QuantizedCache(config, scheme, scales=scales)
    cache.expect(sum(passes))
    generator = torch.Generator().manual_seed(0)
    for tokens in passes:
        states = torch.randn((batch, config.num_key_value_heads, tokens, HEAD_DIM), generator=generator)
        for index in range(config.num_hidden_layers):
            cache.update(states, states, index)
    return cache


@pytest.mark.parametrize("tokens", [1, 70, 333])
@pytest.mark.parametrize("scheme", [*map(load_scheme, PRESETS), *OWN], ids=lambda scheme: scheme.name)
def test_planned_bytes_are_those_of_the_storages(scheme: Scheme, tokens: int) -> None:
    config, batch = tiny_config(head_dim=HEAD_DIM), 2
    planned, cache = cache_size(config, scheme, tokens, batch, torch.float32), filled(scheme, config, batch, [tokens])
    assert (planned.kept, planned.allocated) == (cache.used_nbytes(), cache.nbytes())
    assert 0 < planned.kept <= planned.allocated


@pytest.mark.parametrize("name", ["float", "int8-token", "octavo-4", "octavo-8", "kivi-2", "kvquant-4"])
def test_tokens_that_come_one_by_one_take_what_a_prompt_takes(name: str) -> None:
    config, scheme = tiny_config(head_dim=HEAD_DIM, num_hidden_layers=1), load_scheme(name)
    cache = filled(scheme, config, 1, [90, *[1] * 111])
    cache.expect(0)
    planned = cache_size(config, scheme, 201, 1, torch.float32)
    assert (planned.kept, planned.allocated) == (cache.used_nbytes(), cache.nbytes())


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["float", "int8-token", "octavo-4", "kivi-4"])
def test_layers_that_slide_take_what_their_window_needs(name: str, batch: int) -> None:
    config, scheme, tokens = sliding_config(), load_scheme(name), 1200
    chunk = tokens_of_chunk(batch)
    cache = filled(scheme, config, batch, [chunk] * (tokens // chunk) + [tokens % chunk])
    planned = cache_size(config, scheme, tokens, batch, torch.float32)
    assert (planned.kept, planned.allocated) == (cache.used_nbytes(), cache.nbytes())
    assert cache_size(config, scheme, tokens, batch, torch.float32, settles=True).allocated == planned.allocated
    config.layer_types = ["full_attention"] * 3
    assert planned.allocated < cache_size(config, scheme, tokens, batch, torch.float32).allocated


def test_constants_are_one_set_for_a_layer() -> None:
    config, scheme = tiny_config(head_dim=HEAD_DIM), load_scheme("ascend-c8")
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    assert cache_size(config, scheme, 10, 4).constants == layers * 2 * kv_heads * HEAD_DIM * 4
    assert cache_size(config, load_scheme("int8-token"), 10, 4).constants == 0


def test_a_cache_of_floats_is_in_the_dtype_of_the_model() -> None:
    config, scheme = tiny_config(head_dim=HEAD_DIM), load_scheme("float")
    halves, singles = (cache_size(config, scheme, 64, 1, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert singles == CacheSize(2 * halves.kept, 2 * halves.allocated, 0)
