"""What each option of a preset or scheme adds: differences between candidates that have one option more each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .rows import Row
from .table import MB, Cell, Table, figure_cell


@dataclass(frozen=True)
class Contribution:
    """An option, and the figures with it and without those behind it.

    Attributes:
        of: the preset or scheme that has it.
        option, about: its name, and what states it.
        kl: to the float model, with it; None where no text was measured.
        adds_kl: how much more that is than before it; negative where it makes good.
        megabytes: of the weights' files and of the cache, as allocated at the longest prompt, in 1e6 bytes.
        saves: how many fewer than before it.
        step: milliseconds of a token there; None where none was timed.
        saves_time: how many fewer than before it.
    """

    of: str
    option: str
    about: str
    kl: float | None
    adds_kl: float | None
    megabytes: float
    saves: float
    step: float | None
    saves_time: float | None

    def as_json(self) -> dict[str, Any]:
        """The same, for a file."""
        return dict(vars(self))


def _step(row: Row) -> float | None:
    return row.lengths[row.context].step if row.lengths else None


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def contributions_of(plain: Row, rows: Sequence[Row]) -> dict[str, list[Contribution]]:
    """By preset and scheme, what each of its options adds to those before it, the float model being what is first.

    Args:
        rows: of the steps alone, in their order.
    """
    found: dict[str, list[Contribution]] = {}
    for row in rows:
        done = found.setdefault(row.of, [])
        before = done[-1] if done else None
        kl = 0.0 if before is None else before.kl
        size, step = (plain.nbytes / MB, _step(plain)) if before is None else (before.megabytes, before.step)
        own_size, own_step = row.nbytes / MB, _step(row)
        done.append(
            Contribution(
                row.of, row.option, row.stated, row.kl, _less(row.kl, kl), own_size, size - own_size, own_step,
                _less(step, own_step),
            )
        )  # fmt: skip
    return found


def contribution_table(found: Sequence[Contribution]) -> Table:
    """The table of a preset or scheme, without columns in which nothing stands."""
    lines = [
        (
            ("option", Cell(each.option, each.option)),
            ("KL it adds", figure_cell(each.adds_kl, "{:+.5f}")),
            ("KL with it", figure_cell(each.kl, "{:.5f}")),
            ("MB it saves", figure_cell(each.saves, "{:,.3g}")),
            ("MB with it", figure_cell(each.megabytes, "{:,.1f}")),
            ("ms a token it saves", figure_cell(each.saves_time, "{:,.3g}")),
            ("ms a token with it", figure_cell(each.step, "{:,.3g}")),
            ("what states it", Cell(each.about, each.about)),
        )
        for each in found
    ]
    kept = [index for index in range(len(lines[0])) if any(line[index][1].text for line in lines)]
    return Table(
        tuple(lines[0][index][0] for index in kept), tuple(tuple(line[index][1] for index in kept) for line in lines)
    )


def note(tokens: int) -> str:
    """What the figures are, in a sentence."""
    return (
        "Each option is added to those above it, in this order, and measured with them; another order gives other "
        f"shares of the same sum. MB: weights and the cache at {tokens:,} tokens. Below zero: it makes good, or costs. "
        "Candidates are timed one after another: a difference within what the machine swings by says nothing."
    )
