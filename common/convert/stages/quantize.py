"""Quantize: the tensors of a layer of the output, and the layer that they load to."""

from dataclasses import replace

import torch
from torch import nn

from ...runtime.checkpoint.ascend import scale_tensors
from ...runtime.schemes.linear_scheme import LinearInputs
from ...runtime.static_scales import scales_of_layer
from ..output.model import OutputModel
from ..plan import Plan
from ..source.layerwise import LayerwiseModel
from ..state import ConversionState, LayerWork
from ..weights.coded import coded_parts
from ..weights.quantize import quantize_linear


def linear_parts(
    source: LayerwiseModel, plan: Plan, name: str, linear: nn.Linear, inputs: LinearInputs
) -> dict[str, torch.Tensor]:
    """The tensors of a linear that is to be quantized: the codes of the source where it has them, or new ones."""
    if name not in plan.coded:
        return quantize_linear(linear, inputs, plan.scheme_of(name), plan.engine_dtype)
    weight = source.coded_weight(name)
    return coded_parts(name, weight, plan.label_of(name), linear.bias, plan.engine_dtype)


class Quantize:
    """Makes codes and scales of the linears that are to be quantized, and static scales of the attention."""

    def __init__(self, source: LayerwiseModel, plan: Plan, output: OutputModel) -> None:
        self._source, self._plan, self._output = source, plan, output

    def __call__(self, work: LayerWork, state: ConversionState) -> None:
        plan = self._plan
        scales = scales_of_layer(plan.scheme, state.found(self._source.config), work.index)
        if plan.source_scales:
            kept = plan.source_scales[work.index]
            query = scales.query if kept.query is None else kept.query
            scales = replace(scales, key=kept.key, value=kept.value, query=query)
        linears = {
            part: linear_parts(
                self._source, plan, f"{work.name}.{part}", work.module.get_submodule(part), work.inputs[part]
            )
            for part in work.quantized
        }
        tensors = self._float_parts(work)
        for part, parts in linears.items():
            tensors |= {f"{part}.{end}": tensor for end, tensor in parts.items()}
        name = self._source.facts.attention.name
        tensors |= scale_tensors([(name, work.module.get_submodule(name))], plan.scheme, [scales], plan.is_of_vllm)
        tensors |= self._missing_biases(work, tensors)
        work.tensors = {
            f"{work.name}.{part}": self._output.as_stored(f"{work.name}.{part}", tensor)
            for part, tensor in tensors.items()
        }
        work.coded = self._output.loaded_layer(work.index, work.name, work.tensors)

    def _float_parts(self, work: LayerWork) -> dict[str, torch.Tensor]:
        """What stays as it is in the float layer."""
        replaced = {f"{part}.{end}" for part in work.quantized for end in ("weight", "bias")}
        return {part: tensor for part, tensor in work.module.state_dict().items() if part not in replaced}

    def _missing_biases(self, work: LayerWork, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Biases that there is room for and no shift, since not every shift pays."""
        return {
            part: torch.zeros(tensor.shape)
            for part, tensor in self._output.module(work.name).state_dict().items()
            if part not in tensors and part.endswith(".bias")
        }
