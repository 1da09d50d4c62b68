"""Results files: a CSV per benchmark, to which each run appends."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def append_rows(name: str, columns: Sequence[str], rows: Iterable[dict[str, str]]) -> None:
    """Append rows to a results file as they come, so that a cut-off run keeps what it measured."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / name
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            stream.flush()
