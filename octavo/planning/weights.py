"""Bytes of weights by a config alone: what a conversion would write, planned as it plans it, over no files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..common.architecture import Architecture
from ..common.convert.choices import check_treatment, choose_linears, chosen_scheme
from ..common.convert.output.model import OutputModel
from ..common.convert.output.shards import SAFETENSORS_DTYPES, Placed, header_of
from ..common.convert.plan import Plan
from ..common.convert.request import ConvertRequest
from ..common.convert.source.checkpoint import FLOAT_DTYPES
from ..common.convert.source.config import LOAD_ERRORS
from ..common.convert.source.layerwise import LayerwiseModel
from ..common.convert.targets import engine_dtype
from ..common.errors import OctavoError, first_line
from ..common.runtime.checkpoint.files import TensorHeader
from ..common.runtime.decoder import list_experts, state_decoder


@dataclass(frozen=True)
class Weights:
    """The tensors of a model on the disk, and by that in memory.

    Attributes:
        headers: dtype and shape by name.
        embedding: name of the embedding's weight, of which a pass reads some rows; "" where nobody states it.
        is_tied: whether the last linear is the embedding, of which it reads all.
        is_quantized: whether linears or embedding are in codes.
    """

    headers: Mapping[str, TensorHeader] = field(repr=False)
    embedding: str
    is_tied: bool
    is_quantized: bool

    @property
    def nbytes(self) -> int:
        """Of all tensors; a file has some KB of header more."""
        return sum(map(header_bytes, self.headers.values()))

    @property
    def parameters(self) -> int:
        """How many elements there are, packed ones as they are packed."""
        return sum(math.prod(header.shape) for header in self.headers.values())


def header_bytes(header: TensorHeader) -> int:
    """Bytes of a tensor."""
    return math.prod(header.shape) * SAFETENSORS_DTYPES[header.dtype].itemsize


class NoFiles:
    """Stands in for the files of a checkpoint that nobody reads: what each tensor would be, and no byte of it."""

    def __init__(self, headers: Mapping[str, TensorHeader]) -> None:
        self.placed = {name: Placed(Path(), 0, header) for name, header in headers.items()}

    def cut(self, name: str, parts: list[str]) -> None:
        """Nothing is merged."""


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of a checkpoint as its config states it; float32 where it does not, as transformers takes it."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The float model on the meta device.

    Raises:
        OctavoError: transformers makes none of such a config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except LOAD_ERRORS as error:
        raise OctavoError(f"config.json: transformers makes no model of it ({first_line(error)}); mend it") from None


def _own_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, TensorHeader]:
    """What a checkpoint of a model holds: each tensor once, all in one dtype."""
    tied = getattr(model, "all_tied_weights_keys", {}) if model.config.tie_word_embeddings else {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: header_of(torch.empty(tensor.shape, dtype=dtype, device="meta")) for name, tensor in state.items()}


def float_weights(config: PreTrainedConfig, dtype: torch.dtype, architecture: Architecture | None = None) -> Weights:
    """The weights as they are, of any model that transformers makes.

    Args:
        architecture: what states the anatomy, if anything does.

    Raises:
        OctavoError: it makes none of this config.
    """
    model = _empty_model(config, dtype)
    embedding = f"{model.base_model_prefix}.{architecture.decoder.embedding}.weight" if architecture else ""
    return Weights(_own_tensors(model, dtype), embedding, bool(config.tie_word_embeddings), False)


def _source(config: PreTrainedConfig, dtype: torch.dtype, architecture: Architecture, where: str) -> LayerwiseModel:
    """The float model as a conversion knows it, without its files."""
    model = _empty_model(config, dtype)
    state_decoder(model, architecture.decoder)
    with torch.device("meta"):
        list_experts(model)
    return LayerwiseModel(Path(where), config, NoFiles(_own_tensors(model, dtype)), "cpu", architecture)


def converted_weights(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    architecture: Architecture,
    request: ConvertRequest,
    settings: Mapping[str, Any],
) -> Weights:
    """The weights of what a conversion would write of a checkpoint of this config, scales of the cache included.

    Args:
        config: of the float model.
        dtype: of all tensors of its checkpoint.
        architecture: of the model.
        request: what is asked for; its paths are not looked at.
        settings: the config.json, by which `deq_scale` of static int8 has its dtype.

    Raises:
        OctavoError: the request does not go with the model.
    """
    scheme = chosen_scheme(request)
    check_treatment(request, scheme)
    source = _source(config, dtype, architecture, request.model)
    names = {torch_dtype: name for name, torch_dtype in FLOAT_DTYPES.items()}
    stated = architecture.floats(config, dtype)
    plan = Plan(
        scheme.counted(source.config.num_hidden_layers),
        request.linear,
        tuple(choose_linears(source.model, request, stated, source.facts.head)),
        request.anti_method,
        names[dtype],
        request.cpu_activations,
        request.embeddings == "int8",
        engine_dtype(settings, names[dtype]),
    )
    headers = OutputModel(architecture, source, plan).planned()
    is_tied = bool(source.tied) and source.facts.head not in plan.linears
    return Weights(headers, f"{source.embedding_name}.weight", is_tied, bool(plan.linears or plan.quantizes_embeddings))
