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
        writer = csv.DictWriter(stream, columns)
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
