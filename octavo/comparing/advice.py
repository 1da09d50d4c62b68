"""What to choose, computed from the figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from .rows import Row
from .table import MB

MAX_KL = 0.01
"""What a choice may lose unless it is told: KL to the float model, in nats."""


@dataclass(frozen=True)
class Advice:
    """What to choose.

    Attributes:
        choice: the name of it; None if nothing is within the bounds.
        sentences: which, and why.
        command: that runs it.
    """

    choice: str | None
    sentences: str
    command: str | None = None


def recalls_as_float(row: Row, plain: Row) -> bool:
    """Whether every score of recall is within the 95 % interval of the float model's, or above it."""
    return all(row.recall[key].share >= score.interval[0] for key, score in plain.recall.items())


def front(rows: Sequence[Row]) -> list[Row]:
    """Those than which no other has both fewer bits and a smaller KL, those of the fewest bits first."""
    found: list[Row] = []
    for row in sorted((row for row in rows if row.kl is not None), key=lambda row: (row.bits, row.kl)):
        if not found or row.kl < found[-1].kl:
            found.append(row)
    return found


def advise(rows: Sequence[Row], max_kl: float) -> Advice:
    """The candidate of the fewest bytes under a KL and with the recall of float; of as many, of the smallest KL."""
    plain, others = next(row for row in rows if row.is_float), [row for row in rows if not row.is_float]
    if not others:
        return Advice(None, "There is nothing beside float to choose from.")
    has_text = any(row.kl is not None for row in others)
    if not has_text and not plain.recall:
        return Advice(None, "Neither a text nor recall was measured, so nothing says what to choose.")
    near = [row for row in others if row.kl is None or row.kl <= max_kl]
    fit = [row for row in near if recalls_as_float(row, plain)]
    if fit:
        best = min(fit, key=lambda row: (row.nbytes, row.kl or 0.0))
        return Advice(best.name, _praise(best, plain, max_kl), best.command)
    return Advice(None, _none_fits(others, near, max_kl))


def _praise(best: Row, plain: Row, max_kl: float) -> str:
    bounds = [f"a KL of {max_kl:g} at most"] if best.kl is not None else []
    bounds += ["recall within the interval of float's"] if plain.recall else []
    near = f", at a KL of {best.kl:.2g}" if best.kl is not None else ""
    weights = f"weights of {_megabytes(best.weight_bytes, plain.weight_bytes)}"
    said = [
        f"Choose {best.name}: of all with {' and '.join(bounds)}, its weights and cache take the fewest bytes, "
        f"{_megabytes(best.nbytes, plain.nbytes)}{near}",
        f"That is {weights}, and at {best.context:,} tokens a cache of "
        f"{_megabytes(best.cache_bytes, plain.cache_bytes)}; an element of K and V takes {best.bits:.2f} bits instead "
        f"of {plain.bits:.0f} at {best.bits_at:,} tokens",
    ]
    if best.lengths:
        one, other = (row.lengths[row.context].step for row in (best, plain))
        if one is not None and other is not None:
            said.append(f"A token takes {one:.3g} ms instead of {other:.3g} ms")
    if plain.recall:
        said.append(_recall_words(best, plain))
    return ". ".join(said) + "."


def _megabytes(own: int, plain: int) -> str:
    return f"{own / MB:.3g} MB " + ("as in float" if own == plain else f"instead of {plain / MB:.3g} MB")


def _recall_words(best: Row, plain: Row) -> str:
    right, own = (sum(score.right for score in row.recall.values()) for row in (best, plain))
    asked = sum(score.asked for score in plain.recall.values())
    if all(score.interval[0] < 0.01 for score in plain.recall.values()):
        return f"Float itself recalls {own} of {asked}, so recall decides nothing here"
    return f"It recalls {right} of {asked}, float {own}"


def _none_fits(others: Sequence[Row], near: Sequence[Row], max_kl: float) -> str:
    if near:
        names = ", ".join(row.name for row in near)
        return (
            f"Stay with float, or try others: none with a KL of {max_kl:g} at most recalls as float does ({names} "
            "recall less)."
        )
    best = min((row for row in others if row.kl is not None), key=lambda row: row.kl)
    return (
        f"Nothing here has a KL of {max_kl:g} at most; the nearest is {best.name}, with {best.kl:.2g} at "
        f"{best.bits:.2f} bits. Raise --max_kl, or try schemes of more bits."
    )
