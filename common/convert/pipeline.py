"""One decoder layer after another from float to codes: the stages of a conversion, and the state between layers.

Three streams of states go through the layers: calibration texts and held-back texts through the float model, and the
held-back texts through the quantized one.
"""

import torch

from ..architecture import Architecture
from ..runtime.static_scales import Statistics
from .calibration.streams import Texts
from .measure.fidelity import Fidelity
from .measure.held_back import HeldBack
from .output.model import OutputModel, other_activations
from .plan import Plan
from .source.layerwise import LayerwiseModel
from .stages.advance import Advance
from .stages.calibrate import Calibrate
from .stages.head import QuantizeHead
from .stages.measure import Measure
from .stages.quantize import Quantize
from .stages.smooth import Smooth
from .state import ConversionState, LayerStage, LayerWork


class Conversion:
    """A model on its way from float to codes.

    Args:
        architecture: of the model.
        source: the float model.
        plan: what to make of it.
        texts: see `Texts`.
        known: statistics that only a pass of the whole model gives (codebooks, bases).
        measures: whether to measure what each linear and attention costs.

    Attributes:
        output: the quantized model.
        state: what the layers that are done leave to those that follow.
        stages: what is done with a layer, in order.
    """

    def __init__(
        self,
        architecture: Architecture,
        source: LayerwiseModel,
        plan: Plan,
        texts: Texts,
        known: dict[str, torch.Tensor] | None = None,
        measures: bool = False,
    ) -> None:
        self.source, self.plan = source, plan
        self.output = OutputModel(architecture, source, plan)
        compares = plan.has_weight_only and source.device.type == "cpu"
        self.state = ConversionState.of(source, texts, self.output.embedded, known or {}, compares)
        quantize, measure = (stage(source, plan, self.output) for stage in (Quantize, Measure))
        self.stages: list[LayerStage] = [Smooth(source, plan), Calibrate(source, plan), quantize]
        self.stages += [measure] * measures
        self.stages += [Advance(plan, self.output)]

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Convert a decoder layer, and take all texts through it; return its tensors, named for the file."""
        name = self.source.layer_name(index)
        with torch.no_grad(), self.source.layer(index) as module:
            work = LayerWork(index, name, module, self.plan.of(name), self.source.experts_of(module, index))
            for stage in self.stages:
                stage(work, self.state)
        return work.tensors

    def head(self) -> tuple[dict[str, torch.Tensor], Fidelity | None, Fidelity | None]:
        """Convert the last linear, if it is to be, with the norm before it.

        Returns:
            their tensors, how far the model is from the float one, and how far with the other of `cpu_activations`,
            where that differs.
        """
        with torch.no_grad():
            norm = self.source.final_norm()
            weight = self.source.tensor(f"{self.source.facts.head}.weight")
            coded = QuantizeHead(self.source, self.plan, self.output)(norm, weight, self.state)
            ends, otherwise = (norm, weight, coded.norm, coded.linear), None
            fidelity = HeldBack(self.source, self.state.held_back, self.state.coded).fidelity(*ends)
            if self.state.coded_otherwise is not None:
                held_back = HeldBack(self.source, self.state.held_back, self.state.coded_otherwise)
                with other_activations(self.output.module("")):
                    otherwise = held_back.fidelity(*ends)
            return coded.tensors, fidelity, otherwise

    def found(self) -> Statistics:
        """All statistics."""
        return self.state.found(self.source.config)
