"""What was measured of a candidate, as the page, the table and the advice read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..evaluation.evaluating import FLOAT
from ..evaluation.recall import Score


@dataclass(frozen=True)
class AtLength:
    """With a prompt of some length.

    Attributes:
        cache_bytes: of its cache, as allocated.
        step: milliseconds of a token that is written; None if none was timed.
        prompt_speed: tokens of the prompt a second.
    """

    cache_bytes: int
    step: float | None
    prompt_speed: float | None


@dataclass(frozen=True)
class Row:
    """The figures of a candidate; those of the text are None of the float model, and where there is no text.

    Attributes:
        name, kind, about, command: as of the candidate.
        bits: of an element of K and V, as `counted_bits`.
        bits_at: in sequences of so many tokens.
        weight_bytes: of the files of the weights.
        kl, top1: as of `Fidelity`.
        perplexity: in parts of the float model's.
        as_float, written: tokens written as the float model does before one differs, in the mean, and of how many.
        recall: by task and length.
        lengths: by tokens of a prompt.
        planned: bytes of the cache in use, by tokens.
        of, option, stated: of a step, the preset or scheme that is taken so far, the last option that is in, and what
            states it; else empty.
    """

    name: str
    kind: str
    about: str
    command: str
    bits: float
    bits_at: int
    weight_bytes: int
    kl: float | None
    perplexity: float | None
    top1: float | None
    as_float: float | None
    written: int
    recall: dict[tuple[str, int], Score]
    lengths: dict[int, AtLength]
    planned: dict[int, int]
    of: str = ""
    option: str = ""
    stated: str = ""

    @property
    def is_float(self) -> bool:
        return self.kind == FLOAT

    @property
    def context(self) -> int:
        """Tokens at which caches are compared: the longest prompt that was measured, or the most that were planned."""
        return max(self.lengths or self.planned)

    @property
    def cache_bytes(self) -> int:
        """Of the cache of so many."""
        return self.lengths[self.context].cache_bytes if self.lengths else self.planned[self.context]

    @property
    def nbytes(self) -> int:
        """Of the weights and the cache together."""
        return self.weight_bytes + self.cache_bytes


def row_of(record: Mapping[str, Any]) -> Row:
    """The row of a record that `measure_all` wrote."""
    text, writing = record["text"], record["writing"]
    lengths = {int(length): found for length, found in record["lengths"].items()}
    return Row(
        *(record[name] for name in ("name", "kind", "about", "command", "bits")),
        bits_at=record["conditions"]["bits_at"],
        weight_bytes=record["weight_bytes"],
        kl=None if text is None else text["kl"],
        perplexity=None if text is None else text["perplexity"] / text["float_perplexity"],
        top1=None if text is None else text["top1"],
        as_float=None if writing is None else mean(writing["first"]),
        written=0 if writing is None else writing["tokens"],
        recall={
            (each["task"], length): Score(each["right"], each["asked"])
            for length, found in lengths.items()
            for each in found["recall"]
        },
        lengths={length: _at_length(found) for length, found in lengths.items()},
        planned={int(tokens): size for tokens, size in record["planned_cache_bytes"].items()},
        **(record.get("step") or {}),
    )


def _at_length(found: Mapping[str, Any]) -> AtLength:
    step = found["seconds_per_token"]
    return AtLength(found["cache_bytes"], None if step is None else 1e3 * step, found["prompt_tokens_per_second"])
