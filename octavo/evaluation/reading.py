"""How a model reads and writes through its cache, which is what every measurement here does.

S tokens of a prompt, V size of the vocabulary.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ..common.runtime.compatibility import cache_argument
from ..generate import Speaker

CHUNK = 512
"""Tokens of a pass, of whose logits there are as many rows."""


def longest_of(model: Any) -> int | None:
    """Tokens that a model is made for; None if its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


@dataclass
class Times:
    """How long passes took, in seconds.

    Attributes:
        prompts: of each prompt that was read, and its tokens.
        steps: of each single token.
    """

    prompts: list[tuple[float, int]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def step(self) -> float | None:
        """The median of single tokens; None if there were none."""
        return median(self.steps) if self.steps else None

    @property
    def prompt_speed(self) -> float | None:
        """Tokens of prompts a second; None if none were read."""
        seconds = sum(taken for taken, _ in self.prompts)
        return sum(tokens for _, tokens in self.prompts) / seconds if seconds else None


class Reader:
    """A sequence that a model reads and writes, batch 1.

    Attributes:
        cache: what it has read.
    """

    def __init__(self, speaker: Speaker, times: Times | None = None) -> None:
        self._model, self._tokenizer, self._name = speaker.model, speaker.tokenizer, cache_argument(speaker.model)
        self.cache, self._times = speaker.new_cache(), times

    def ids_of(self, text: str, **arguments: Any) -> torch.Tensor:
        """Token ids `[S]` of a text, where the model is."""
        ids = self._tokenizer(text, return_tensors="pt", verbose=False, **arguments)["input_ids"][0]
        return ids.long().to(self._model.device)

    def text_of(self, ids: list[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _pass(self, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return self._model(ids[None], **{self._name: self.cache}, **arguments).logits[0]

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Read ids `[S]`; yields the logits `[chunk, V]` of all tokens, some at a time."""
        for part in ids.split(CHUNK):
            yield self._pass(part)

    @torch.inference_mode()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read ids `[S]`; returns the logits `[V]` behind the last."""
        is_prompt, started = self.cache.get_seq_length() == 0, time.perf_counter()
        found = self._pass(ids, logits_to_keep=1)[-1]
        if self._times is not None and is_prompt:
            self._times.prompts.append((time.perf_counter() - started, len(ids)))
        return found

    @torch.inference_mode()
    def write(self, logits: torch.Tensor, count: int, chance: torch.Generator | None = None) -> list[int]:
        """The likeliest token behind `logits` `[V]`, and those behind it: so many ids.

        Args:
            chance: sample them, by the largest logit plus Gumbel noise (Gumbel 1954), so that two models with the same
                generator differ by their logits alone.
        """
        found = [_token(logits, chance)]
        while len(found) < count:
            started = time.perf_counter()
            logits = self._pass(torch.tensor(found[-1:], device=self._model.device))[-1]
            if self._times is not None:
                self._times.steps.append(time.perf_counter() - started)
            found.append(_token(logits, chance))
        return found

    def forget(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.cache.crop(length - self.cache.get_seq_length())


def _token(logits: torch.Tensor, chance: torch.Generator | None) -> int:
    if chance is None:
        return int(logits.argmax())
    noise = -(-torch.rand(logits.shape, generator=chance, dtype=torch.float64).clamp_min(1e-300).log()).log()
    return int((logits.double().cpu() + noise).argmax())
