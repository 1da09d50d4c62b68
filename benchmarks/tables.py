"""Write the tables of the READMEs from the newest rows of `results/*.csv`, between their markers.

python benchmarks/tables.py            rewrites README.md and benchmarks/README.md
python benchmarks/tables.py --check    exit code 1 if they are not what the results say
"""

import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rows import RESULTS
from transformers import LlamaConfig

from models import SHAPES
from octavo.common.cache import kv_bytes_per_token
from octavo.common.scheme import load_scheme

ROOT = Path(__file__).parents[1]
QUALITY_MODEL = "smollm2-135m"
SPEED_MODEL = "SmolLM2-135M"
FLOAT = "float"
THEIRS = {"attention": ("SDPA",), "linear": ("F.linear",)}
"""How the names of what ops are compared with begin."""
MACHINE = ("machine", "threads", "torch")
"""What all rows of one table have in common."""

Row = dict[str, str]


def _rows(file: str) -> list[Row]:
    """The rows of a results file, the oldest first; none if there is no such file."""
    if not (RESULTS / file).exists():
        return []
    with (RESULTS / file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _timed(file: str) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows by op and shape, and by variant: each case as it was last timed on the machine of the newest row."""
    rows = _rows(file)
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if any(row[column] != rows[-1][column] for column in MACHINE):
            continue
        case = cases.setdefault((row["op"], row["case"]), {})
        if any(other["commit"] != row["commit"] for other in case.values()):
            case.clear()
        case[row["what"]] = row
    return cases


def _markdown(rows: list[tuple[str, ...]], texts: int = 1) -> str:
    """A table whose first `texts` columns are text and whose others are numbers."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" * texts + "---:|" * (len(rows[0]) - texts)
    return "\n".join([lines[0], rule, *lines[1:]])


def _conditions(row: Row) -> str:
    return f"{row['machine']}, {row['threads']} CPU threads, torch {row['torch']}"


def _models(file: str) -> dict[str, dict[str, Row]]:
    """Rows of the whole model by work and variant."""
    return {
        case.removeprefix(SPEED_MODEL + ", "): rows
        for (op, case), rows in _timed(file).items()
        if op == "model" and case.startswith(SPEED_MODEL + ", ")
    }


def _ratio(rows: dict[str, Row], what: str) -> str:
    """Milliseconds of one variant, and how many times as fast as float it is."""
    if what not in rows:
        return "not timed"
    taken, float_taken = float(rows[what]["p50_ms"]), float(rows[FLOAT]["p50_ms"])
    return f"{taken:,.0f} ms ({float_taken / taken:.2f}x)"


def _kv_bytes(what: str) -> str:
    """Bytes per token in the cache of a variant, whose name ends in its scheme; 4 each where that is float."""
    name = what.rpartition(" + ")[2]
    scheme = load_scheme({"C8": "ascend-c8", "FAQuant": "ascend-fa"}.get(name, name))
    return f"{kv_bytes_per_token(LlamaConfig(**SHAPES[SPEED_MODEL]), scheme, 4):,}"


def results_table() -> str:
    """Speed and fidelity of each variant of the whole model, with the conditions under it."""
    quality = {row["what"]: row for row in _rows("quality.csv") if row["model"] == QUALITY_MODEL}
    speed = _models("cpu.csv")
    if not (quality and speed):
        return "Speed or quality is not measured yet."
    variants = dict.fromkeys([FLOAT, *reversed(next(iter(speed.values()), {})), *quality])
    rows = [(SPEED_MODEL, "KV cache, bytes per token", *speed, "perplexity", "KL from float")]
    for what in variants:
        score = quality.get(what)
        perplexity, kl = (f"{float(score['perplexity']):.2f}", f"{float(score['kl']):.4f}") if score else ("", "")
        if what == FLOAT and quality:
            perplexity, kl = f"{float(next(iter(quality.values()))['float_perplexity']):.2f}", "0"
        rows.append((what, _kv_bytes(what), *(_ratio(work, what) for work in speed.values()), perplexity, kl))
    any_score = next(iter(quality.values()))
    any_speed = next(iter(next(iter(speed.values())).values()))
    return (
        f"{_markdown(rows)}\n\n"
        f"Batch 1, median of alternating calls in one run, {_conditions(any_speed)}; `float` is transformers "
        f"{any_speed['transformers']} in fp32 with DynamicCache and SDPA. Perplexity and KL: {any_score['windows']} "
        f"windows of {any_score['length']} tokens of English Wikipedia, teacher-forced, every query reading the stored "
        "codes, calibrated on 50 BoolQ prompts. `W8A8` leaves the layers in float that Ascend's recipe leaves "
        "(down_proj, lm_head); `W8A8 dynamic` leaves none."
    )


def ops_table(file: str) -> str:
    """Each op on each shape against the fastest form that PyTorch has of the same work."""
    timed = _timed(file)
    if not timed:
        return "No run on such a device is recorded yet."
    rows = [("op", "shape", "ours", "ms", "share of read bandwidth", "times as fast as", "the best of PyTorch")]
    for (op, case), variants in timed.items():
        others = {what: float(row["p50_ms"]) for what, row in variants.items() if what.startswith(THEIRS.get(op, ()))}
        if not others:
            continue
        best = min(others, key=others.__getitem__)
        for what, row in variants.items():
            if what not in others:
                taken = float(row["p50_ms"])
                rows.append((op, case, what, f"{taken:.3f}", row["share"], f"{others[best] / taken:.2f}", best))
    any_row = next(iter(next(iter(timed.values())).values()))
    bandwidth = any_row["read_gigabytes_per_s"]
    return f"{_markdown(rows, 3)}\n\n{_conditions(any_row)}, which read {bandwidth} GB/s."


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"results": results_table},
    "benchmarks/README.md": {
        "ops on cpu": partial(ops_table, "cpu.csv"),
        "ops on cuda": partial(ops_table, "cuda.csv"),
    },
}
"""What stands between the markers of each file, by their names."""


def rewritten(file: str, text: str) -> str:
    """A file with its tables made anew."""
    for name, table in TABLES[file].items():
        before, found, rest = text.partition(f"<!-- table: {name} -->\n")
        _, closed, after = rest.partition("<!-- end -->")
        if not (found and closed):
            raise SystemExit(f"{file}: the markers of the table {name!r} are missing")
        text = f"{before}{found}{table()}\n{closed}{after}"
    return text


def main() -> int:
    """Rewrite the files, or check them."""
    stale = 0
    for file in TABLES:
        old = (ROOT / file).read_text(encoding="utf-8")
        new = rewritten(file, old)
        stale += new != old
        if "--check" not in sys.argv[1:]:
            (ROOT / file).write_text(new, encoding="utf-8")
    return int(bool(stale)) if "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
