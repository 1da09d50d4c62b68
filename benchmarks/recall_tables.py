"""The tables of what schemes find again by its key far back, from `results/recall.csv`."""

from rows import RESULTS, Row, markdown, read_rows

from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM
from octavo.evaluation.recall import Score

FILE = RESULTS / "recall.csv"
FLOAT = "float"
MODEL = "qwen2.5-coder-0.5b"
KINDS = {
    "words": "Each key a word of its own",
    "names": "Keys of two words each, which they share with others: harder, for float too",
}


def key_of(row: Row) -> tuple[str, ...]:
    """What a row is of."""
    return tuple(row[part] for part in ("model", "scheme", "kind", "tokens", "list"))


Answers = dict[tuple[str, str], dict[str, str]]
"""By scheme and length, and by list."""


def recall_table() -> str:
    """Each scheme by length, for each kind of lists: right answers with intervals, and those that float alone has."""
    rows = [row for row in read_rows(FILE) if row["model"] == MODEL]
    of_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    tables = [f"{words}:\n\n{_table(of_kind[kind])}" for kind, words in KINDS.items() if of_kind[kind]]
    if not tables:
        return "Recall is not measured yet."
    return "\n\n".join(tables) + (
        f"\n\n{MODEL} in bfloat16: lists that fill a prompt, and fifty questions on each (forty on the harder ones), "
        "answered greedily; Wilson's interval; empty where it is not measured. `lost` and `won`: questions that float "
        "alone answers, and that the scheme alone does. Bits are those of the shortest prompt, with what is kept so "
        f"that {CROP_ROOM} tokens can be cropped."
    )


def recall_digest() -> str:
    """Shares of right answers by scheme and length, of the kind of lists that float finds again nearly always."""
    found, bits = _answers([row for row in read_rows(FILE) if (row["model"], row["kind"]) == (MODEL, "words")])
    if not found:
        return "Recall is not measured yet."
    lengths = sorted({tokens for _, tokens in found}, key=int)
    rows = [("scheme", f"stored at {int(lengths[0]):,}, bits", *(f"right at {int(tokens):,}" for tokens in lengths))]
    for scheme in sorted(bits, key=lambda name: -bits[name]):
        cells = [share(found.get((scheme, tokens))) for tokens in lengths]
        rows.append((f"`{scheme}`", f"{bits[scheme]:.2f}", *cells))
    return markdown(rows)


def _answers(rows: list[Row]) -> tuple[Answers, dict[str, float]]:
    """Answers, and the bits of each scheme at the shortest length."""
    found: Answers = {}
    bits: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: int(row["tokens"])):
        found.setdefault((row["scheme"], row["tokens"]), {})[row["list"]] = row["answers"]
        bits.setdefault(row["scheme"], float(row["bits"]))
    return found, bits


def share(answered: dict[str, str] | None) -> str:
    """Right answers in percent, and their interval."""
    if answered is None:
        return ""
    marks = "".join(answered.values())
    score = Score(marks.count("+"), len(marks))
    low, high = score.interval
    return f"{100 * score.share:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def _table(rows: list[Row]) -> str:
    found, bits = _answers(rows)
    lengths = sorted({tokens for _, tokens in found}, key=int)
    heads = [head for tokens in lengths for head in (f"right at {int(tokens):,}", "95 % interval", "lost", "won")]
    lines = [("scheme", "bits", *heads)]
    for scheme in sorted(bits, key=lambda name: -bits[name]):
        cells = [cell for tokens in lengths for cell in _cells(found.get((scheme, tokens)), found.get((FLOAT, tokens)))]
        lines.append((f"`{scheme}`", f"{bits[scheme]:.2f}", *cells))
    return markdown(lines)


def _cells(answered: dict[str, str] | None, plain: dict[str, str] | None) -> tuple[str, str, str, str]:
    """Right answers of how many, their interval, and what float alone answers, and what the scheme alone does."""
    if answered is None:
        return "", "", "", ""
    marks = "".join(answered.values())
    score = Score(marks.count("+"), len(marks))
    both = [number for number in answered if plain and number in plain]
    shared = [pair for number in both for pair in zip(plain[number], answered[number], strict=True)]
    lost, won = shared.count(("+", "-")), shared.count(("-", "+"))
    low, high = score.interval
    return f"{score.right}/{score.asked}", f"{100 * low:.0f} to {100 * high:.0f} %", str(lost), str(won)
