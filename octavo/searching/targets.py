"""From costs of layers to a scheme that keeps a budget: of bits, of memory, of time, or of KL.

L layers, O options.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..common.errors import OctavoError
from ..common.runtime.cache.sizes import kv_bytes_of_layers
from ..common.runtime.schemes.kv_scheme import CROP_ROOM, Scheme
from ..counting import counted_bits
from ..planning.cache import cache_size
from .choosing import Choices
from .latency import check_milliseconds
from .sides import Option, layered

ROUNDS = 8
"""How often a budget of KL is aimed at before the best that was found is taken."""
_EXACT = 1e-9
"""What bits may be above a budget by rounding."""


@dataclass(frozen=True)
class Costs:
    """What is known of a model's layers.

    Attributes:
        config: of its decoder.
        dtype: of its states.
        options: that each layer has.
        losses: KL of each option in each layer, `[L][O]`.
        context: tokens over which sinks and windows are spread when bits are counted.
        seconds: of a decode step by each option in each layer, `[L][O]`, where the budget is of time.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    options: Sequence[Option]
    losses: Sequence[Sequence[float]]
    context: int
    seconds: Sequence[Sequence[float]] | None = None

    def bits(self, scheme: Scheme) -> float:
        """Bits of an element of K and V, as every table counts them."""
        return counted_bits(self.config, scheme, self.context, self.dtype)

    def nbytes(self, scheme: Scheme) -> int:
        """Bytes in use of a `QuantizedCache` of one sequence, as `octavo plan` counts them."""
        return cache_size(self.config, scheme, self.context, dtype=self.dtype).kept

    def choices_by_bits(self) -> Choices:
        """Choices that cost bits, each layer its part of the mean."""
        row = [self.bits(option.scheme) / len(self.losses) for option in self.options]
        return Choices([row] * len(self.losses), self.losses)

    def choices_by_bytes(self) -> Choices:
        """Choices that cost bytes of a cache."""
        columns = [kv_bytes_of_layers(self.config, option.scheme, self.context, CROP_ROOM) for option in self.options]
        return Choices([list(row) for row in zip(*columns, strict=True)], self.losses)

    def choices_by_seconds(self) -> Choices:
        """Choices that cost time; K and V of a layer are read by one kernel, so that pairs cost and not sides."""
        return Choices(self.seconds, self.losses)

    def predicted_seconds(self, chosen: Sequence[int]) -> float:
        """The time of a choice if those of its layers add up."""
        return sum(row[option] for row, option in zip(self.seconds, chosen, strict=True))

    def scheme(self, chosen: Sequence[int], name: str = "searched", origin: str = "") -> Scheme:
        """The scheme of a choice."""
        return layered(name, origin, [self.options[option].scheme for option in chosen])

    def predicted(self, chosen: Sequence[int]) -> float:
        """The KL of a choice if those of its layers add up."""
        return sum(row[option] for row, option in zip(self.losses, chosen, strict=True))


def within_bits(costs: Costs, bits: float) -> list[int]:
    """The choice that loses least with no more than so many bits of an element.

    Raises:
        OctavoError: there is none.
    """
    choices = costs.choices_by_bits()
    chosen = choices.within(bits + _EXACT)
    if chosen is None:
        raise OctavoError(
            f"--bits {bits:g}: these schemes take from {choices.least:.2f} to {choices.most:.2f} bits at "
            f"{costs.context:,} tokens; give a number between, or other --schemes"
        )
    return chosen


def within_bytes(costs: Costs, memory: int) -> list[int]:
    """The choice that loses least with a cache of no more than so many bytes.

    Raises:
        OctavoError: there is none.
    """
    choices, budget = costs.choices_by_bytes(), float(memory)
    while (chosen := choices.within(budget)) is not None:
        excess = costs.nbytes(costs.scheme(chosen)) - memory
        if excess <= 0:
            return chosen
        budget = min(budget - excess, choices.budget_under(chosen))  # windows were counted at their mean size
    least, most = (costs.nbytes(costs.scheme(choices.within(end))) for end in (choices.least, choices.most))
    raise OctavoError(
        f"--memory: {memory / 1e6:,.4g} MB; at {costs.context:,} tokens the cache takes from {least / 1e6:,.4g} to "
        f"{most / 1e6:,.4g} MB with these schemes; give more, or a smaller --context"
    )


def within_milliseconds(costs: Costs, milliseconds: float) -> list[int]:
    """The choice that loses least of those whose layers take no more time in sum.

    Raises:
        OctavoError: there is none.
    """
    check_milliseconds(milliseconds, costs.options, costs.seconds, costs.context)
    return costs.choices_by_seconds().within(milliseconds / 1e3)


def below_kl(costs: Costs, kl: float, whole: Callable[[Scheme], float]) -> list[int]:
    """The choice of the fewest bits that loses no more, as a whole and not as a sum over layers.

    The sum that is allowed is changed by the ratio of the two until the whole keeps the budget and wastes little of it.

    Args:
        whole: measures a scheme.

    Raises:
        OctavoError: even the dearest choice loses more.
    """
    choices, aim = costs.choices_by_bits(), kl
    found: list[int] | None = None
    seen: set[tuple[int, ...]] = set()
    for _ in range(ROUNDS):
        chosen = choices.below(max(aim, choices.least_loss()))
        if tuple(chosen) in seen:
            break
        seen.add(tuple(chosen))
        measured = whole(costs.scheme(chosen))
        if measured <= kl and (found is None or costs.bits(costs.scheme(chosen)) < costs.bits(costs.scheme(found))):
            found = chosen
        if measured > kl and aim <= choices.least_loss():
            break
        aim *= kl / max(measured, kl / 4)
        if measured > kl:  # or the same choice would come again
            aim = min(aim, costs.predicted(chosen) * (1 - 1e-9))
    if found is None:
        chosen = choices.below(choices.least_loss())
        measured = whole(costs.scheme(chosen))
        if measured <= kl:
            return chosen
        raise OctavoError(
            f"--kl {kl:g}: the least that these schemes lose is {measured:.2g}; give more, or --schemes of more bits "
            "(octavo-8)"
        )
    return found
