"""Write the tables of READMEs and docs from the newest rows of `results/*.csv`, between their markers.

python benchmarks/tables.py            rewrites README.md, benchmarks/README.md and pages of docs/
python benchmarks/tables.py --check    exit code 1 if they are not what the results say
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from digest_tables import digest_table
from engine_tables import engines_table, other_engines_tables
from gpu_tables import gpu_digest, gpu_table
from length_tables import length_digest, length_table
from memory_rows import memory_rows, start_rows
from quality import FLOAT_WEIGHTS
from quality_tables import bits_table, options_table, quality_of, schemes_tables, scored_as
from recall_tables import recall_digest, recall_table
from rows import RESULTS, Row, markdown, read_rows, scores
from schemes import SDPA
from support import sliding_rows, support_rows
from transformers import LlamaConfig
from weight_tables import best_weights_table, weights_table

from models import SHAPES
from octavo.common.runtime.cache.sizes import kv_bytes_per_token
from octavo.common.runtime.schemes.kv_scheme import PRESETS, load_scheme

ROOT = Path(__file__).parents[1]
QUALITY_MODEL = "smollm2-135m"
SPEED_MODEL = "SmolLM2-135M"
FLOAT = "float"
THEIRS = {"attention": ("SDPA",), "linear": ("F.linear",)}
"""How the names of what ops are compared with begin."""
MACHINE = ("machine", "threads", "torch")
"""What all rows of one table have in common."""


def _rows(file: str) -> list[Row]:
    return read_rows(RESULTS / file)


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
    quality, speed = quality_of(QUALITY_MODEL), _models("cpu.csv")
    if not (quality and speed):
        return "Speed or quality is not measured yet."
    variants = [FLOAT, *reversed(next(iter(speed.values())))]
    rows = [(SPEED_MODEL, "KV cache, bytes per token", *speed, "perplexity", "KL from float")]
    for what in dict.fromkeys(variants):
        score = quality.get(what)
        perplexity, kl = (f"{float(score['perplexity']):.2f}", f"{float(score['kl']):.4f}") if score else ("", "")
        if what == FLOAT and quality:
            perplexity, kl = f"{float(next(iter(quality.values()))['float_perplexity']):.2f}", "0"
        rows.append((what, _kv_bytes(what), *(_ratio(work, what) for work in speed.values()), perplexity, kl))
    any_speed = next(iter(next(iter(speed.values())).values()))
    has_w4a16 = any(what.startswith("W4A16") for what in variants)
    leaves, treated = (" `W4A16` leaves lm_head.", ", m3 and GPTQ for W4A16") if has_w4a16 else ("", "")
    return (
        f"{markdown(rows)}\n\n"
        f"Batch 1, median of alternating calls in one run, {_conditions(any_speed)}; `float` is transformers "
        f"{any_speed['transformers']} in fp32 with DynamicCache and SDPA. `W8A8` leaves the layers in float that "
        f"Ascend's recipe leaves (down_proj, lm_head); `W8A8 dynamic` leaves none.{leaves} Perplexity and KL are "
        "those of checkpoints made with `--anti_method`, which costs no time when a model runs: m6 for W8A8, m3 for "
        f"W8A8 dynamic{treated}."
    )


def checkpoints_table() -> str:
    """Quantized directories."""
    rows = [("checkpoint", "KV bits", "KL", "perplexity", "top-1")]
    scored = {what: row for what, row in quality_of(QUALITY_MODEL).items() if not what.startswith(FLOAT_WEIGHTS)}
    rows += [(f"{SPEED_MODEL}, {what}", *scored_as([{what: row}], what)) for what, row in scored.items()]
    return markdown(rows) if scored else "No checkpoint is measured yet."


def peers_table() -> str:
    """transformers' own quantized caches beside ours."""
    newest = {(row["model"], row["system"], row["what"]): row for row in _rows("peers.csv")}
    if not newest:
        return "No peer is measured yet."
    rows = [("model", "system", "cache", "windows", "bits", "KL", "perplexity", "top-1")]
    rows += [(*key, row["windows"], f"{float(row['bits']):.2f}", *scores(row)) for key, row in newest.items()]
    return f"{markdown(rows, 3)}\n\nScored: the second half of windows of 2,048 tokens; peers.py has the conditions."


