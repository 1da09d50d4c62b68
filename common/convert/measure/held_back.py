"""The fidelity of a model, once held-back texts have gone through all of its layers.

S tokens, E hidden size, V vocabulary.
"""

import torch
from torch import nn

from ...runtime.decoder import capped_logits
from ..calibration.streams import Stream
from ..source.layerwise import MOST_LOGITS, LayerwiseModel
from .fidelity import Comparison, Fidelity


class HeldBack:
    """Held-back texts behind the last layer of the float and of the quantized model.

    Args:
        source: the float model.
        plain, coded: the texts' states behind the last layer of the float and of the quantized model.
    """

    def __init__(self, source: LayerwiseModel, plain: Stream, coded: Stream) -> None:
        self._source, self._plain, self._coded = source, plain, coded

    def fidelity(
        self, norm: nn.Module, weight: torch.Tensor, coded_norm: nn.Module, coded_linear: nn.Module | None
    ) -> Fidelity | None:
        """Compare both models; None if no token can be predicted.

        Args:
            norm: last one of the float model.
            weight: `[V, E]` of its last linear.
            coded_norm: last one of the quantized model.
            coded_linear: its last linear; None where that is the float model's.
        """
        comparison = Comparison()
        rows = max(1, MOST_LOGITS // len(weight))
        for ids, plain, coded in zip(self._plain.ids, self._plain.hidden, self._coded.hidden, strict=True):
            plain, coded, targets = norm(plain)[0, :-1], coded_norm(coded)[0, :-1], ids[0, 1:]
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                comparison.add(*self._logits(plain[part], coded[part], weight, coded_linear), targets[part])
        return comparison.fidelity() if comparison.tokens else None

    def _logits(
        self, plain: torch.Tensor, coded: torch.Tensor, weight: torch.Tensor, coded_linear: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both models, `[S, V]`; a weight that they share is made float32 once for both."""
        if coded_linear is not None:
            capped = capped_logits(self._source.facts, self._source.config, coded_linear(coded))
            return self._source.logits(plain, weight), capped
        both = self._source.logits(torch.cat((plain, coded)), weight)
        return both[: len(plain)], both[len(plain) :]
