"""A table of the best schemes of few bits, Octavo's and others', by what they lose and what they recall."""

from quality import FLOAT_WEIGHTS, PROSE
from quality_tables import LENGTHS, MODELS_SCORED, OURS, WINDOWS, bits_at, quality_of
from recall_tables import FILE, FLOAT, MODEL, share
from rows import Row, markdown, read_rows, scores

from octavo.common.runtime.schemes.kv_scheme import PRESETS, load_scheme

CEILINGS = (4.7, 3.7, 2.7)
"""Bits of an element of K and V at 2,048 tokens, at most."""
BETTER = 0.05
"""By how much more of the right answers a scheme of more KL stands there as well."""
KINDS = {
    "Octavo, calibrated": lambda name: name.startswith(OURS) and load_scheme(name).is_static,
    "Octavo": lambda name: name.startswith(OURS) and not load_scheme(name).is_static,
    "others' best": lambda name: not name.startswith(OURS),
}
ASKED = ("1600", "8192")
"""Tokens of the lists in which schemes are asked for values."""


def digest_table() -> str:
    """Of each kind, up to so many bits, the scheme of the least KL on the first model and the one that recalls best."""
    found = {model: quality_of(model, WINDOWS[model], PROSE) for model in MODELS_SCORED}
    first = found[MODELS_SCORED[0]]
    asked = [row for row in read_rows(FILE) if (row["model"], row["kind"]) == (MODEL, "words")]
    heads = [f"{model}: KL" for model in MODELS_SCORED]
    heads += [f"recalled of {int(tokens):,} tokens" for tokens in ASKED]
    rows = [("bits, at most", "", "scheme", "bits", *heads)]
    for ceiling in CEILINGS:
        for kind, holds in KINDS.items():
            fitting = [name for name in PRESETS if holds(name) and bits_at(name, LENGTHS[0]) <= ceiling]
            scored = {
                name: float(first[FLOAT_WEIGHTS + name]["kl"]) for name in fitting if FLOAT_WEIGHTS + name in first
            }
            for name in _best(scored, asked):
                losses = [scores(found[model].get(FLOAT_WEIGHTS + name))[0] for model in MODELS_SCORED]
                recalled = [_recalled(asked, name, tokens) for tokens in ASKED]
                rows.append((f"{ceiling}", kind, f"`{name}`", f"{bits_at(name, LENGTHS[0]):.2f}", *losses, *recalled))
    plain = [_recalled(asked, FLOAT, tokens) for tokens in ASKED]
    return (
        f"{markdown(rows, 3)}\n\nKL(float || quantized) in nats per token, {WINDOWS[MODELS_SCORED[0]]} windows of "
        f"{MODELS_SCORED[0]} and {WINDOWS[MODELS_SCORED[1]]} of {MODELS_SCORED[1]} of {LENGTHS[0]:,} tokens of English "
        f"Wikipedia; pairs of lists, two or one of them, that are found again by their keys, with Wilson's 95 % "
        f"interval, {MODEL}" + (f", of which float finds {' and '.join(plain)}." if all(plain) else ".")
    )


def _best(scored: dict[str, float], asked: list[Row]) -> list[str]:
    """The scheme of the least KL, and behind it that which recalls best of the most tokens, if it is better at that."""
    if not scored:
        return []
    right = {name: "".join(_answered(asked, name, ASKED[-1]).values()) for name in scored}
    shares = {name: marks.count("+") / len(marks) if marks else -1 for name, marks in right.items()}
    first = min(scored, key=scored.__getitem__)
    best = max(scored, key=lambda name: (shares[name], -scored[name]))
    return [first, best] if shares[best] > shares[first] + BETTER else [first]


def _answered(asked: list[Row], name: str, tokens: str) -> dict[str, str]:
    """Answers of a scheme by list, the newest of each."""
    return {row["list"]: row["answers"] for row in asked if (row["scheme"], row["tokens"]) == (name, tokens)}


def _recalled(asked: list[Row], name: str, tokens: str) -> str:
    return share(_answered(asked, name, tokens) or None)
