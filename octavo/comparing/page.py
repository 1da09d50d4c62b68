"""The page of a comparison: one HTML file that needs nothing from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .advice import Advice
from .contributions import Contribution, contribution_table, note
from .plots import Plot, contribution_plot, plots_of
from .rows import Row
from .svg import colour_class
from .table import Cell, Table, table_of


def figure(plot: Plot) -> str:
    """A plot with its title, legend and note."""
    legend = "".join(f'<li class="{colour_class(index)}">{escape(name)}</li>' for index, name in enumerate(plot.named))
    listed = f'<ul class="legend">{legend}</ul>' if legend else ""
    note = f"<figcaption>{escape(plot.note)}</figcaption>"
    return f"<figure><h2>{escape(plot.title)}</h2>\n{plot.svg}\n{listed}{note}</figure>"


def _cell(cell: Cell, tag: str = "td") -> str:
    value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
    kind = ' class="text"' if isinstance(cell.value, str) else ""
    scope = ' scope="row"' if tag == "th" else ""
    return f"<{tag}{kind}{scope}{value}>{escape(cell.text)}</{tag}>"


def sorted_table(table: Table, choice: str | None = None) -> str:
    """A table that a click on a head sorts; `choice` is the row that stands out, by its first cell."""
    heads = "".join(
        f"<th{' class=text' if isinstance(cell.value, str) else ''} scope=col><button>{escape(head)}</button></th>"
        for head, cell in zip(table.heads, table.rows[0], strict=True)
    )
    rows = []
    for first, *rest in table.rows:
        kind = ' class="choice"' if first.value == choice else ""
        rows.append(f"<tr{kind}>{_cell(first, 'th')}{''.join(map(_cell, rest))}</tr>")
    body = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _contributions(found: Mapping[str, Sequence[Contribution]], tokens: int) -> str:
    """The section of what options add; empty where that was not asked for."""
    parts = []
    for of, each in found.items():
        plot = contribution_plot(of, each)
        drawn = f"<h2>What each option of {escape(of)} adds</h2>" if plot is None else figure(plot)
        parts.append(f'{drawn}\n<div class="card">{sorted_table(contribution_table(each))}</div>')
    about = f'<p class="conditions">{escape(note(tokens))}</p>' if parts else ""
    return "\n".join([*(f"<section>{part}</section>" for part in parts), about])


def document(title: str, body: str) -> str:
    """A whole page of HTML that was made already, with the style of the plots and the script of the tables."""
    css, script = (Path(__file__).with_suffix(kind).read_text(encoding="utf-8") for kind in (".css", ".js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>
{script}</script>
</body>
</html>
"""


def page(
    model: str,
    rows: Sequence[Row],
    advice: Advice,
    conditions: Sequence[str],
    contributions: Mapping[str, Sequence[Contribution]] | None = None,
) -> str:
    """The page as HTML.

    Args:
        model: as it was named.
        rows: that of the float model among them.
        conditions: lines that say what was measured on what.
        contributions: what the options of presets and schemes add, by these.
    """
    command = "" if advice.command is None else f"\n<p><code>{escape(advice.command)}</code></p>"
    body = f"""<div class="advice"><p>{escape(advice.sentences)}</p>{command}</div>
<div class="plots">
{chr(10).join(map(figure, plots_of(rows)))}
</div>
<div class="card"><h2>All figures</h2>
<p class="conditions">A click on a head sorts by its column.</p>
{sorted_table(table_of(rows), advice.choice)}</div>
{_contributions(contributions or {}, rows[0].context)}
<div class="conditions">
{chr(10).join(f"<p>{escape(line)}</p>" for line in conditions)}
</div>"""
    return document(f"{escape(model)}: schemes compared", body)
