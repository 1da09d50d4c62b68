"""Which option each layer takes, so that all together cost no more than a budget and lose least: dynamic programming.

L layers, O options.
"""

import math
from collections.abc import Sequence

import torch

STEPS = 2**15
"""Steps between what the cheapest and the dearest choice cost; each layer's cost is rounded up to one."""
_SLACK = 1e-9
"""Share of a step by which a cost that is whole may miss it."""


class Choices:
    """The best choices of one option for each layer, for every budget.

    Losses of layers add up. `best[b]` is the smallest sum of losses of b steps above the cheapest choice: of the
    layers so far, `best[b] = min over o of (best without this layer)[b - cost[o]] + loss[o]`.

    Args:
        costs, losses: of each option in each layer, `[L][O]`.

    Attributes:
        least, most: costs between which budgets make a difference.
    """

    def __init__(self, costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]) -> None:
        self.least, self.most = sum(map(min, costs)), sum(map(max, costs))
        self._step = (self.most - self.least) / STEPS or 1.0
        self._costs = [[math.ceil((cost - min(row)) / self._step - _SLACK) for cost in row] for row in costs]
        size = sum(map(max, self._costs)) + 1
        best, self._taken = torch.zeros(size, dtype=torch.float64), []
        for steps, row in zip(self._costs, losses, strict=True):
            found = torch.full((len(row), size), math.inf, dtype=torch.float64)
            for option, (cost, loss) in enumerate(zip(steps, row, strict=True)):
                found[option, cost:] = best[: size - cost] + loss
            best, taken = found.min(dim=0)
            self._taken.append(taken.to(torch.int16))
        self._best = best

    def within(self, budget: float) -> list[int] | None:
        """The option of each layer whose costs make `budget` at most; None if there are none."""
        room = math.floor((budget - self.least) / self._step + _SLACK)
        return None if room < 0 else self._traced(min(room, len(self._best) - 1))

    def budget_under(self, chosen: Sequence[int]) -> float:
        """The largest budget that a choice does not keep."""
        return self.least + self._step * (sum(row[option] for row, option in zip(self._costs, chosen, strict=True)) - 1)

    def below(self, loss: float) -> list[int] | None:
        """The cheapest ones whose losses make `loss` at most; None if there are none."""
        fit = (self._best <= loss).nonzero()
        return self._traced(int(fit[0])) if len(fit) else None

    def least_loss(self) -> float:
        """The smallest sum of losses at any cost."""
        return float(self._best[-1])

    def front(self, count: int) -> list[list[int]]:
        """At most `count` choices from the cheapest to the dearest one that gains anything, evenly by cost."""
        last = int((self._best == self._best[-1]).nonzero()[0])
        rooms = sorted({round(last * index / (count - 1)) for index in range(count)})
        return [self._traced(room) for room in rooms]

    def _traced(self, room: int) -> list[int]:
        chosen = []
        for steps, taken in zip(reversed(self._costs), reversed(self._taken), strict=True):
            option = int(taken[room])
            chosen.append(option)
            room -= steps[option]
        return chosen[::-1]
