"""Anatomies: what each architecture states is what its models are, and a model that only looks alike is refused."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from octavo import QuantizedCache, prepare
from octavo.common.errors import OctavoError
from octavo.common.runtime.decoder import anatomy_fault, check_anatomy, fits_attention, multiplies_by, stated_decoder
from octavo.models.llama3 import ARCHITECTURE as LLAMA
from octavo.models.qwen3 import ARCHITECTURE as QWEN3

from ...support import random_ids, tiny_llama, with_cache
from ...tolerances import TOLERANCES


class PlusOneNorm(nn.Module):
    """A norm that multiplies by `1 + w`, as Gemma's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states / hidden_states.square().mean(-1, keepdim=True).add(1e-6).sqrt() * (1 + self.weight)


def with_extra_norm(model: PreTrainedModel) -> None:
    model.model.layers[1].pre_feedforward_layernorm = LlamaRMSNorm(64)


def with_key_norm(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.k_norm = LlamaRMSNorm(16)


def with_offset_norms(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.post_attention_layernorm = PlusOneNorm(64)


def with_layer_norm(model: PreTrainedModel) -> None:
    model.model.layers[0].input_layernorm = nn.LayerNorm(64, bias=False)


def with_fused_projection(model: PreTrainedModel) -> None:
    attention = model.model.layers[0].self_attn
    attention.qkv_proj = nn.Linear(64, 128, bias=False)
    del attention.q_proj, attention.k_proj, attention.v_proj


def with_other_final_norm(model: PreTrainedModel) -> None:
    model.model.norm = PlusOneNorm(64)


def without_rope(model: PreTrainedModel) -> None:
    model.config.no_rope_layers = [1, 0, 1]


def with_partial_rope(model: PreTrainedModel) -> None:
    model.config.rope_parameters["partial_rotary_factor"] = 0.5


CHANGED: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "an extra norm": (with_extra_norm, r"layers\.1\.pre_feedforward_layernorm: is there and not stated"),
    "a norm of keys": (with_key_norm, r"layers\.0\.self_attn\.k_norm: is there and not stated"),
    "(1 + w) norms": (with_offset_norms, r"layers\.0\.post_attention_layernorm: multiplies by 1 \+ w"),
    "a LayerNorm": (with_layer_norm, r"layers\.0\.input_layernorm: .*LayerNorm computes something else"),
    "a fused projection": (with_fused_projection, r"layers\.0\.self_attn\.k_proj: is stated and not there"),
    "another last norm": (with_other_final_norm, "norm: is not of the form"),
    "a layer without RoPE": (without_rope, "layer 1 is without RoPE"),
    "partial RoPE": (with_partial_rope, "RoPE turns 0.5 of the channels"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_model_with_another_anatomy_is_refused_by_name(change: str) -> None:
    apply, message = CHANGED[change]
    model = tiny_llama()
    check_anatomy(model, LLAMA.decoder, "models/llama3")
    apply(model)
    with pytest.raises(OctavoError, match=f"^LlamaForCausalLM: .*{message}.*models/llama3"):
        check_anatomy(model, LLAMA.decoder, "models/llama3")


@pytest.mark.parametrize("change", CHANGED)
def test_the_two_line_use_checks_the_stock_model_the_same_way(change: str) -> None:
    apply, message = CHANGED[change]
    model = tiny_llama()
    apply(model)
    before = type(model), model.config._attn_implementation
    with pytest.raises(OctavoError, match=message):
        prepare(model)
    assert (type(model), model.config._attn_implementation) == before, "what is refused stays as it was"


def test_norms_of_q_and_k_are_those_of_a_head() -> None:
    """OLMo 2 norms all heads at once, by a module of the same name."""
    settings = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=32, intermediate_size=64, head_dim=16, **settings))
    assert anatomy_fault(model, QWEN3.decoder) is None
    model.model.layers[0].self_attn.k_norm = LlamaRMSNorm(32)
    assert "k_norm: norms 32 channels, and is stated to norm the 16 of a head" in anatomy_fault(model, QWEN3.decoder)


def test_a_model_on_the_meta_device_is_checked_too() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=32))
    assert anatomy_fault(model, LLAMA.decoder) is None
    with torch.device("meta"):
        with_extra_norm(model)
    assert "pre_feedforward_layernorm" in anatomy_fault(model, LLAMA.decoder)


@pytest.mark.parametrize(
    ("norm", "offset"),
    [(LlamaRMSNorm(16), 0.0), (PlusOneNorm(16), 1.0), (nn.LayerNorm(16), None), (nn.Identity(), None)],
)
def test_the_form_of_a_norm_is_found_whatever_its_weight(norm: nn.Module, offset: float | None) -> None:
    before = copy.deepcopy(norm.state_dict())
    assert multiplies_by(norm) == offset
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_an_unknown_model_is_taken_by_its_attention() -> None:
    model: Any = tiny_llama()
    assert fits_attention(model, LLAMA.decoder) and not fits_attention(model, QWEN3.decoder)
    with_key_norm(model)
    assert not fits_attention(model, LLAMA.decoder)


def test_nothing_is_said_of_a_model_that_nobody_stated() -> None:
    with pytest.raises(OctavoError, match="LlamaForCausalLM: its anatomy is not stated"):
        stated_decoder(tiny_llama())


class OtherLinear(nn.Module):
    """A linear of another library: its tensors are buffers, and a part of it may have parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().clone())
        self.adapter = nn.Linear(linear.in_features, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes)


def test_two_lines_serve_linears_of_another_library_and_a_conversion_does_not() -> None:
    model, ids = tiny_llama(), random_ids(1, 20)
    with torch.no_grad():
        floats = model(ids).logits
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        model.model.layers[1].set_submodule(name, OtherLinear(model.model.layers[1].get_submodule(name)))
    with pytest.raises(OctavoError, match=r"layers\.1\.mlp\.down_proj: is stated and not there"):
        check_anatomy(model, LLAMA.decoder, "models/llama3")
    with torch.no_grad():
        found = prepare(model)(ids, **with_cache(QuantizedCache(model.config, "float"))).logits
    assert (found - floats).abs().max() < TOLERANCES["logits"]


def test_a_forward_that_another_library_put_around_a_norm_does_not_hide_its_form() -> None:
    """As accelerate does with every module of a model on several devices."""
    model = tiny_llama()
    for module in model.model.modules():
        module.forward = partial(module.forward)
    assert anatomy_fault(model, LLAMA.decoder) is None
    model.model.norm = PlusOneNorm(64)
    model.model.norm.forward = partial(model.model.norm.forward)
    assert anatomy_fault(model, LLAMA.decoder).startswith("norm: is not of the form")
