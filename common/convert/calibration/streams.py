"""States of texts on their way through the layers of a float model. S tokens, E hidden size."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..source.layerwise import LayerwiseModel
from ..source.probes import layer_arguments


@dataclass
class Stream:
    """States of some texts on their way through the layers of a model.

    Attributes:
        ids, masks: `[1, S]` of each text.
        hidden: `[1, S, E]` of each text, which the next layer is given.
        arguments: of the layers of a float model, by text and layer.
    """

    ids: list[torch.Tensor]
    masks: list[torch.Tensor]
    hidden: list[torch.Tensor]
    arguments: list[list[dict[str, Any]]] = field(default_factory=list)

    @classmethod
    def of(cls, source: LayerwiseModel, samples: list[dict[str, torch.Tensor]]) -> "Stream":
        """Texts before the first layer of a float model."""
        ids = [sample["input_ids"] for sample in samples]
        masks = [sample["attention_mask"].to(source.device) for sample in samples]
        hidden = [source.embedded(part) for part in ids]
        arguments = [
            layer_arguments(source.model, state, attention_mask=mask, use_cache=False)
            for state, mask in zip(hidden, masks, strict=True)
        ]
        return cls(ids, masks, hidden, arguments)

    def through(self, layer: nn.Module, index: int, most_tokens: int | None = None) -> list[torch.Tensor]:
        """What a float layer makes of the states; of as many texts as have `most_tokens`."""
        outputs, tokens = [], 0
        for state, arguments in zip(self.hidden, self.arguments, strict=True):
            if most_tokens is not None and tokens >= most_tokens:
                break
            outputs.append(layer(state, **arguments[index]))
            tokens += state.shape[1]
        return outputs

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(part.shape[1] for part in self.ids)


@dataclass(frozen=True)
class Texts:
    """Token ids and masks: to calibrate on, held back, and, if static scales are to come from others, those."""

    calibration: list[dict[str, torch.Tensor]]
    held_back: list[dict[str, torch.Tensor]]
    for_scales: list[dict[str, torch.Tensor]] | None = None
