"""What a search found, in words, tables and a page."""

from collections.abc import Sequence
from html import escape

from ..comparing.axes import linear, logarithmic
from ..comparing.page import document, figure, sorted_table
from ..comparing.plots import SMALLEST_KL, Plot
from ..comparing.svg import Point, scatter
from ..comparing.table import Cell, Table
from ..wording import codec_words
from .held_out import FOUND, Row
from .targets import Costs

CURVE = 40
"""Budgets at which the curve of best choices is drawn."""


def table_of(rows: Sequence[Row]) -> Table:
    """What was measured on held-out text."""
    heads = ("scheme", "bits", "KL, sum over layers", "KL, held out", "perplexity", "top-1")
    return Table(heads, tuple(map(_cells, rows)))


def _cells(row: Row) -> tuple[Cell, ...]:
    found = row.fidelity
    change = 100 * (found.perplexity / found.float_perplexity - 1)
    return (
        Cell(row.name, row.name),
        Cell(f"{row.bits:.3f}", row.bits),
        Cell("" if row.predicted is None else f"{row.predicted:.5f}", row.predicted),
        Cell(f"{found.kl:.5f}", found.kl),
        Cell(f"{change:+.2f} %", change),
        Cell(f"{found.top1:.1%}", found.top1),
    )


def layer_table(costs: Costs, chosen: Sequence[int]) -> Table:
    """What each layer stores, and what that costs."""
    rows = []
    for layer, option in enumerate(chosen):
        scheme, loss = costs.options[option].scheme, costs.losses[layer][option]
        bits = costs.bits(scheme)
        stored = (codec_words(scheme.key), codec_words(scheme.value))
        times = () if costs.seconds is None else (costs.seconds[layer][option] * 1e3,)
        rows.append(
            (
                Cell(str(layer), layer),
                *(Cell(text, text) for text in stored),
                Cell(str(scheme.window), scheme.window),
                Cell(f"{bits:.2f}", bits),
                *(Cell(f"{time:.3f}", time) for time in times),
                Cell(f"{loss:.2g}", loss),
            )
        )
    heads = ("layer", "K", "V", "float window", "bits", *(() if costs.seconds is None else ("ms",)), "KL alone")
    return Table(heads, tuple(rows))


def sentence(rows: Sequence[Row], limit: str) -> str:
    """By how much what was found beats the best uniform scheme, and the best preset if that is another.

    Args:
        limit: that all of them keep, with its unit.
    """
    found, *others = rows
    said = f"{found.name}: {found.bits:.3f} bits, KL {found.fidelity.kl:.4f} on held-out text."
    if found.is_uniform:
        said += " All layers store the same."
    if not others:
        return f"{said} No {'other ' * found.is_uniform}uniform scheme takes at most {limit}."
    best = others[0]
    presets = [row for row in others if row.is_preset and row is not best]
    for row in (best, *presets[:1]):
        kind = (
            f"{'other ' * found.is_uniform}uniform scheme" if row is best else "preset"
        )  # of those that were scored, which the table names
        change = 1 - found.fidelity.kl / row.fidelity.kl
        said += (
            f" The best {kind} scored, of at most {limit}, is {row.name}: {row.bits:.3f} bits, "
            f"KL {row.fidelity.kl:.4f}; what was found has {abs(change):.0%} {'less' if change >= 0 else 'more'}."
        )
    return said


def curve_of(costs: Costs) -> list[tuple[float, float]]:
    """Bits and KL, as the sum over layers, of the best choices from the fewest bits to the least KL."""
    found = costs.choices_by_bits().front(CURVE)
    return [(costs.bits(costs.scheme(chosen)), max(costs.predicted(chosen), SMALLEST_KL)) for chosen in found]


def pareto(rows: Sequence[Row], curve: Sequence[tuple[float, float]]) -> Plot:
    """The plot of bits against KL."""
    points = [
        Point(row.bits, max(row.fidelity.kl, SMALLEST_KL), row.name,
              f"{row.name}: {row.bits:.3f} bits, KL {row.fidelity.kl:.3g}", 1 if row.name == FOUND else 0)
        for row in rows
    ]  # fmt: skip
    x = linear("bits of an element of K and V", [bits for bits, _ in curve] + [point.x for point in points])
    y = logarithmic("KL(float || scheme), nats", [kl for _, kl in curve] + [point.y for point in points])
    note = "Points: whole schemes on held-out text. Line: the best choices, as the sum of what single layers lose."
    return Plot("What bits buy, layer by layer", note, scatter("Bits against KL", x, y, points, curve))


def page(
    model: str, said: str, rows: Sequence[Row], costs: Costs, chosen: Sequence[int], conditions: Sequence[str]
) -> str:
    """The page as HTML."""
    body = f"""<div class="advice"><p>{escape(said)}</p></div>
<div class="plots">
{figure(pareto(rows, curve_of(costs)))}
</div>
<div class="card"><h2>On held-out text</h2>
{sorted_table(table_of(rows), FOUND)}</div>
<div class="card"><h2>Layers</h2>
{sorted_table(layer_table(costs, chosen))}</div>
<div class="conditions">
{chr(10).join(f"<p>{escape(line)}</p>" for line in conditions)}
</div>"""
    return document(f"{escape(model)}: bits by layer", body)
