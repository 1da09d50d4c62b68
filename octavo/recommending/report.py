"""What was measured of schemes, as a table, and what to choose by it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..common.command import aligned
from ..common.runtime.schemes.kv_scheme import PRESETS, load_scheme
from ..evaluation.recall import Score
from ..place import usual_output
from .measuring import CALIBRATED, Limits, Measured

UNTOLD = (
    "KL on a short text does not tell: in long contexts copying and recall suffer first, with 3 bits and fewer most: "
    "octavo-4c, octavo-3c and octavo-3tc keep them best (docs/schemes.md); octavo evaluate MODEL --schemes NAME "
    "--lengths N measures recall at any length",
    "KL grows with the length, as less of it is sinks and float windows, and differs between texts: --length 2048, "
    "--windows and --eval_file measure more, and take longer",
    "KL is of the cache alone: octavo convert quantizes linears and embeddings to 8 bits, too, unless told otherwise",
)


def table(found: Sequence[Measured], lengths: Sequence[int]) -> list[str]:
    """Lines of a table, a row for the float model and for each scheme.

    Args:
        lengths: of the one prompt of recall, in tokens.
    """
    plain, *others = found
    recalls = plain.recall is not None
    asked = [f"recall {lengths[0]:,}"] if recalls else []
    head = ["", "bits", "bytes a token", "KL", "perplexity", "top-1", *asked, ""]
    rows = [head, *(_cells(each, recalls, others) for each in found)]
    return aligned(rows, texts=1)


def _cells(row: Measured, recalls: bool, others: Sequence[Measured]) -> list[str]:
    text = row.fidelity
    figures = ["", f"{others[0].fidelity.float_perplexity:.3f}", ""]  # all have read the same text
    if text is not None:
        change = 100 * (text.perplexity / text.float_perplexity - 1)
        figures = [f"{text.kl:.5f}", f"{change:+.2f} %", f"{text.top1:.1%}"]
    score = ["" if row.recall is None else f"{row.recall.right}/{row.recall.asked}"] if recalls else []
    verdict = "passes" if row.passes else {"KL": "too much KL", "recall": "recalls less", "": ""}[row.fault]
    return [row.scheme, f"{row.bits:.2f}", f"{row.token_bytes:,}", *figures, *score, verdict]


def _decides_nothing(plain: Score | None) -> bool:
    """Whether float itself answers less than half."""
    return plain is not None and 2 * plain.right < plain.asked


def notes(found: Sequence[Measured]) -> list[str]:
    """What the figures do not tell, in lines."""
    plain, others = found[0].recall, []
    if _decides_nothing(plain):
        own = plain.right or "none"
        others.append(f"recall: float itself answers {own} of {plain.asked}, so that it decides nothing here")
    if not any(load_scheme(each.scheme).is_static for each in found[1:]):
        names = ", ".join(CALIBRATED)
        others.append(f"{names} lose less in as many bits, by a calibration: --calibrate measures them, too")
    return [*others, *UNTOLD]


def advice(found: Sequence[Measured], limits: Limits, model: str, calib_file: Path | None = None) -> str:
    """What to choose, in a line.

    Args:
        calib_file: texts that calibrated schemes rest on; None: those that come with Octavo.
    """
    plain, *others = found
    fit = [each for each in others if each.passes]
    bound = f"a KL of {limits.kl:g} at most"
    if limits.recall is not None and not _decides_nothing(plain.recall):
        bound += f" and {limits.recall:g} points of recall lost at most"
    if not fit:
        return f"None of these has {bound}; {_nearest(others)}. Raise the limit, or name others by --schemes"
    best = min(fit, key=lambda each: (each.bits, each.fidelity.kl))
    return (
        f"Choose {best.scheme}: of those measured the fewest bits, {best.bits:.2f}, with {bound}; its KL is "
        f"{best.fidelity.kl:.2g}: {command(best.scheme, model, calib_file)}"
    )


def _nearest(others: Sequence[Measured]) -> str:
    forgetful = [each for each in others if each.fault == "recall"]
    if forgetful:
        best = max(forgetful, key=lambda each: (each.recall.share, -each.bits))
        return f"the nearest is {best.scheme}, of {best.bits:.2f} bits, which recalls {best.recall.right} of " \
               f"{best.recall.asked}"  # fmt: skip
    best = min(others, key=lambda each: each.fidelity.kl)
    return f"the nearest is {best.scheme}, with a KL of {best.fidelity.kl:.2g} at {best.bits:.2f} bits"


def command(scheme: str, model: str, calib_file: Path | None = None) -> str:
    """What converts a model with a scheme of its KV cache."""
    output = usual_output(model, f"-{scheme}" if scheme in PRESETS else "-octavo")
    texts = ["--calib_file", str(calib_file)] if calib_file and load_scheme(scheme).is_static else []
    return shlex.join(["octavo", "convert", model, "--scheme", scheme, *texts, "--save_directory", str(output)])
