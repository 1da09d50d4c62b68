"""What a conversion carries from layer to layer, and what its stages make of the layer in work.

S tokens, E hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..runtime.experts import ExpertList
from ..runtime.schemes.linear_scheme import LinearInputs
from ..runtime.static_scales import Statistics, statistics_facts
from .calibration.streams import Stream, Texts
from .measure.costs import Cost
from .source.layerwise import LayerwiseModel

_STATISTICS = "statistics."


@dataclass
class ConversionState:
    """What the layers that follow need of those that are done.

    Attributes:
        calibration: calibration texts on their way through the float model.
        held_back: held-back texts on their way through the float model.
        coded: held-back texts on their way through the quantized model.
        coded_otherwise: the same with the other of `cpu_activations`; None where that is the same.
        for_scales: texts that static scales come from; None where those are the calibration texts.
        statistics: of calibration, by their names in a statistics file.
        costs: what quantizing each linear and attention alone costs, if measured.
        unreached: names of the experts that no calibration token chose, where anything follows from their inputs; those
            of all tokens were taken for theirs.
    """

    calibration: Stream
    held_back: Stream
    coded: Stream
    for_scales: Stream | None
    coded_otherwise: Stream | None = None
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        source: LayerwiseModel,
        texts: Texts,
        embedded: Callable[[torch.Tensor], torch.Tensor],
        known: dict[str, torch.Tensor],
        compares_activations: bool,
    ) -> "ConversionState":
        """Texts before the first layer.

        Args:
            embedded: what the quantized model makes of `[1, S]` ids.
            known: statistics that are there already.
            compares_activations: whether there is to be a `coded_otherwise`.
        """
        calibration = Stream.of(source, texts.calibration)
        for_scales = None if texts.for_scales is None else Stream.of(source, texts.for_scales)
        held_back = Stream.of(source, texts.held_back)
        coded = Stream(held_back.ids, held_back.masks, [embedded(part) for part in held_back.ids])
        otherwise = replace(coded, hidden=list(coded.hidden)) if compares_activations else None
        return cls(calibration, held_back, coded, for_scales, otherwise, dict(known))

    def found(self, config: PreTrainedConfig) -> Statistics:
        """All statistics of a model of that config."""
        return Statistics(self.statistics, statistics_facts(config, self.calibration.tokens))

    def _streams(self) -> dict[str, Stream]:
        streams = {"calibration": self.calibration, "float": self.held_back, "coded": self.coded}
        others = {"for_scales": self.for_scales, "coded_otherwise": self.coded_otherwise}
        return streams | {name: stream for name, stream in others.items() if stream is not None}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All but costs and names, to be kept for another process."""
        states = {f"{name}.{i}": t for name, stream in self._streams().items() for i, t in enumerate(stream.hidden)}
        return states | {f"{_STATISTICS}{name}": tensor for name, tensor in self.statistics.items()}

    def restore(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """The inverse of `tensors`."""
        for name, stream in self._streams().items():
            stream.hidden = [tensors[f"{name}.{i}"].to(device) for i in range(len(stream.hidden))]
        self.statistics = {
            name.removeprefix(_STATISTICS): tensor for name, tensor in tensors.items() if name.startswith(_STATISTICS)
        }


@dataclass
class LayerWork:
    """A decoder layer in memory, and what the stages make of it, one after another.

    Attributes:
        index: of the layer.
        name: as `model.layers.3`.
        module: the float layer, which smoothing rewrites.
        quantized: names within the layer of the linears that will be quantized.
        expected: what the layer makes of the first calibration text before it is rewritten; None if it is not.
        experts: of the layer; None if it has none.
        inputs: what calibration saw of their inputs.
        tensors: of the layer of the output, named for the file.
        coded: the layer that a load of the output gives, in float32.
    """

    index: int
    name: str
    module: nn.Module
    quantized: list[str]
    experts: ExpertList | None = None
    expected: torch.Tensor | None = None
    inputs: dict[str, LinearInputs] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    coded: nn.Module | None = None


LayerStage = Callable[[LayerWork, ConversionState], None]
"""A step of a conversion, which finds and leaves what it works on in both."""
