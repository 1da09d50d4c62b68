"""What is known of a decoder's layers holds as long as the modules are those that were read, and no longer."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.decoder_step import fused_pass
from octavo.common.runtime.fused_decoder import IS_ZOO
from octavo.common.runtime.norm_bias import add_norm_bias
from octavo.ops.decoder.cpu import DECODER_KERNEL

from ...support import with_cache
from ...tolerances import TOLERANCES
from .fused_models import model_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(DECODER_KERNEL.supports() is not None, reason="there is no C compiler"),
]

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def last_states(model: nn.Module, is_zoo: bool = True, scheme: str = "int8-token") -> torch.Tensor:
    """The states behind a pass, in one call if that is served, or module by module."""
    setattr(model.base_model, IS_ZOO, is_zoo)
    with torch.no_grad():
        output = model.base_model(input_ids=IDS, **with_cache(QuantizedCache(model.config, scheme)))
    setattr(model.base_model, IS_ZOO, True)
    return output.last_hidden_state


def is_fused(model: nn.Module) -> bool:
    """Whether a pass goes in one call."""
    with torch.no_grad():
        return fused_pass(model.base_model, {"input_ids": IDS, **with_cache(QuantizedCache(model.config))}) is not None


def _another_weight(model: nn.Module) -> None:
    linear = model.base_model.layers[1].self_attn.v_proj
    linear.weight = nn.Parameter(-linear.weight.detach())


def _other_data(model: nn.Module) -> None:
    linear = model.base_model.layers[1].mlp.down_proj
    linear.weight.data = -linear.weight.data


def _weight_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.base_model.layers[1].mlp.down_proj.weight.neg_()


def _folded_biases_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for linear in (model.base_model.layers[1].self_attn.k_proj, model.base_model.layers[1].self_attn.v_proj):
            linear.bias += 9 * torch.randn(32)


def _other_bias(model: nn.Module) -> None:
    bias = model.base_model.layers[1].self_attn.q_proj.bias
    bias.data = bias.data + 200 * torch.randn(64, dtype=bias.dtype)


def _norm_with_bias(model: nn.Module) -> None:
    add_norm_bias(model.base_model.layers[1].input_layernorm, torch.ones(64))


class _Doubled(nn.Module):
    """An MLP with the linears of another one, which computes something else."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


def _another_mlp(model: nn.Module) -> None:
    model.base_model.layers[1].mlp = _Doubled(model.base_model.layers[1].mlp)


def _another_epsilon(model: nn.Module) -> None:
    model.base_model.norm.variance_epsilon = 0.5


CHANGES = [
    _another_weight, _other_data, _weight_in_place, _folded_biases_in_place, _other_bias, _norm_with_bias, _another_mlp,
    _another_epsilon,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_pass_counts(change: Callable[[nn.Module], None], dtype: torch.dtype) -> None:
    model = model_of("qwen2").to(dtype)
    before = last_states(model)
    change(model)
    found, wanted = last_states(model), last_states(model, is_zoo=False)
    assert (found - wanted).norm() < (wanted - before).norm() / 2
    assert (found - wanted).norm() < wanted.norm() * (0.05 if dtype == torch.bfloat16 else TOLERANCES["decoder layer"])


def test_a_refusal_ends_with_its_reason() -> None:
    model = model_of("llama3")
    assert not is_fused(model.double())
    assert is_fused(model.float())


def test_another_attention_is_heard_of() -> None:
    """What attention reads codes is asked for by name; another one is refused, and not left out."""
    model = model_of("llama3")
    last_states(model)
    model.set_attn_implementation("eager")
    assert not is_fused(model)


def test_a_backward_pass_is_refused_where_only_layers_want_one() -> None:
    model = model_of("llama3")
    model.get_input_embeddings().weight.requires_grad_(False)
    output = model(IDS, **with_cache(QuantizedCache(model.config))).logits
    with pytest.raises(OctavoError, match="has no gradient"):
        output.sum().backward()


def test_what_the_embedding_made_stays_as_it_was() -> None:
    model, seen = model_of("llama3"), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: seen.append(output))
    last_states(model)
    assert torch.equal(seen[0], model.get_input_embeddings().weight[IDS])
