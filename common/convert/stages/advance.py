"""Advance: held-back texts go through the float layer and through the quantized one, which is forgotten then."""

from ..output.model import OutputModel, other_activations
from ..plan import Plan
from ..state import ConversionState, LayerWork


class Advance:
    """Takes the held-back texts of both models to the next layer."""

    def __init__(self, plan: Plan, output: OutputModel) -> None:
        self._scheme, self._output = plan.scheme, output

    def __call__(self, work: LayerWork, state: ConversionState) -> None:
        state.held_back.hidden = state.held_back.through(work.module, work.index)
        state.coded.hidden = self._output.through(work.coded, work.index, state.coded, self._scheme)
        if state.coded_otherwise is not None:
            with other_activations(work.coded):
                otherwise = self._output.through(work.coded, work.index, state.coded_otherwise, self._scheme)
            state.coded_otherwise.hidden = otherwise
        work.coded.to("meta")
