"""Norms with a bias: loaded, saved, and cast as their weights are."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from octavo.common.convert.outliers.subgraphs import norm_subgraphs
from octavo.common.runtime.norm_bias import ShiftedNorm, add_norm_bias
from octavo.models.llama3 import ARCHITECTURE as LLAMA

from ...metrics import relative_rmse
from ...support import tiny_llama
from ...tolerances import TOLERANCES
from ..convert.outliers.layers import (
    IDS,
    smoothed,
    with_outliers,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def shifted() -> tuple[PreTrainedModel, torch.Tensor]:
    """A model after "m2", and the logits from before."""
    model = with_outliers(tiny_llama())
    with torch.no_grad():
        expected = model(IDS).logits
    smoothed(model, "m2")
    return model, expected


class ShiftedLlama(LlamaForCausalLM):
    """A Llama whose norms before attention and MLP, and their linears, have biases."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            for subgraph in norm_subgraphs(LLAMA.decoder):
                norm = layer.get_submodule(subgraph.producer)
                add_norm_bias(norm, torch.empty_like(norm.weight))
                for name in subgraph.consumers:
                    linear = layer.get_submodule(name)
                    linear.bias = nn.Parameter(torch.empty_like(linear.weight[:, 0]))


@torch.no_grad()
def test_norm_biases_are_loaded(tmp_path: Path) -> None:
    model, expected = shifted()
    state = model.state_dict()
    assert {"model.layers.0.input_layernorm.bias", "model.layers.2.post_attention_layernorm.bias"} <= state.keys()
    with torch.device("meta"):
        empty = ShiftedLlama(model.config)
    assert empty.model.layers[0].input_layernorm.bias.is_meta
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.model.layers[1].input_layernorm.bias, model.model.layers[1].input_layernorm.bias)
    model.save_pretrained(tmp_path)
    loaded = ShiftedLlama.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=TOLERANCES["logits"] * float(expected.std()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_norm_biases_change_their_dtype(dtype: torch.dtype) -> None:
    model, expected = shifted()
    norm = model.to(dtype).model.layers[0].input_layernorm
    assert norm.bias.dtype == norm(torch.ones(1, 64, dtype=dtype)).dtype == dtype
    assert relative_rmse(model(IDS).logits.float(), expected) < 0.1


@torch.no_grad()
def test_a_norm_and_its_bias() -> None:
    norms = [copy.deepcopy(tiny_llama().model.norm) for _ in range(2)]
    x, bias = torch.randn(2, 3, 64), torch.randn(64)
    plain = norms[0](x)
    for norm in norms:
        add_norm_bias(norm, bias)
    assert isinstance(norms[0], ShiftedNorm) and type(norms[0]) is type(norms[1])
    assert type(norms[0]).__name__ == "ShiftedLlamaRMSNorm" and list(norms[0].state_dict()) == ["weight", "bias"]
    assert torch.equal(norms[0](x), plain + bias)
    assert torch.equal(copy.deepcopy(norms[0])(x), plain + bias)
    add_norm_bias(norms[0], 2 * bias)
    assert torch.equal(norms[0](x), plain + 2 * bias)
