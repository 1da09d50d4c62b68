"""The head: the last linear and the norm before it, smoothed and quantized as the layers are.

S tokens, E hidden size, V vocabulary.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ...runtime.schemes.linear_scheme import EMBEDDING_SCHEME, LinearInputs
from ..calibration.observe import InputObserver, input_tensors
from ..outliers.search import Producer
from ..outliers.smooth import smooth_head
from ..output.model import OutputModel
from ..output.shards import SAFETENSORS_DTYPES
from ..plan import Plan
from ..source.layerwise import LayerwiseModel, assign_state
from ..state import ConversionState
from ..weights.embedding import embedding_parts
from ..weights.quantize import weight_parts
from .quantize import linear_parts
from .smooth import SEARCH_ROWS, error_of


@dataclass(frozen=True)
class CodedHead:
    """The end of the quantized model.

    Attributes:
        tensors: of the output that were made, named for the file.
        norm: the last norm.
        linear: the last linear; None where it is the float model's.
    """

    tensors: dict[str, torch.Tensor]
    norm: nn.Module
    linear: nn.Module | None


class QuantizeHead:
    """Makes the end of the quantized model of that of the float one."""

    def __init__(self, source: LayerwiseModel, plan: Plan, output: OutputModel) -> None:
        self._source, self._plan, self._output = source, plan, output

    def __call__(self, norm: nn.Module, weight: torch.Tensor, state: ConversionState) -> CodedHead:
        """Quantize `weight` `[V, E]`, if that is planned; calibration texts are behind the last layer."""
        if self._plan.quantizes_embeddings:
            return self._in_int8(norm, weight)
        if self._source.facts.head not in self._plan.linears:
            return CodedHead({}, norm, None)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        assign_state(linear, {"weight": weight.to(self._source.device, torch.float32, copy=True)})
        coded_norm = self._smoothed(norm, linear, state)
        inputs = _inputs_behind(coded_norm, state.calibration.hidden, self._plan.needs_hessian)
        parts = linear_parts(self._source, self._plan, self._source.facts.head, linear, inputs)
        state.statistics |= input_tensors({self._source.facts.head: inputs})
        return self._coded(coded_norm, parts)

    def _in_int8(self, norm: nn.Module, weight: torch.Tensor) -> CodedHead:
        """The last linear in int8, which has tensors of its own unless it is tied to the embedding."""
        output, head = self._output, self._source.facts.head
        is_own = bool(self._plan.own_head(self._source))
        parts = weight_parts(weight, None, EMBEDDING_SCHEME) if is_own else embedding_parts(weight)
        holder = output.module(head if is_own else self._source.embedding_name)
        assign_state(holder, {part: tensor.to(self._source.device) for part, tensor in parts.items()})
        tensors = {f"{head}.{part}": tensor for part, tensor in parts.items()} if is_own else {}
        return CodedHead(tensors, norm, output.module(head))

    def _smoothed(self, norm: nn.Module, linear: nn.Linear, state: ConversionState) -> nn.Module:
        """A copy of the norm, rewritten together with the linear."""
        found = copy.deepcopy(norm)
        if self._plan.anti_method:
            seen = _inputs_behind(norm, state.calibration.hidden).thinned(SEARCH_ROWS)
            stored = SAFETENSORS_DTYPES[self._source.source_dtype(self._source.norm_name)]
            producer = Producer(found, offset=self._source.facts.norm_offset, stored=stored)
            smooth_head(producer, linear, seen, self._plan.anti_method, error_of(self._plan))
        return found

    def _coded(self, norm: nn.Module, parts: dict[str, torch.Tensor]) -> CodedHead:
        """The norm and linear that a load of the output gives, and their tensors."""
        output, head, norm_name = self._output, self._source.facts.head, self._source.norm_name
        tensors = {f"{head}.{part}": output.as_stored(f"{head}.{part}", tensor) for part, tensor in parts.items()}
        tensors |= {norm_name: output.as_stored(norm_name, norm.weight)}
        assign_state(norm, {"weight": tensors[norm_name].to(self._source.device).float()})
        linear = output.module(head)
        assign_state(linear, {part: output.computed(f"{head}.{part}", tensor) for part, tensor in parts.items()})
        return CodedHead(tensors, norm, linear)


def _inputs_behind(norm: nn.Module, hidden: Iterable[torch.Tensor], keeps_hessian: bool = False) -> LinearInputs:
    """What the inputs of the last linear are like behind a norm of states `[1, S, E]`."""
    observer = InputObserver(keeps_hessian)
    for state in hidden:
        observer(norm(state))
    return observer.inputs()
