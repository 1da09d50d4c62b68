"""What tests of the cache share: tiny models of several architectures, and caches filled with random states."""

from typing import Any

import torch
import transformers

from octavo.common.runtime.cache.quantized_cache import QuantizedCache

from ....support import randomized, tiny_config

SCHEMES = ("float", "int8-token", "int4-token", "fp8-token", "ascend-c8", "ascend-fa")
NEW_TOKENS = 24
LAYERS, GROUPS, WIDTH = 3, 2, 16  # of the tiny Llama


def two_lines(model: torch.nn.Module) -> torch.nn.Module:
    """The first of the two lines that make a stock model read codes; the second is the cache."""
    model.set_attn_implementation("octavo")
    return model


def generate(model: torch.nn.Module, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Generate with a fixed seed and without stopping early."""
    torch.manual_seed(5)
    return model.generate(ids, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **arguments})


def states(tokens: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random K and V of one layer."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn((batch, GROUPS, tokens, WIDTH), generator=generator) for _ in range(2))


def fill(cache: QuantizedCache, tokens: int, batch: int = 1, seed: int = 0) -> None:
    """Append random states to every layer."""
    for layer in range(len(cache.layers)):
        cache.update(*states(tokens, batch, seed + layer), layer)


def decoded(cache: QuantizedCache, layer: int = 0) -> list[torch.Tensor]:
    """K and V as the codes of a layer stand for them."""
    parts = []
    for store in (cache.layers[layer].key_store, cache.layers[layer].value_store):
        handle = store.codes()
        zero = 0 if handle.zero is None else handle.zero
        parts.append((handle.codes.float() - zero) * (1 if handle.scale is None else handle.scale))
    return parts


def tiny_mistral() -> torch.nn.Module:
    config = transformers.MistralConfig(**{**tiny_config().to_diff_dict(), "model_type": "mistral"})
    config.sliding_window = 13
    return randomized(transformers.MistralForCausalLM(config))


def tiny_qwen2() -> torch.nn.Module:
    settings = {k: v for k, v in tiny_config().to_diff_dict().items() if k not in ("model_type", "head_dim")}
    layers = ["full_attention", "sliding_attention", "full_attention"]
    config = transformers.Qwen2Config(**settings, use_sliding_window=True, sliding_window=11, layer_types=layers)
    return randomized(transformers.Qwen2ForCausalLM(config))


def tiny_qwen3() -> torch.nn.Module:
    settings = {k: v for k, v in tiny_config().to_diff_dict().items() if k != "model_type"}
    return randomized(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings)))
