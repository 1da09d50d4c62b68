"""Results files: a CSV per benchmark, to which each run appends."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

Row = dict[str, str]


def append_rows(file: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Append rows to a results file as they come, so that a cut-off run keeps what it measured."""
    file.parent.mkdir(exist_ok=True)
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            stream.flush()


def read_rows(file: Path) -> list[Row]:
    """The rows of a results file, the oldest first; none if there is no such file."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def markdown(rows: list[tuple[str, ...]], texts: int = 1) -> str:
    """A table whose first `texts` columns are text and whose others are numbers."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" * texts + "---:|" * (len(rows[0]) - texts)
    return "\n".join([lines[0], rule, *lines[1:]])


def scores(row: Row | None) -> tuple[str, str, str]:
    """KL, change of the perplexity in percent, and share of equal first choices."""
    if row is None:
        return "", "", ""
    change = 100 * (float(row["perplexity"]) / float(row["float_perplexity"]) - 1)
    return f"{float(row['kl']):.5f}", f"{change:+.2f} %", f"{100 * float(row['top1']):.1f} %"
