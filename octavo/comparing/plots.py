"""Which plots a page has, by what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from .advice import front
from .axes import linear, logarithmic
from .contributions import Contribution
from .rows import Row
from .svg import Point, bars, lines, scatter, waterfall

SMALLEST_KL = 1e-8
"""Of what differs by less, or by nothing, the logarithm is that of this."""
MB = 1e6


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
        title, note: above and below it.
        svg: itself.
        named: the series that its colours stand for, where they are not named in it.
    """

    title: str
    note: str
    svg: str
    named: tuple[str, ...] = ()


def plots_of(rows: Sequence[Row]) -> list[Plot]:
    """The plots of what was measured, in the order in which they stand on the page."""
    found = [_pareto(rows)] if any(row.kl is not None for row in rows) else []
    for key in next(row for row in rows if row.is_float).recall:
        found.append(_recall(rows, *key))
    return [*found, *_times(rows), _memory(rows)]


def contribution_plot(of: str, found: Sequence[Contribution]) -> Plot | None:
    """The KL that each option of a preset or scheme adds; None where no text was measured."""
    if any(each.kl is None for each in found):
        return None
    title = f"What each option of {of} adds"
    totals = {each.option: each.kl for each in found}
    note = "From 0 to the whole, from above to below: what loses goes to the right, what makes good comes back."
    return Plot(title, note, waterfall(title, "KL(float || candidate), nats", totals))


def _pareto(rows: Sequence[Row]) -> Plot:
    shown = [(index, row, max(row.kl, SMALLEST_KL)) for index, row in enumerate(rows) if row.kl is not None]
    points = [
        Point(row.bits, kl, row.name, f"{row.name}: {row.bits:.2f} bits, KL {row.kl:.3g}", index)
        for index, row, kl in shown
    ]
    title = "What bits buy"
    x = linear("bits of an element of K and V", [row.bits for _, row, _ in shown])
    y = logarithmic("KL(float || candidate), nats", [kl for _, _, kl in shown])
    best = [(row.bits, max(row.kl, SMALLEST_KL)) for row in front(rows)]
    note = "Down and left is better. Those on the line are beaten by none in both."
    return Plot(title, note, scatter(title, x, y, points, best))


def _recall(rows: Sequence[Row], task: str, length: int) -> Plot:
    points = []
    for index, row in enumerate(rows):
        score, size = row.recall[task, length], row.lengths[length].cache_bytes / MB
        about = f"{row.name}: {score.right} of {score.asked} in {size:.3g} MB"
        points.append(Point(size, score.share, row.name, about, index, score.interval))
    title = f"Recall ({task}) at {length:,} tokens"
    x = logarithmic("cache, MB", [point.x for point in points])
    note = "Up and left is better. The bars are 95 % intervals."
    return Plot(title, note, scatter(title, x, linear("share of right answers", [1.0], 1.0), points))


def _times(rows: Sequence[Row]) -> list[Plot]:
    timed = {row.name: [(length, at.step) for length, at in row.lengths.items() if at.step is not None] for row in rows}
    if not all(timed.values()):
        return []
    tokens = sorted({length for values in timed.values() for length, _ in values})
    label, note = "ms a token", "Median of single tokens, batch 1, on a machine as busy as it was. Less is better."
    if len(tokens) == 1:
        title = f"Time of a written token at {tokens[0]:,} tokens"
        return [Plot(title, note, bars(title, label, {name: values[0][1] for name, values in timed.items()}))]
    title = "Time of a written token against context"
    y = linear(label, [step for values in timed.values() for _, step in values])
    return [Plot(title, note, lines(title, logarithmic("tokens", tokens, tokens), y, timed), tuple(timed))]


def _memory(rows: Sequence[Row]) -> Plot:
    sizes = {row.name: [(tokens, size / MB) for tokens, size in row.planned.items()] for row in rows}
    tokens = sorted({count for values in sizes.values() for count, _ in values})
    title = "Memory of the cache against context"
    y = logarithmic("MB in use, batch 1", [size for values in sizes.values() for _, size in values])
    note = "Computed from config.json, as octavo plan does."
    return Plot(title, note, lines(title, logarithmic("tokens", tokens, tokens), y, sizes), tuple(sizes))
