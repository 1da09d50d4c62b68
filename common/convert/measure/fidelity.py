"""How far a quantized model is from the float one, token by token."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

ROWS = 256
"""Tokens compared at a time, to bound the memory of two vocabularies' worth of float64."""

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""`[1, S]` token ids to `[1, S, vocabulary]` logits."""


@dataclass(frozen=True)
class Fidelity:
    """Means over all predicted tokens; perplexities of the next token, KL in nats.

    Attributes:
        tokens: how many predictions were compared.
        kl: mean KL(float || quantized).
        perplexity, float_perplexity: of the quantized and of the float model.
        top1: share of tokens on which both models' most likely token is the same.
    """

    tokens: int
    kl: float
    perplexity: float
    float_perplexity: float
    top1: float


class Comparison:
    """Running sums of a comparison of two models."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)
        self.tokens = 0

    def add(self, float_logits: torch.Tensor, quantized_logits: torch.Tensor, targets: torch.Tensor) -> None:
        """See both models' logits `[T, V]` for the next tokens `[T]`."""
        device = quantized_logits.device
        expected, actual = (logits.to(device).double().log_softmax(-1) for logits in (float_logits, quantized_logits))
        target = targets[:, None].to(device)
        sums = (
            (expected.exp() * (expected - actual)).sum(),
            -actual.gather(1, target).sum(),
            -expected.gather(1, target).sum(),
            (expected.argmax(-1) == actual.argmax(-1)).sum(),
        )
        self._sums += torch.stack([part.double() for part in sums]).cpu()
        self.tokens += len(targets)

    def fidelity(self) -> Fidelity:
        """The means.

        Raises:
            ValueError: nothing was seen.
        """
        if self.tokens == 0:
            raise ValueError("nothing to compare: every sample is shorter than two tokens")
        kl, loss, float_loss, top1 = (self._sums / self.tokens).tolist()
        return Fidelity(self.tokens, kl, math.exp(loss), math.exp(float_loss), top1)


def compare(float_logits: LogitsOf, quantized_logits: LogitsOf, samples: Iterable[torch.Tensor]) -> Fidelity:
    """Compare two models on `[1, S]` samples of token ids, teacher-forced.

    Raises:
        ValueError: no sample has two tokens, so that nothing is predicted.
    """
    comparison = Comparison()
    for ids in samples:
        with torch.inference_mode():
            pair = [logits_of(ids)[0, :-1] for logits_of in (float_logits, quantized_logits)]
        for start in range(0, ids.shape[1] - 1, ROWS):
            stop = start + ROWS
            comparison.add(pair[0][start:stop], pair[1][start:stop], ids[0, 1:][start:stop])
    return comparison.fidelity()


def windows(ids: torch.Tensor, length: int, count: int) -> list[torch.Tensor]:
    """`count` windows of `length` tokens, `[1, length]` each, spread evenly over the `[N]` tokens of a text.

    Raises:
        ValueError: the text is too short.
    """
    if len(ids) < length * count:
        raise ValueError(f"the text has {len(ids)} tokens and {count} windows of {length} need {length * count}")
    stride = len(ids) // count
    return [ids[start : start + length][None] for start in range(0, stride * count, stride)]
