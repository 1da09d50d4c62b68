"""Calibrate: what a float layer's attention and linears see of the calibration texts, which go through it.

S tokens, E hidden size.
"""

import torch

from ...errors import OctavoError
from ...runtime.decoder import attention_modules
from ...runtime.schemes.linear_scheme import LinearInputs
from ...runtime.static_scales import Statistics
from ..calibration.observe import InputObservers, attention_tensors, input_tensors, observing_attention
from ..calibration.streams import Stream
from ..measure.costs import relative_error
from ..plan import Plan
from ..source.layerwise import LayerwiseModel
from ..spelling import named
from ..state import ConversionState, LayerWork


def observed(
    stream: Stream, work: LayerWork, linears: list[str], keeps_hessian: bool = False
) -> tuple[dict[str, LinearInputs], list[torch.Tensor], list[int]]:
    """What the inputs of linears of a layer are like, by name, and what the layer makes of texts, `[1, S, E]` each.

    Experts that no token chose are given those of all; their numbers come third.
    """
    modules = {part: work.module.get_submodule(part) for part in linears}
    observers = InputObservers(modules, keeps_hessian, work.experts)
    try:
        outputs = stream.through(work.module, work.index)
        unreached = observers.reach_all_experts()
    finally:
        observers.remove()
    return observers.inputs(), outputs, unreached


MOST_CHANGE = 1e-4
"""Mean over tokens of `|difference|^2 / |output|^2` by which smoothing may change a layer; rounding stays far below."""


class Calibrate:
    """Leaves statistics of attention and linears in the state, and the inputs of linears in the work.

    Raises:
        OctavoError: a statistic is not finite, or smoothing changed what the layer computes: it is not what its
            architecture states.
    """

    def __init__(self, source: LayerwiseModel, plan: Plan) -> None:
        self._model, self._facts, self._plan = source.model, source.facts, plan

    def _check_rewritten(self, work: LayerWork, outputs: list[torch.Tensor]) -> None:
        if work.expected is not None and not relative_error([work.expected], outputs[:1]) < MOST_CHANGE:
            raise OctavoError(
                f"{work.name}: {named('anti_method')} changed what it computes: {type(work.module).__name__} is not "
                "built as its architecture states; leave the treatment out"
            )

    def _note_unreached(self, work: LayerWork, state: ConversionState, numbers: list[int]) -> None:
        names = [f"{self._facts.experts.name}.{number}" for number in numbers] if self._plan.uses_inputs else []
        is_quantized = [any(part.startswith(f"{name}.") for part in work.quantized) for name in names]
        state.unreached += [f"{work.name}.{name}" for name, matters in zip(names, is_quantized, strict=True) if matters]

    def __call__(self, work: LayerWork, state: ConversionState) -> None:
        attentions = [attention_modules(self._model)[work.index]]
        attention = attentions[0][1]
        with observing_attention(self._model, attentions):
            if state.for_scales is not None:
                state.for_scales.hidden = state.for_scales.through(work.module, work.index)
                found = attention_tensors(attention)
            needs_hessian = self._plan.needs_hessian
            work.inputs, outputs, unreached = observed(state.calibration, work, work.quantized, needs_hessian)
            if state.for_scales is None:
                found = attention_tensors(attention)
        self._check_rewritten(work, outputs)
        state.calibration.hidden = outputs
        self._note_unreached(work, state, unreached)
        found |= input_tensors({f"{work.name}.{part}": seen for part, seen in work.inputs.items()})
        Statistics(found, {}).check_finite()
        state.statistics |= {name: tensor for name, tensor in found.items() if name not in state.statistics}
