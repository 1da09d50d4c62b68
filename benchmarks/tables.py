"""Write the tables of README.md from the newest rows of `results/*.csv`, between their markers.

python benchmarks/tables.py            rewrites README.md
python benchmarks/tables.py --check    exit code 1 if README.md is not what the results say
"""

import csv
import sys
from pathlib import Path

from rows import RESULTS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MODEL = "smollm2-135m"
CONTEXT = "8192"
HEADER = ("SmolLM2-135M-Instruct", "KV cache, bytes per token", "decode at 8,192 tokens", "perplexity", "KL from float")


def _newest(name: str, keys: tuple[str, ...]) -> dict[tuple[str, ...], dict[str, str]]:
    """The last row of each combination of `keys` in a results file, those of `MODEL` only."""
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == MODEL]
    return {tuple(row[key] for key in keys): row for row in rows}


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def results_table() -> str:
    """Size, speed and fidelity of each variant, with the conditions under it."""
    quality = _newest("quality.csv", ("what",))
    decode = _newest("decode.csv", ("what", "context"))
    rows = [HEADER]
    for what in dict.fromkeys([key[0] for key in decode] + [key[0] for key in quality]):
        speed, score = decode.get((what, CONTEXT)), quality.get((what,))
        kv = f"{int(speed['kv_bytes']):,}" if speed else "-"
        step = f"{float(speed['p50_ms']):.0f} ms ({speed['ratio_to_float']}x)" if speed else "not timed"
        perplexity = f"{float(score['perplexity']):.2f}" if score else ""
        kl = f"{float(score['kl']):.4f}" if score else ""
        if what == "float":
            perplexity, kl = f"{float(next(iter(quality.values()))['float_perplexity']):.2f}", "0"
        rows.append((what, kv, step, perplexity, kl))
    any_speed, any_score = next(iter(decode.values())), next(iter(quality.values()))
    conditions = (
        f"Decode: one token at batch 1, median of alternating steps, {any_speed['threads']} threads of an "
        f"{any_speed['machine']} CPU, fp32, against transformers {any_speed['transformers']} with DynamicCache and "
        f"SDPA, torch {any_speed['torch']}. Perplexity and KL: {any_score['windows']} windows of {any_score['length']} "
        "tokens of English Wikipedia, teacher-forced, every query reading the stored codes, calibrated on 50 BoolQ "
        "prompts. `W8A8` leaves the layers in float that Ascend's recipe leaves (down_proj, lm_head)."
    )
    return f"{_markdown(rows)}\n\n{conditions}"


def rewritten(readme: str) -> str:
    """README.md with its tables made anew."""
    start, table_end = "<!-- table: results -->\n", "\n<!-- end -->"
    before, found, rest = readme.partition(start)
    _, closed, after = rest.partition("<!-- end -->")
    if not (found and closed):
        raise SystemExit("README.md: the markers of the results table are missing")
    return before + start + results_table() + table_end + after


def main() -> int:
    """Rewrite README.md, or check it."""
    readme = README.read_text(encoding="utf-8")
    new = rewritten(readme)
    if "--check" in sys.argv[1:]:
        return int(new != readme)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
