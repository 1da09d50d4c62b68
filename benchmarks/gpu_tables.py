"""Tables of a GPU, out of the rows that `gpu.py` appends: ops and whole models beside the best of bfloat16."""

from collections.abc import Mapping

from rows import RESULTS, Row, markdown, read_rows

FILE = "gpu.csv"
PLAIN = ("SDPA", "flex attention", "F.linear", "bf16 + static cache", "bf16 + dynamic cache")
"""How the names of what is beside ours begin."""
WAYS = ("eager", "graph", "compiled")
"""How a step of a whole model is run, at the end of the names of its rows."""
DIGEST = {
    "decode, batch 8, 32,768 keys, 32/8 heads of 128": "attention of a token",
    "prefill, 8,192 tokens, 32/8 heads of 128": "attention of a prompt",
    "Llama 1B shape, batch 1, decode at 2,048 tokens": "a step of a whole model",
    "Llama 8B shape, batch 1, decode at 8,192 tokens": "a step of a whole model",
}
"""Cases that README shows, and what they are."""

Cases = dict[tuple[str, str], dict[str, Row]]
"""Rows by op and shape, and by variant."""


def newest_cases(rows: list[Row]) -> Cases:
    """Each variant as it was last measured on the machine of the newest row, with the torch of that row."""
    found: Cases = {}
    for row in rows:
        if all(row[column] == rows[-1][column] for column in ("machine", "torch")):
            found.setdefault((row["op"], row["case"]), {})[row["what"]] = row
    return found


def _taken(row: Row | None) -> float | None:
    return float(row["p50_ms"]) if row is not None and row["p50_ms"] else None


def best(rows: Mapping[str, Row], is_plain: bool) -> tuple[str, float] | None:
    """Name and milliseconds of the fastest variant of ours, or of bfloat16; None if none ran."""
    taken = {what: _taken(row) for what, row in rows.items() if what.startswith(PLAIN) is is_plain}
    ran = {what: ms for what, ms in taken.items() if ms is not None}
    return min(ran.items(), key=lambda found: found[1]) if ran else None


def _milliseconds(row: Row | None) -> str:
    """What a row took, or why it took nothing."""
    if row is None:
        return ""
    return f"{float(row['p50_ms']):,.3f}" if row["p50_ms"] else f"failed: {row['error']}".replace("|", "/")


def _times(plain: tuple[str, float] | None, taken: float | None) -> str:
    return "" if plain is None or taken is None else f"{plain[1] / taken:.2f}"


def _ops(cases: Cases) -> str:
    lines = [("op", "shape", "variant", "ms", "times as fast as bfloat16's best", "share of read bandwidth")]
    for (op, case), rows in cases.items():
        plain = best(rows, is_plain=True)
        for what, row in rows.items():
            lines.append((op, case, what, _milliseconds(row), _times(plain, _taken(row)), row["share"]))
    return markdown(lines, 3)


def _models(cases: Cases) -> str:
    ways = [f"{way}, ms" for way in WAYS]
    lines = [("model", "variant", *ways, "times as fast as bfloat16's best")]
    for (_, case), rows in cases.items():
        plain = best(rows, is_plain=True)
        for kind in dict.fromkeys(what.rpartition(", ")[0] for what in rows):
            found = [rows.get(f"{kind}, {way}") for way in WAYS]
            least = min((ms for ms in map(_taken, found) if ms is not None), default=None)
            lines.append((case, kind, *map(_milliseconds, found), _times(plain, least)))
    return markdown(lines, 2)


def _conditions(cases: Cases) -> str:
    rows = [row for found in cases.values() for row in found.values()]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"{rows[-1]['machine']}, torch {rows[-1]['torch']}, transformers {rows[-1]['transformers']}, Octavo of commit "
        f"{commits}, which read {float(rows[-1]['read_gigabytes_per_s']):,.0f} GB/s: medians. The best of "
        "bfloat16 is that of those that were measured: transformers' static cache and PyTorch's attention."
    )


def gpu_table() -> str:
    """Ops and whole models on the GPU of the newest row; what failed says why."""
    cases = newest_cases(read_rows(RESULTS / FILE))
    if not cases:
        return "No run on a GPU is recorded yet."
    models = {case: rows for case, rows in cases.items() if case[0] == "model"}
    others = {case: rows for case, rows in cases.items() if case not in models}
    parts = [_ops(others)] if others else []
    if models:
        about = "A token of each sequence through a whole model of random weights, as somebody waits for it:"
        parts += [about, _models(models)]
    return "\n\n".join([*parts, _conditions(cases)])


def gpu_digest() -> str:
    """A line for each case of `DIGEST` that was measured: ours beside bfloat16's, each at its fastest."""
    cases = newest_cases(read_rows(RESULTS / FILE))
    lines = [("on a GPU", "shape", "bfloat16's best", "Octavo's best", "bfloat16, ms", "Octavo, ms", "times as fast")]
    by_name = {case: rows for (_, case), rows in cases.items()}
    for case, about in DIGEST.items():
        rows = by_name.get(case, {})
        plain, ours = best(rows, is_plain=True), best(rows, is_plain=False)
        if plain is not None and ours is not None:
            figures = (f"{plain[1]:,.2f}", f"{ours[1]:,.2f}", _times(plain, ours[1]))
            lines.append((about, case, plain[0], ours[0], *figures))
    return f"{markdown(lines, 4)}\n\n{_conditions(cases)}" if len(lines) > 1 else "No run on a GPU is recorded yet."
