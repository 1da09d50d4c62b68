"""The tables of what schemes lose at length, from `results/length.csv`."""

import math
from collections.abc import Callable
from statistics import mean

from rows import RESULTS, Row, markdown, read_rows

FILE = RESULTS / "length.csv"
PROSE, REPEATS = "prose", "repeats"
MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b")
OURS = ("octavo-", "int8-token")
"""How the names of schemes begin that the digest shows."""


def key_of(row: Row) -> tuple[str, ...]:
    """What a row is of."""
    return tuple(row[part] for part in ("model", "what", "text", "window", "context", "tokens"))


Windows = dict[str, tuple[Row, Row]]
"""By window: the row of the short context and that of the long one."""


def pairs_of(model: str, tokens: str) -> dict[str, dict[str, Windows]]:
    """Rows by scheme and text, of windows of so many tokens read whole and in the short context; the newest of each."""
    newest = {key_of(row): row for row in read_rows(FILE) if (row["model"], row["tokens"]) == (model, tokens)}
    shortest = min((row["context"] for row in newest.values()), key=int, default=tokens)
    found: dict[str, dict[str, Windows]] = {}
    for (_, what, text, window, context, _), short in newest.items():
        long = newest.get((model, what, text, window, tokens, tokens))
        if context == shortest != tokens and long is not None:
            found.setdefault(what, {}).setdefault(text, {})[window] = (short, long)
    return found


def length_table() -> str:
    """What every scheme and part of one loses at length that was measured."""
    return _tables(lambda what: True)


def length_digest() -> str:
    """The same of the schemes that are Octavo's, and only of whole ones."""
    return _tables(lambda what: what.startswith(OURS) and ", " not in what)


def _tables(holds: Callable[[str], bool]) -> str:
    """A table for each model and length of windows, of the schemes and parts of one that are wanted."""
    rows, found = read_rows(FILE), []
    for model in MODELS:
        lengths = sorted({row["tokens"] for row in rows if row["model"] == model}, key=int)
        tables = [_table(model, pairs_of(model, tokens), holds) for tokens in lengths]
        found += [table for table in tables if table] or [f"{model}: not measured yet."]
    return "\n\n".join(found)


def _table(model: str, found: dict[str, dict[str, Windows]], holds: Callable[[str], bool]) -> str:
    """A table of one model; empty if there is nothing to show."""
    whole = {what: texts for what, texts in found.items() if PROSE in texts and REPEATS in texts and holds(what)}
    if not whole:
        return ""
    rows_of = {what: [pair for windows in texts.values() for pair in windows.values()] for what, texts in whole.items()}
    short, long = (f"{int(row['context']):,}" for row in next(iter(rows_of.values()))[0])
    heads = (f"prose: KL at {short}", f"at {long}", "ratio", f"copies: KL at {short}", f"at {long}", "ratio")
    rows = [(model, f"bits at {long}", *heads, "copies: perplexity", "top-1")]
    bits = {what: float(rows_of[what][0][1]["bits"]) for what in whole}
    for what in sorted(whole, key=lambda what: (-bits.get(what.partition(", ")[0], bits[what]), what)):
        cells = [cell for text in (PROSE, REPEATS) for cell in _cells(whole[what][text])]
        copies = [long for _, long in whole[what][REPEATS].values()]
        change = mean(math.log(float(row["perplexity"]) / float(row["float_perplexity"])) for row in copies)
        top1 = mean(float(row["top1"]) for row in copies)
        rows.append((what, f"{bits[what]:.2f}", *cells, f"{100 * math.expm1(change):+.2f} %", f"{100 * top1:.1f} %"))
    return markdown(rows)


def _cells(windows: Windows) -> tuple[str, str, str]:
    """Mean KL in the short context and in the long one, and how many times that of the short one this is."""
    short, long = (mean(float(pair[index]["kl"]) for pair in windows.values()) for index in (0, 1))
    return f"{short:.5f}", f"{long:.5f}", f"{long / short:.2f}" if short else ""
