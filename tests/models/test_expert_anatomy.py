"""Experts that only look like what is stated are refused by the name of what differs."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from octavo import prepare
from octavo.common.architecture import check_anatomy
from octavo.common.errors import OctavoError
from octavo.models.qwen3_moe import ARCHITECTURE

from .test_qwen3_moe import DENSE, tiny_moe

pytestmark = pytest.mark.usefixtures("one_thread")


class Interleaved(nn.Module):
    """Experts whose rows of gate and up take turns."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = stock.gate_up_proj, stock.down_proj, stock.act_fn

    def forward(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        made = torch.einsum("th,eih->tei", states, self.gate_up_proj)
        made = torch.einsum("tei,ehi->teh", self.act_fn(made[..., ::2]) * made[..., 1::2], self.down_proj)
        return (made.gather(1, index[..., None].expand(-1, -1, made.shape[2])) * weights[..., None]).sum(dim=1)


class Normed(nn.Module):
    """A router that divides its inputs by their size."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock, self.weight = [stock], stock.weight

    def forward(self, states: torch.Tensor) -> Any:
        return linear(states / states.norm(dim=-1, keepdim=True), self.weight).topk(2)


def _interleave(model: Any) -> None:
    model.model.layers[2].mlp.experts = Interleaved(model.model.layers[2].mlp.experts)


def _norm(model: Any) -> None:
    model.model.layers[0].mlp.gate = Normed(model.model.layers[0].mlp.gate)


def _bias(model: Any) -> None:
    model.model.layers[0].mlp.gate.bias = nn.Parameter(torch.zeros(4))


def _dense(model: Any) -> None:
    model.config.mlp_only_layers = [0, DENSE]


def _fewer(model: Any) -> None:
    model.config.num_experts = 3


def _more(model: Any) -> None:
    model.model.layers[0].mlp.gate.top_k = 5


OTHERWISE = {
    "layers.2.mlp.experts: computes something else in Interleaved": _interleave,
    "layers.0.mlp.gate: computes something else in Normed": _norm,
    "layers.0.mlp.gate: is stated to hold weight, and holds bias, weight": _bias,
    "layers.0.mlp.gate: does not compute what is stated .selected index k out of range": _more,
    "layers.0.mlp.down_proj: is stated and not there": _dense,
    "layers.0.mlp.experts: is stated to be of 3 experts, and is of 4": _fewer,
}


@pytest.mark.parametrize("fault", OTHERWISE)
def test_experts_of_another_anatomy_are_refused(fault: str) -> None:
    model = tiny_moe()
    check_anatomy(model, ARCHITECTURE.decoder, "models/qwen3_moe")
    OTHERWISE[fault](model)
    with pytest.raises(OctavoError, match=fault):
        prepare(model)


def test_forwards_that_another_library_put_around_modules_do_not_hide_what_they_compute() -> None:
    """As accelerate does with every module of a model on several devices."""
    model = tiny_moe()
    for module in model.model.modules():
        module.forward = partial(module.forward)
    check_anatomy(model, ARCHITECTURE.decoder, "models/qwen3_moe")
