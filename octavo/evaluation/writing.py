"""How soon what a model writes departs from what the float model writes, and how far it is from it on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from tqdm import tqdm

from ..generate import Speaker
from .reading import Reader
from .text import compare_on_text


@dataclass(frozen=True)
class Divergence:
    """Of texts, each from a prompt of its own.

    Attributes:
        first: of each greedy one, how many tokens are as the float model's before the first that is not.
        tokens: how many each has.
        kl: KL(float || model) in nats, the mean over the tokens of what the float model wrote greedily.
        sampled: as `first`, of texts sampled at temperature 1 with the same random numbers; none if none were.
    """

    first: tuple[int, ...]
    tokens: int
    kl: float
    sampled: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        return mean(self.first)

    @property
    def same(self) -> int:
        """How many greedy texts are the same to the end."""
        return sum(count == self.tokens for count in self.first)


def compare_writing(
    reference: Speaker,
    others: Mapping[str, Speaker],
    prompts: Sequence[torch.Tensor],
    tokens: int,
    with_sampled: bool = False,
) -> dict[str, Divergence]:
    """Where what models write departs from what the float one writes.

    Args:
        prompts: token ids, `[S]` each.
        tokens: to write behind each.
        with_sampled: sample texts as well, each prompt with random numbers of its own, which all models share.
    """
    ways = ("first", "sampled") if with_sampled else ("first",)
    counts: dict[str, dict[str, list[int]]] = {name: {way: [] for way in ways} for name in others}
    texts = []
    for seed, ids in enumerate(tqdm(prompts, desc="writing", unit="prompt")):
        for way in ways:
            chosen = seed if way == "sampled" else None
            expected = _written(reference, ids, tokens, chosen)
            if chosen is None:
                texts.append(torch.cat((ids, ids.new_tensor(expected))))
            for name, speaker in others.items():
                counts[name][way].append(_common(expected, _written(speaker, ids, tokens, chosen)))
    along = compare_on_text(reference, others, texts, tokens)
    return {
        name: Divergence(tuple(found["first"]), tokens, kl=along[name].kl, sampled=tuple(found.get("sampled", ())))
        for name, found in counts.items()
    }


def _written(speaker: Speaker, ids: torch.Tensor, tokens: int, seed: int | None) -> list[int]:
    reader = Reader(speaker)
    chance = None if seed is None else torch.Generator().manual_seed(seed)
    return reader.write(reader.read(ids), tokens, chance)


def _common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(one))
