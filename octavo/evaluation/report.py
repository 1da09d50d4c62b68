"""What an evaluation found, as tables for a terminal."""

from collections.abc import Mapping, Sequence
from statistics import median

from ..common.command import aligned
from .evaluating import FLOAT, TEXT, WRITING, Result

_NONE = ""


def quality_table(results: Mapping[str, Result]) -> list[str]:
    """Lines of a table of what differs from float, a row for each model."""
    rows = [["", "bits", "KL", "perplexity", "top-1", *_recall_heads(results), "as float for"]]
    for name, result in results.items():
        text, written = result.fidelity, result.divergence
        rows.append(
            [
                name,
                f"{result.bits:.2f}",
                _NONE if text is None else f"{text.kl:.5f}",
                _float_perplexity(results) if text is None else _change(text.perplexity, text.float_perplexity),
                _NONE if text is None else f"{text.top1:.1%}",
                *(f"{score.right}/{score.asked}" for score in result.recall.values()),
                _NONE if written is None else f"{written.mean:.0f} of {written.tokens}",
            ]
        )
    return aligned(_without_empty(rows), texts=1)


def found_line(name: str, part: str | tuple[str, int], result: Result) -> str:
    """One measurement of a model, as `evaluate` tells of it."""
    if part == TEXT:
        text = result.fidelity
        change = _change(text.perplexity, text.float_perplexity)
        return f"{TEXT}, {name}: KL {text.kl:.5f}, perplexity {change}, top-1 {text.top1:.1%}"
    if part == WRITING:
        return f"{WRITING}, {name}: as float for {result.divergence.mean:.0f} of {result.divergence.tokens}"
    task, length = part
    score, nbytes = result.recall[task, length], result.cache_bytes[length]
    return f"{task} {length:,}, {name}: {score.right}/{score.asked}, cache of {nbytes / 1e6:,.1f} MB"


def _recall_heads(results: Mapping[str, Result]) -> list[str]:
    return [f"{task} {length:,}" for task, length in results[FLOAT].recall]


def _change(value: float, of: float) -> str:
    return f"{100 * (value / of - 1):+.2f} %"


def _float_perplexity(results: Mapping[str, Result]) -> str:
    found = next((result.fidelity for result in results.values() if result.fidelity is not None), None)
    return _NONE if found is None else f"{found.float_perplexity:.3f}"


def cost_table(results: Mapping[str, Result]) -> list[str]:
    """Lines of a table of bytes and times, a row for each model; none if nothing was timed."""
    lengths = list(results[FLOAT].cache_bytes)
    peaks = [f"peak at {length:,}, MB" for length in lengths]
    rows = [["", *(f"cache at {length:,}, MB" for length in lengths), *peaks, "ms a token", "prompt, tokens/s"]]
    for name, result in results.items():
        step, speed = result.times.step, result.times.prompt_speed
        sizes = [f"{result.cache_bytes[length] / 1e6:,.1f}" for length in lengths]
        sizes += [_NONE if most is None else f"{most / 1e6:,.0f}" for most in result.peak_bytes.values()]
        rows.append(
            [name, *sizes, _NONE if step is None else f"{step * 1e3:.1f}", _NONE if speed is None else f"{speed:,.0f}"]
        )
    return aligned(_without_empty(rows), texts=1) if lengths else []


def writing_table(results: Mapping[str, Result]) -> list[str]:
    """Lines of a table of where texts depart from float's, a row for each model; none if nothing was written."""
    found = {name: result.divergence for name, result in results.items() if result.divergence is not None}
    rows = [["", "greedy", "least to most", "whole", "sampled", "least to most", "KL on float's text"]]
    for name, written in found.items():
        greedy, sampled = (_spread(counts, written.tokens) for counts in (written.first, written.sampled))
        rows.append([name, *greedy, f"{written.same} of {len(written.first)}", *sampled, f"{written.kl:.5f}"])
    return aligned(_without_empty(rows), texts=1) if found else []


def _spread(counts: Sequence[int], tokens: int) -> list[str]:
    """The median, and between what it lies."""
    return [f"{median(counts):g} of {tokens}", f"{min(counts)} to {max(counts)}"] if counts else [_NONE, _NONE]


def _without_empty(rows: list[list[str]]) -> list[list[str]]:
    """The columns in which some row has something."""
    kept = [index for index in range(len(rows[0])) if any(row[index] for row in rows[1:])]
    return [[row[index] for index in kept] for row in rows]
