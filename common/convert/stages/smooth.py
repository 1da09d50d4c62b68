"""Smooth: outliers of a layer's inputs go into its weights, and the layer computes what it did."""

import torch
from torch import nn

from ...runtime.schemes.linear_scheme import LinearInputs
from ..outliers.search import OutputError
from ..outliers.smooth import smooth_layer
from ..output.shards import SAFETENSORS_DTYPES
from ..plan import Plan
from ..source.layerwise import LayerwiseModel
from ..state import ConversionState, LayerWork
from ..weights.quantize import output_error
from .calibrate import observed

SEARCH_ROWS = 512
"""Inputs of a linear layer that searches for the best smoothing are done on."""


def error_of(plan: Plan) -> OutputError:
    """What a search for the best smoothing minimizes: the squared error of a linear that is quantized as planned."""

    def error(weight: torch.Tensor, inputs: LinearInputs, exact: torch.Tensor) -> torch.Tensor:
        return output_error(weight, inputs, plan.linear, exact, plan.cpu_activations == "int8")

    return error


class Smooth:
    """Rewrites the float layer, if the plan has a method for it and the layer a linear to quantize."""

    def __init__(self, source: LayerwiseModel, plan: Plan) -> None:
        self._source, self._plan = source, plan

    def __call__(self, work: LayerWork, state: ConversionState) -> None:
        method = self._plan.anti_method
        if not method or not work.quantized:
            return
        every = [part for part, module in work.module.named_modules() if isinstance(module, nn.Linear)]
        if work.experts is not None:
            every.append(self._source.facts.experts.router)
        found, outputs, _ = observed(state.calibration, work, every)
        work.expected = outputs[0]
        smaller = {id(inputs): inputs.thinned(SEARCH_ROWS) for inputs in found.values()}
        found = {part: smaller[id(inputs)] for part, inputs in found.items()}

        def stored(name: str) -> torch.dtype:
            return SAFETENSORS_DTYPES[self._source.source_dtype(f"{work.name}.{name}")]

        error, experts = error_of(self._plan), len(work.experts or ())
        smooth_layer(work.module, found, method, work.quantized, error, self._source.facts, stored, experts)
