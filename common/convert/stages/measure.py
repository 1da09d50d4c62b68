"""Measure: what quantizing each linear and the attention of a layer alone costs, on held-back texts."""

import copy
from collections.abc import Iterator

from ...runtime.decoder import attention_modules
from ...runtime.schemes.kv_scheme import load_scheme
from ..measure.costs import Cost, relative_error
from ..output.model import OutputModel
from ..plan import Plan
from ..source.layerwise import LayerwiseModel
from ..state import ConversionState, LayerWork
from ..weights.input_range import outlier_score

PROBE_TOKENS = 512
"""Held-back tokens on which the cost of each linear and attention is measured."""


class Measure:
    """Adds costs to the state. Held-back texts are still before the layer."""

    def __init__(self, source: LayerwiseModel, plan: Plan, output: OutputModel) -> None:
        self._model, self._scheme, self._output = source.model, plan.scheme, output

    def __call__(self, work: LayerWork, state: ConversionState) -> None:
        state.costs += self._linear_costs(work, state)
        state.costs += self._attention_cost(work, state)

    def _linear_costs(self, work: LayerWork, state: ConversionState) -> Iterator[Cost]:
        """Of each linear, in the place of the float one for as long as the layer is run."""
        layer, probe = work.module, state.held_back
        expected = probe.through(layer, work.index, PROBE_TOKENS)
        for part, seen in work.inputs.items():
            parent, _, child = part.rpartition(".")
            plain = layer.get_submodule(part)
            coded = copy.copy(self._output.module(f"{work.name}.{part}"))
            coded.folds_bias = False
            setattr(layer.get_submodule(parent), child, coded)
            try:
                found = probe.through(layer, work.index, PROBE_TOKENS)
            finally:
                setattr(layer.get_submodule(parent), child, plain)
            yield Cost(f"{work.name}.{part}", outlier_score(seen), relative_error(expected, found))

    def _attention_cost(self, work: LayerWork, state: ConversionState) -> Iterator[Cost]:
        """Of the attention, between the quantized layer with a cache in float and with that of the scheme."""
        if not self._scheme.of_layer(work.index).is_quantized:
            return
        name = attention_modules(self._model)[work.index][0]
        expected, found = (
            self._output.through(work.coded, work.index, state.held_back, scheme, PROBE_TOKENS)
            for scheme in (load_scheme("float"), self._scheme)
        )
        yield Cost(name, None, relative_error(expected, found))
