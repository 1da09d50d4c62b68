"""One evaluation: which measurements are made of which models, and what came out."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..common.convert.measure.fidelity import Fidelity, windows
from ..common.errors import OctavoError
from ..counting import counted_bits
from ..generate import Speaker
from .memory import Peak
from .reading import Times, longest_of
from .recall import Score, prompts_of, recall
from .text import Read, compare_on_text
from .writing import Divergence, compare_writing

FLOAT, TEXT, WRITING = "float", "text", "writing"
PROMPT = 64
"""Tokens of a prompt behind which models write."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        text: to score on and to write behind; None for neither.
        windows, length: of the text, how many and of how many tokens.
        last: score the predictions of the last so many tokens of a window alone; 0 for all.
        tasks: of recall.
        lengths: of the prompts of recall, in tokens.
        trials: questions of each task and length.
        written: tokens that are written behind each of `prompts` prompts; 0 for none.
        sampled: whether texts are sampled as well.
    """

    text: str | None
    windows: int
    length: int
    last: int
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    trials: int
    written: int
    prompts: int
    sampled: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is measured, at which bits are counted."""
        read = (self.length,) * (self.text is not None) + self.lengths * bool(self.tasks)
        return max(read or (self.length, *self.lengths))


@dataclass
class Result:
    """What was measured of a model.

    Attributes:
        bits: of an element of K and V, as `counted_bits`, in sequences of `Plan.longest` tokens.
        fidelity: to the float model on the text; None of the float model itself, and where there is no text.
        recall: by task and length.
        divergence: of what it writes.
        cache_bytes: by length, of a cache that holds a prompt of it.
        times: of the prompts and steps of recall.
        peak_bytes: by length, the most memory while recall was measured, with the weights; None if the system does not
            tell. Where several models are compared in one process, they share the float weights.
    """

    bits: float
    fidelity: Fidelity | None = None
    recall: dict[tuple[str, int], Score] = field(default_factory=dict)
    divergence: Divergence | None = None
    cache_bytes: dict[int, int] = field(default_factory=dict)
    times: Times = field(default_factory=Times)
    peak_bytes: dict[int, int | None] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The same, for a file."""
        recalled = [
            {"task": task, "length": length, **asdict(score), "share": score.share, "interval": score.interval}
            for (task, length), score in self.recall.items()
        ]
        return {
            "bits": self.bits,
            "text": None if self.fidelity is None else asdict(self.fidelity),
            "recall": recalled,
            "writing": None if self.divergence is None else asdict(self.divergence),
            "cache_bytes": self.cache_bytes,
            "peak_bytes": self.peak_bytes,
            "seconds_per_token": self.times.step,
            "prompt_tokens_per_second": self.times.prompt_speed,
        }


Found = Callable[[str, str | tuple[str, int], Result], None]
"""Takes the name of a model, what was measured of it last (`TEXT`, `WRITING`, or task and length) and all of it."""


def _unheard(name: str, part: str | tuple[str, int], result: Result) -> None:
    """Of what is found nobody wants to know before the end."""


def evaluate(
    reference: Speaker,
    others: Mapping[str, Speaker],
    plan: Plan,
    with_float: bool = True,
    expected: Read | None = None,
    found: Found = _unheard,
) -> dict[str, Result]:
    """Measure models beside the float one.

    Args:
        reference: the float model, with a cache that stores floats.
        with_float: whether it is among the results, with its own recall and times.
        expected: how it reads the windows, where that is kept; see `compare_on_text`.
        found: is told of each measurement once it is made.

    Raises:
        OctavoError: the text is too short, or a prompt is to be; something is longer than what the model is made for.
    """
    _check_lengths(reference, plan)
    everyone = {FLOAT: reference, **others} if with_float else dict(others)
    results = {
        name: Result(counted_bits(speaker.model.config, speaker.scheme, plan.longest, speaker.model.dtype))
        for name, speaker in everyone.items()
    }
    if plan.text is not None and others:
        _on_text(reference, others, plan, results, expected, found)
    for task in plan.tasks:
        for length in plan.lengths:
            prompts = prompts_of(task, reference.tokenizer, length, plan.trials)
            for name, speaker in everyone.items():
                result, peak = results[name], Peak(speaker.model.device)
                recalled = recall(speaker, prompts, f"{task} in {length:,}, {name}", result.times)
                result.recall[task, length], result.cache_bytes[length] = recalled
                most = peak.nbytes()
                before = result.peak_bytes.get(length)
                result.peak_bytes[length] = most if most is None or before is None else max(most, before)
                found(name, (task, length), result)
    return results


def _check_lengths(reference: Speaker, plan: Plan) -> None:
    """Raise an `OctavoError` if something is longer than what the model is made for."""
    most = longest_of(reference.model)
    asked = [("--lengths", length) for length in plan.lengths if plan.tasks]
    if plan.text is not None:
        asked += [("--length", plan.length), ("--written", PROMPT + plan.written if plan.written else 0)]
    for flag, tokens in asked:
        if most is not None and tokens > most:
            about = f" behind prompts of {PROMPT}" if flag == "--written" else ""
            given, room = (plan.written, most - PROMPT) if about else (tokens, most)
            raise OctavoError(f"{flag} {given}: the model is made for {most:,} tokens; give {room} at most{about}")


def _on_text(
    reference: Speaker,
    others: Mapping[str, Speaker],
    plan: Plan,
    results: dict[str, Result],
    expected: Read | None,
    found: Found,
) -> None:
    ids = reference.tokenizer(plan.text, return_tensors="pt", verbose=False)["input_ids"][0].long()
    ids = ids.to(reference.model.device)
    samples = _windows(ids, plan.length, plan.windows)
    for name, fidelity in compare_on_text(reference, others, samples, plan.last, expected).items():
        results[name].fidelity = fidelity
        found(name, TEXT, results[name])
    if plan.written:
        prompts = _windows(ids, PROMPT, plan.prompts)
        for name, written in compare_writing(reference, others, prompts, plan.written, plan.sampled).items():
            results[name].divergence = written
            found(name, WRITING, results[name])


def _windows(ids: torch.Tensor, length: int, count: int) -> list[torch.Tensor]:
    try:
        return [window[0] for window in windows(ids, length, count)]
    except ValueError as error:
        raise OctavoError(f"--eval_file: {error}; give a longer text, or smaller --windows and --length") from None
