"""How soon what a model writes departs from what the float model writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from tqdm import tqdm

from ..generate import Speaker
from .reading import Reader


@dataclass(frozen=True)
class Divergence:
    """Of greedy texts, each from a prompt of its own.

    Attributes:
        first: of each, how many tokens are as the float model's before the first that is not.
        tokens: how many each has.
    """

    first: tuple[int, ...]
    tokens: int

    @property
    def mean(self) -> float:
        return mean(self.first)

    @property
    def same(self) -> int:
        """How many texts are the same to the end."""
        return sum(count == self.tokens for count in self.first)


def compare_writing(
    reference: Speaker, others: Mapping[str, Speaker], prompts: Sequence[torch.Tensor], tokens: int
) -> dict[str, Divergence]:
    """Where what models write, greedily, departs from what the float one writes.

    Args:
        prompts: token ids, `[S]` each.
        tokens: to write behind each.
    """
    first: dict[str, list[int]] = {name: [] for name in others}
    for ids in tqdm(prompts, desc="writing", unit="prompt"):
        expected = _written(reference, ids, tokens)
        for name, speaker in others.items():
            first[name].append(_common(expected, _written(speaker, ids, tokens)))
    return {name: Divergence(tuple(counts), tokens) for name, counts in first.items()}


def _written(speaker: Speaker, ids: torch.Tensor, tokens: int) -> list[int]:
    reader = Reader(speaker)
    return reader.write(reader.read(ids), tokens)


def _common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(one))