def _resources_table(file: str, rows_of: Callable[[list[Row]], list[tuple[str, ...]]], about: str) -> str:
    """What processes need: a table of the newest run on the newest machine, and the conditions of it."""
    found = _rows(file)
    if not found:
        return "Not measured yet."
    row = found[-1]
    rows = rows_of([other for other in found if all(other[column] == row[column] for column in MACHINE)])
    return f"{markdown(rows, 2)}\n\n{about} {_conditions(row)}, transformers {row['transformers']}."


MEMORY = (
    "MB of 1e6 bytes, resident, of a process that loads a model and generates 200 tokens behind 6,000: mapped files "
    "count as far as they are read, and so do torch and transformers."
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
    return f"{markdown(rows, 3)}\n\n{_conditions(any_row)}, which read {bandwidth} GB/s."


def scheme_speed_table() -> str:
    """What a key costs attention in each preset, beside a float one."""
    rows = _rows("schemes.csv")
    if not rows:
        return "No scheme is timed yet."
    machine = [row for row in rows if all(row[column] == rows[-1][column] for column in MACHINE)]
    shapes = list(dict.fromkeys((row["heads"], row["kv_heads"], row["head_dim"]) for row in machine))
    newest = {(row["heads"], row["kv_heads"], row["head_dim"], row["scheme"]): row for row in machine}
    tokens = rows[-1]["tokens"]
    lines = [("scheme", *(
        text for heads, kv_heads, head_dim in shapes
        for text in (f"{heads}/{kv_heads} heads of {head_dim}: bytes per key", "ns per key", "of float", "update, µs")
    ))]  # fmt: skip
    for scheme in (SDPA, *PRESETS):
        found = [newest.get((*shape, scheme)) for shape in shapes]
        if None in found:
            continue
        cells: list[str] = []
        for shape, row in zip(shapes, found, strict=True):
            share = float(row["ns_per_key"]) / float(newest[(*shape, SDPA)]["ns_per_key"])
            cells += [row["bytes_per_key"], row["ns_per_key"], f"{share:.2f}", row["update_us"]]
        lines.append((f"`{scheme}`" if scheme in PRESETS else scheme, *cells))
    return (
        f"{markdown(lines)}\n\n{rows[-1]['machine']}, {rows[-1]['threads']} threads, torch {rows[-1]['torch']}: one "
        f"query over {int(tokens):,} tokens, batch 1, medians of the whole of `quantized_attention`, its Python "
        "included, and of the cache's `update` with one token (K and V). Bytes are what the storage takes."
    )


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "results": results_table,
        "digest": digest_table,
        "gpu": gpu_digest,
        "engines": engines_table,
    },
    "docs/schemes.md": {
        "bits": bits_table,
        "schemes": schemes_tables,
        "length": length_digest,
        "recall": recall_digest,
        "best weights": best_weights_table,
    },
    "docs/two-lines.md": {"sliding": lambda: markdown(sliding_rows(), 2)},
    "docs/architecture.md": {"architectures": lambda: markdown(support_rows(), 5)},
    "benchmarks/README.md": {
        "options": options_table,
        "checkpoints": checkpoints_table,
        "peers": peers_table,
        "length": length_table,
        "recall": recall_table,
        "engines": other_engines_tables,
        "weights": weights_table,
        "memory": partial(_resources_table, "memory.csv", memory_rows, MEMORY),
        "start": partial(_resources_table, "start.csv", start_rows, "Seconds, with all files in the page cache."),
        "scheme speed": scheme_speed_table,
        "ops on cpu": partial(ops_table, "cpu.csv"),
        "gpu": gpu_table,
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
