"""Dynamic programming over layers, beside all choices tried one by one."""

import itertools

import pytest
import torch

from octavo.searching.choosing import Choices


def problem(seed: int, layers: int = 4, options: int = 3) -> tuple[list[list[float]], list[list[float]]]:
    """Costs that are whole numbers, and losses."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 12, (layers, options), generator=generator).double()
    return costs.tolist(), torch.rand((layers, options), generator=generator, dtype=torch.float64).tolist()


def total(rows: list[list[float]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(row[option] for row, option in zip(rows, chosen, strict=True))


def every_choice(costs: list[list[float]]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(row)) for row in costs)))


@pytest.mark.parametrize("seed", range(8))
def test_it_loses_as_little_as_the_best_of_all_choices(seed: int) -> None:
    costs, losses = problem(seed)
    choices = Choices(costs, losses)
    for budget in range(int(choices.least), int(choices.most) + 2):
        best = min(total(losses, each) for each in every_choice(costs) if total(costs, each) <= budget)
        chosen = choices.within(budget)
        assert total(costs, chosen) <= budget
        # steps are fractions of these costs, each rounded up: what fits to the last step may miss by layers steps
        if abs(total(losses, chosen) - best) > 1e-12:
            roomy = choices.within(budget + 0.02)
            assert total(losses, roomy) == pytest.approx(best, abs=1e-12) and total(costs, roomy) <= budget


def test_costs_that_are_whole_steps_are_exact() -> None:
    costs, losses = [[0.0, 2.0**14], [0.0, 2.0**14]], [[1.0, 0.0], [3.0, 0.5]]
    choices = Choices(costs, losses)
    assert choices.within(2.0**14) == [0, 1] and choices.within(2.0**15) == [1, 1]
    assert choices.within(2.0**14 - 1) == [0, 0] and choices.within(-1.0) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_choice_below_a_loss_is_found(seed: int) -> None:
    costs, losses = problem(seed)
    choices = Choices(costs, losses)
    for loss in (choices.least_loss(), 0.7, 1.5, 9.0):
        fit = [each for each in every_choice(costs) if total(losses, each) <= loss + 1e-12]
        chosen = choices.below(loss)
        if not fit:
            assert chosen is None
            continue
        assert total(losses, chosen) <= loss + 1e-12
        assert total(costs, chosen) <= min(total(costs, each) for each in fit) + 0.02
    assert choices.below(choices.least_loss() - 1e-6) is None


def test_options_that_cost_the_same_are_told_apart_by_their_losses() -> None:
    choices = Choices([[2.0, 2.0]] * 3, [[0.5, 0.25], [0.125, 1.0], [0.0, 0.0]])
    assert choices.least == choices.most == 6.0
    assert choices.within(6.0)[:2] == [1, 0] and choices.within(5.9) is None


def test_the_front_goes_from_the_cheapest_to_the_least_loss() -> None:
    costs, losses = problem(3)
    found = Choices(costs, losses).front(12)
    sums = [(total(costs, chosen), total(losses, chosen)) for chosen in found]
    assert sums == sorted(sums, key=lambda pair: -pair[1])
    assert sums[0][0] == sum(map(min, costs))
    assert sums[-1][1] == pytest.approx(sum(map(min, losses)))
