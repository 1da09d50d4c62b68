"""Budgets that the sum over layers only estimates: of KL as a whole, and of bytes as stored."""

import pytest
import torch
from transformers import LlamaConfig

from octavo.common.errors import OctavoError
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.searching.sides import options_of, sides_of
from octavo.searching.targets import Costs, below_kl, within_bytes

LAYERS = 4
LEAST = 3
"""The number of octavo-3 for K and V among the options."""


def costs_of(*losses: float, kind: type[Costs] = Costs) -> Costs:
    """A model whose layers all lose the same by each option, of K and V in octavo-2 or octavo-3."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    options = options_of(sides_of([load_scheme("octavo-2"), load_scheme("octavo-3")], []))
    return kind(LlamaConfig(**sizes), torch.float32, options, [list(losses)] * LAYERS, 2048)


def test_a_kl_that_the_least_loss_keeps_is_met_though_sums_are_far_off() -> None:
    costs = costs_of(0.25, 0.25, 0.25, 0.0)

    def whole(scheme: Scheme) -> float:
        return 0.0 if costs.bits(scheme) > 3.4 else 1.05

    assert below_kl(costs, 1.0, whole) == [LEAST] * LAYERS
    with pytest.raises(OctavoError, match=r"--kl 1: the least that these schemes lose is 1\.1; give more"):
        below_kl(costs, 1.0, lambda scheme: 1.05)


class Dearer(Costs):
    """Stores more than what is counted, and counts how often it is asked."""

    asked = 0

    def nbytes(self, scheme: Scheme) -> int:
        Dearer.asked += 1
        return super().nbytes(scheme) + 50_000


def test_a_budget_of_bytes_is_met_in_few_rounds() -> None:
    costs = costs_of(0.9, 0.5, 0.4, 0.0, kind=Dearer)
    dearest = costs.nbytes(costs.scheme([LEAST] * LAYERS))
    chosen = within_bytes(costs, dearest - 5)
    assert costs.nbytes(costs.scheme(chosen)) <= dearest - 5 and chosen != [LEAST] * LAYERS
    assert Dearer.asked < 60
