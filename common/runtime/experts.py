"""Experts as a list of small MLPs, in the place of transformers' module that holds all of them in two tensors.

Checkpoints hold each linear of each expert on its own, and so do descriptions of quantized ones: the list has their
names, and takes every kind of quantized linear. T tokens, of which each has K of E experts; H hidden size, I width of
an expert.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import first_line

PROBE_SIZE, PROBE_TOLERANCE = 8, 1e-3
"""Channels of random weights by which it is found out what a module computes, and how close it has to come."""
_PROBE_EXPERTS = 2


@dataclass(frozen=True)
class ExpertsFacts:
    """Experts in the place of a layer's MLP, `down(act(gate(x)) * up(x))` each: names within the layer.

    Attributes:
        name: of the list; of transformers' module, before it is one.
        router: of what chooses experts for a token, by its `weight` `[E, H]` times what the norm before it makes.
        gate, up, down: of the projections, within an expert.
        merged_inputs, merged_output: of the parameters of transformers' module: `[E, 2 I, H]`, rows of gate first, and
            `[E, H, I]`.
        activation: of the act within transformers' module.
        count: from a config and the number of a layer, how many it has: 0 where it has the plain MLP.
    """

    name: str
    router: str
    gate: str
    up: str
    down: str
    merged_inputs: str
    merged_output: str
    activation: str
    count: Callable[[Any, int], int]

    def part(self, expert: int, part: str) -> str:
        """Name within the layer of a projection of an expert."""
        return f"{self.name}.{expert}.{part}"

    @property
    def merged(self) -> dict[str, tuple[str, ...]]:
        """The projections of an expert that lie one behind the other in each parameter of transformers' module."""
        return {self.merged_inputs: (self.gate, self.up), self.merged_output: (self.down,)}


class Expert(nn.Module):
    """`down(act(gate(x)) * up(x))`.

    Args:
        weights: of the projections by their names, which are `gate`, `up` and `down` of the facts.
    """

    def __init__(self, facts: ExpertsFacts, weights: dict[str, nn.Parameter], activation: nn.Module) -> None:
        super().__init__()
        self._parts = facts.gate, facts.up, facts.down
        for name in self._parts:
            rows, columns = weights[name].shape
            linear = nn.Linear(columns, rows, bias=False, device="meta")
            linear.weight = weights[name]
            self.add_module(name, linear)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, H] -> [T, H]`."""
        gate, up, down = (getattr(self, name) for name in self._parts)
        return down(self.activation(gate(x)) * up(x))


class ExpertList(nn.ModuleList):
    """All experts of a layer, each of which computes the tokens that it was chosen for."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As of transformers' module: states `[T, H]`, experts and their weights `[T, K]` to `[T, H]`."""
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            tokens, choice = torch.where(top_k_index == number)
            made = self[number](hidden_states[tokens]) * top_k_weights[tokens, choice, None]
            output.index_add_(0, tokens, made.to(output.dtype))
        return output


def _listed(merged: nn.Module, facts: ExpertsFacts) -> ExpertList:
    """What transformers' module holds, as a list; weights are copies."""

    def weights(expert: int) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(rows.clone(), requires_grad=getattr(merged, parameter).requires_grad)
            for parameter, names in facts.merged.items()
            for name, rows in zip(names, getattr(merged, parameter)[expert].detach().chunk(len(names)), strict=True)
        }

    activation = getattr(merged, facts.activation)
    return ExpertList(
        Expert(facts, weights(expert), activation) for expert in range(len(getattr(merged, facts.merged_output)))
    )


def list_layer_experts(layer: nn.Module, facts: ExpertsFacts) -> None:
    """Put a list in the place of transformers' module in a decoder layer, on its device."""
    layer.set_submodule(facts.name, _listed(layer.get_submodule(facts.name), facts))


def _with_random(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A module with other parameters, and without hooks."""
    probe, generator = copy.copy(module), torch.Generator().manual_seed(0)
    probe._parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)
        for name, shape in shapes.items()
    }
    probe._forward_hooks, probe._forward_pre_hooks = {}, {}
    vars(probe).pop("forward", None)  # of accelerate, say, which would run the module itself
    return probe


def _is_as_listed(merged: nn.Module, facts: ExpertsFacts) -> bool:
    """Whether transformers' module computes what a list of its experts does, by what its class has as its forward."""
    size, experts = PROBE_SIZE, min(_PROBE_EXPERTS, len(getattr(merged, facts.merged_output)))
    probe = _with_random(merged, {name: (experts, len(parts) * size, size) for name, parts in facts.merged.items()})
    generator = torch.Generator().manual_seed(1)
    states, weights = torch.randn(3, size, generator=generator), torch.rand(3, 1, generator=generator)
    index = torch.tensor([[0], [experts - 1], [0]])
    found = inspect.unwrap(type(merged).forward)(probe, states, index, weights)
    return torch.allclose(found, _listed(probe, facts)(states, index, weights), atol=PROBE_TOLERANCE)


def _reads_products(router: nn.Module) -> bool:
    """Whether a router knows of its inputs nothing but what its weight makes of them, so that both can be rescaled."""
    probe, generator = _with_random(router, {"weight": tuple(router.weight.shape)}), torch.Generator().manual_seed(1)
    width = router.weight.shape[1]
    states, scale = torch.randn(2, width, generator=generator), torch.rand(width, generator=generator) + 0.5
    found = probe(states)
    probe._parameters = {"weight": nn.Parameter(probe.weight * scale, requires_grad=False)}
    pairs = zip(found, probe(states / scale), strict=True)
    return all(torch.allclose(a, b, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE) for a, b in pairs)


def experts_faults(layer: nn.Module, facts: ExpertsFacts, count: int) -> Iterator[tuple[str, str]]:
    """What about transformers' experts and router in a layer is not as stated: the name, and what is the matter."""
    merged, router = layer.get_submodule(facts.name), layer.get_submodule(facts.router)
    for name, module, stated in ((facts.name, merged, set(facts.merged)), (facts.router, router, {"weight"})):
        held = dict(module.named_parameters())
        if set(held) != stated:
            yield name, f"is stated to hold {', '.join(sorted(stated))}, and holds {', '.join(sorted(held))}"
            return
        if any(len(parameter) != count for parameter in held.values()):
            yield name, f"is stated to be of {count} experts, and is of {len(next(iter(held.values())))}"
            return
    checks = {facts.name: partial(_is_as_listed, merged, facts), facts.router: partial(_reads_products, router)}
    for name, check in checks.items():
        try:
            if not check():
                yield name, f"computes something else in {type(layer.get_submodule(name)).__name__} than what is stated"
        except (RuntimeError, TypeError, AttributeError) as error:
            yield name, f"does not compute what is stated ({first_line(error)})"
