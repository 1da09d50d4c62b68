"""Layers with outliers, what calibration sees of them, and their treatment: for tests of several files."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from octavo.common.architecture import architecture_of
from octavo.common.convert.outliers.search import OutputError, Smoothing
from octavo.common.convert.outliers.smooth import smooth_layer
from octavo.common.convert.outliers.subgraphs import Subgraph, forwards
from octavo.common.runtime.decoder import Decoder
from octavo.common.runtime.schemes.linear_scheme import LinearInputs
from octavo.models.llama3 import ARCHITECTURE as LLAMA

from ....support import random_ids, randomized, tiny_config


def linears_of(decoder: Decoder) -> tuple[str, ...]:
    """The linears of a layer whose inputs are treated."""
    return tuple(dict.fromkeys(name for subgraph in forwards(decoder) for name in subgraph.consumers))


LINEARS = linears_of(LLAMA.decoder)
QKV = LINEARS[:3]
IDS = random_ids(2, 24)
LOUD = (3, 17, 40)
"""Channels that are made outliers, of those of every producer."""


def of_kind(config: type, model: type, **changes: Any) -> Callable[[], PreTrainedModel]:
    """A maker of a random model of two layers, 4 query heads on 2 KV heads of width 16."""

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        known = tiny_config(num_hidden_layers=2).to_dict()
        fields = {name: value for name, value in known.items() if name not in ("model_type", "architectures")}
        return randomized(model(config(**{**fields, **changes})))

    return make


KINDS = {
    "llama": of_kind(LlamaConfig, LlamaForCausalLM),
    "llama with biases": of_kind(LlamaConfig, LlamaForCausalLM, attention_bias=True, mlp_bias=True),
    "llama with a KV head per head": of_kind(LlamaConfig, LlamaForCausalLM, num_key_value_heads=4),
    "mistral": of_kind(MistralConfig, MistralForCausalLM),
    "qwen2": of_kind(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": of_kind(Qwen3Config, Qwen3ForCausalLM),
    "phi3": of_kind(
        Phi3Config, Phi3ForCausalLM, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}
    ),
    "smollm3": of_kind(SmolLM3Config, SmolLM3ForCausalLM, no_rope_layers=[1, 0], attention_bias=True),
}


@torch.no_grad()
def with_outliers(model: PreTrainedModel, gain: float = 40.0) -> PreTrainedModel:
    """The same function, where some channels of every input are loud, and those of norms off their middle too."""
    decoder = architecture_of(model.config).decoder
    for layer in model.model.layers:
        for subgraph in forwards(decoder):
            producer = layer.get_submodule(subgraph.producer)
            loud, offset = torch.tensor(LOUD), decoder.norm_offset if subgraph.is_norm else 0.0
            if subgraph.by_heads:
                loud = loud[:2]
            if subgraph.part:
                loud += len(producer.weight) - (32 if subgraph.by_heads else len(producer.weight) // 2)
            producer.weight[loud] = (producer.weight[loud] + offset) * gain - offset
            if not subgraph.by_heads:
                for name in subgraph.consumers:
                    layer.get_submodule(name).weight[:, list(LOUD)] /= gain
    return model


def seen(x: torch.Tensor) -> LinearInputs:
    """What calibration would know of `[..., K]`."""
    rows = x.detach().float().flatten(0, -2)
    magnitude, square = rows.abs().mean(dim=0), rows.square().mean(dim=0)
    return LinearInputs(rows.amin(dim=0), rows.amax(dim=0), magnitude, square, rows)


@torch.no_grad()
def layer_inputs(model: PreTrainedModel) -> list[dict[str, LinearInputs]]:
    """The inputs of all linears of each layer; those given the same tensor have the same object."""
    found: list[dict[str, LinearInputs]] = [{} for _ in model.model.layers]
    linears = linears_of(architecture_of(model.config).decoder)
    last: list[Any] = [None, None]

    def see(layer: int, name: str, x: torch.Tensor) -> None:
        if x is not last[0]:
            last[:] = x, seen(x)
        found[layer][name] = last[1]

    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args, n=number, name=name: see(n, name, args[0]))
        for number, layer in enumerate(model.model.layers)
        for name in linears
    ]
    model(IDS)
    for hook in hooks:
        hook.remove()
    return found


def int8_error(weight: torch.Tensor, inputs: LinearInputs, exact: torch.Tensor) -> torch.Tensor:
    """Of a linear with a scale per output channel of the weight, and a scale and a zero point of the whole input."""
    low, high = inputs.low.amin().clamp_max(0), inputs.high.amax().clamp_min(0)
    step = ((high - low) / 255).clamp_min(1e-12)
    zero = (-low / step).round()
    rows = (((inputs.rows / step).round() + zero).clamp(0, 255) - zero) * step
    steps = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-12)
    return (rows @ ((weight / steps).round() * steps).T - exact).square().sum()


Rewritten = dict[Subgraph, Smoothing]


def smooth(
    layer: nn.Module,
    inputs: dict[str, LinearInputs],
    method: str,
    quantized: tuple[str, ...],
    error: OutputError,
    decoder: Decoder = LLAMA.decoder,
) -> Rewritten:
    return smooth_layer(layer, inputs, method, quantized, error, decoder)


def smoothed(model: PreTrainedModel, method: str, quantized: tuple[str, ...] = ()) -> list[Rewritten]:
    """Smooth every layer by what is seen before; all linears are to be quantized if none are named."""
    layers = zip(model.model.layers, layer_inputs(model), strict=True)
    decoder = architecture_of(model.config).decoder
    quantized = quantized or linears_of(decoder)
    return [smooth(layer, inputs, method, quantized, int8_error, decoder) for layer, inputs in layers]


def total_error(layer: nn.Module, inputs: dict[str, LinearInputs], names: tuple[str, ...]) -> float:
    """The squared error of some linears of a layer."""
    weights = {name: layer.get_submodule(name).weight.detach().float() for name in names}
    return sum(float(int8_error(w, inputs[name], inputs[name].rows @ w.T)) for name, w in weights.items())
