"""What to choose of a plan: one line, by the rows of its own tables."""

import shlex
from collections.abc import Sequence

from .sizes import Unit
from .table import TRANSFORMERS, Row

FLOATS = (TRANSFORMERS, "float")


def advise(
    plans: Sequence[Sequence[Row]],
    weights: str,
    model: str | None,
    memory: int,
    unit: Unit,
    made_for: int | None = None,
) -> str:
    """What serves the longest context that was asked for and fits: of all that do, the row of the most bits.

    Schemes that need calibration are taken only where no other serves as long a context: their bits tell less of loss.

    Args:
        plans: the rows of each context.
        weights: how the weights are stored, in a word.
        model: directory or hub id, for the command that measures what a scheme loses; None if there are no weights.
        memory: bytes in which `Row.longest` fits.
        made_for: tokens that the model is made for, if its config says so.
    """
    have = f"With {unit.text(memory)}"
    served = [row for rows in plans for row in rows if row.longest >= row.context]
    if served:
        best = max(served, key=lambda row: (row.context, not row.is_static, row.bits, row.scheme != TRANSFORMERS))
        most = best.longest if made_for is None else max(best.context, min(best.longest, made_for))
        said = f"{have}: {_stored(best, weights)} serve {_tokens(best, best.context)}"
        return f"{said}{f', and {most:,} at most' if most > best.context else ''}{_next(best, model)}"
    last = max((row for rows in plans for row in rows), key=lambda row: row.longest)
    if not last.longest:
        smaller = "try --preset four-bit" if weights == "float" else "give more memory"
        return f"{have} no scheme serves a single token: {weights} weights do not fit; {smaller}"
    shortest = min(rows[0].context for rows in plans)
    return f"{have} no scheme serves {_tokens(last, shortest)}; {_stored(last, weights)} serve {last.longest:,} at most"


def _stored(row: Row, weights: str) -> str:
    return f"{weights} weights + {'a float cache' if row.scheme in FLOATS else row.scheme}"


def _tokens(row: Row, tokens: int) -> str:
    return f"{f'{row.batch} x ' if row.batch > 1 else ''}{tokens:,} tokens"


def _next(row: Row, model: str | None) -> str:
    """Floats lose nothing; what a scheme loses is to be measured."""
    if row.scheme in FLOATS:
        return "; no cache has to be quantized for that"
    return "" if model is None else f"; octavo doctor {shlex.quote(model)} --measure says what schemes lose"
