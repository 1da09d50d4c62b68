"""The tables of `memory.py`, from its rows."""

from rows import Row

FLOAT = "float"
MEGABYTES = {
    "weights_mb": "weights file",
    "cache_mb": "KV cache",
    "loaded_mb": "loaded",
    "peak_mb": "peak",
    "end_mb": "end",
    "end_anonymous_mb": "anonymous of that",
}
STEPS = {
    "torch": "import torch",
    "transformers": "import transformers",
    "tokenizer": "tokenizer",
    "load": "load",
    "first pass": "first pass",
    "seconds": "first token",
}


def _newest(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """The newest row of each model and case."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["model"], {})[row["case"]] = row
    return found


def memory_rows(rows: list[Row]) -> list[tuple[str, ...]]:
    """Resident memory of each case, and its peak beside that of float."""
    table = [("model", "case", *MEGABYTES.values(), "peak, of float's")]
    for model, cases in _newest(rows).items():
        for case, row in cases.items():
            numbers = [f"{float(row[column]):,.0f}" for column in MEGABYTES]
            share = f"{float(row['peak_mb']) / float(cases[FLOAT]['peak_mb']):.2f}" if FLOAT in cases else ""
            table.append((model, case, *numbers, share))
    return table


def start_rows(rows: list[Row]) -> list[tuple[str, ...]]:
    """Seconds from the start of a process to its first token, by step."""
    table = [("model", "case", *STEPS.values())]
    for model, cases in _newest(rows).items():
        table += [(model, case, *(row[step] for step in STEPS)) for case, row in cases.items()]
    return table
