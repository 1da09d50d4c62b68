"""Tiny models and the presets that are tried on them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme

from ....support import randomized, shortened, tiny_config, tiny_llama

TOKENS = 200  # more than a window of 128 and a group of 64, or some of 32
LAYERS, HEADS, GROUPS, WIDTH = 2, 4, 2, 32
CHUNKS = (37, 83, 1, 79)
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": HEADS * WIDTH, "head_dim": WIDTH}
KINDS = ("llama", "qwen2", "qwen2 folded")
REPRESENTATIVES = ("float", "int8-token", "llamacpp-q4_1", "vllm-fp8-head", "kivi-2", "kvquant-3", "octavo-4")
"""One preset of each way to store K and V; the others of the models' tests are marked as slow."""
SMALL_STEPS = (
    "float", "ascend-c8", "ascend-fa", "int8-token", "llamacpp-q8_0", "lmdeploy-int8", "octavo-8",
    "openvino-u8", "ort-int8-channel",
)  # fmt: skip
COARSE = (
    "octavo-2", "octavo-2c", "octavo-2t", "octavo-2tc", "oscar-2", "kivi-2", "k4v2", "kvquant-2",
    "turboquant-mse-2", "turboquant-mse-3", "turboquant-3", "turboquant-k3v4", "turboquant-lmdeploy",
    "kvarn-2", "kvarn-k4v2", "kitty-2",
)  # fmt: skip
"""What loses much: 2 bits, and 3 bits of single tokens without sinks."""


def presets(*others: str) -> list[Any]:
    """All presets but `others`, those that are not representative as slow."""
    chosen = [name for name in PRESETS if name not in others]
    return [name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.slow) for name in chosen]


def build(kind: str) -> torch.nn.Module:
    """A tiny model in float32; Qwen2 with biases of k that are large beside its keys."""
    if kind == "llama":
        return tiny_llama(**SIZES)
    settings = {k: v for k, v in tiny_config(**SIZES).to_diff_dict().items() if k not in ("model_type", "head_dim")}
    torch.manual_seed(0)
    model = randomized(Qwen2ForCausalLM(Qwen2Config(**settings)))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_(std=5)
    return model


Make = Callable[..., QuantizedCache]


def scheme_for(kind: str, preset: str) -> Scheme:
    """The preset in codes in all layers, with biases in the cache where the model has them there."""
    scheme = shortened(dataclasses.replace(load_scheme(preset), float_layers=()))
    if kind == "qwen2" and scheme.has_codebooks:
        pytest.skip("codebooks are for K without its bias")
    return scheme if kind == "llama" else load_scheme({**scheme.to_dict(), "fold_bias": kind == "qwen2 folded"})
