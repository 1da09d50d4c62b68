"""The table of a comparison: the same cells on the page and in Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .rows import Row

MB = 1e6


@dataclass(frozen=True)
class Cell:
    """A cell: what it says, and by which number its column is sorted; None sorts behind all."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        heads: of its columns.
        rows: its cells, the name of the row first.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def figure_cell(value: float | None, form: str = "{:,.3g}") -> Cell:
    """The cell of a number, or an empty one."""
    return Cell("" if value is None else form.format(value), value)


def _cells(row: Row, plain: Row) -> Iterator[tuple[str, Cell]]:
    yield "name", Cell(row.name, row.name)
    yield "bits", figure_cell(row.bits, "{:.2f}")
    yield "KL", figure_cell(row.kl, "{:.5f}")
    change = None if row.perplexity is None else 100 * (row.perplexity - 1)
    yield "perplexity", figure_cell(change, "{:+.2f} %")
    yield "top-1", figure_cell(row.top1, "{:.1%}")
    for task, length in plain.recall:
        score = row.recall[task, length]
        yield f"{task} {length:,}", Cell(f"{score.right}/{score.asked}", score.share)
    yield "as float for", Cell("" if row.as_float is None else f"{row.as_float:.0f} of {row.written}", row.as_float)
    for length in plain.lengths:
        at = row.lengths[length]
        yield f"cache at {length:,}, MB", figure_cell(at.cache_bytes / MB)
        yield f"ms a token at {length:,}", figure_cell(at.step)
        yield f"prompt of {length:,}, tokens/s", figure_cell(at.prompt_speed, "{:,.0f}")
    yield "weights, MB", figure_cell(row.weight_bytes / MB, "{:,.0f}")
    yield "what it is", Cell(row.about, row.about)


def table_of(rows: Sequence[Row]) -> Table:
    """All rows in their order, with the columns in which some row says something."""
    plain = next(row for row in rows if row.is_float)
    found = [list(_cells(row, plain)) for row in rows]
    kept = [index for index in range(len(found[0])) if any(cells[index][1].text for cells in found)]
    return Table(
        tuple(found[0][index][0] for index in kept),
        tuple(tuple(cells[index][1] for index in kept) for cells in found),
    )


def markdown(table: Table) -> str:
    """The table in Markdown; texts stand left, figures right."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rules = ["---" if isinstance(cell.value, str) else "---:" for cell in table.rows[0]]
    return "\n".join([line(table.heads), line(rules), *(line([cell.text for cell in cells]) for cells in table.rows)])
