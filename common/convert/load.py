"""A checkpoint of AWQ, GPTQ, compressed-tensors or fp8 as a model of the zoo, without a converted directory.

Its linears hold the very codes of the checkpoint, as after a conversion, which a bundle cannot do: what reads such
checkpoints does not travel with one.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from ..architecture import Architecture
from ..errors import OctavoError
from ..runtime.checkpoint.ascend import scale_tensors
from ..runtime.checkpoint.loading import check_settings, check_stored_sizes
from ..runtime.checkpoint.values import check_values
from ..runtime.decoder import attention_modules
from ..runtime.model import check_transformers
from ..runtime.schemes.kv_scheme import Scheme
from ..runtime.static_scales import LayerScales
from .choices import choose_codes, chosen_scheme
from .job import source_dtype
from .output.model import OutputModel
from .output.shards import SAFETENSORS_DTYPES
from .plan import Plan, scheme_of_codes
from .request import ConvertRequest, check_activations
from .source.checkpoint import check_device, find_source, layerwise_source, read_source_headers
from .source.config import GENERATION_FILE, chosen_architecture, read_source_config
from .source.layerwise import LayerwiseModel, assign_state
from .source.quantized.cache_scales import lacks_query
from .spelling import named, naming_fields
from .targets import engine_dtype
from .weights.coded import coded_parts


def load_quantized(
    model: str | Path,
    scheme: Scheme | str | Path = "float",
    *,
    kv_scales: str = "data",
    architecture: Architecture | str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    cpu_activations: str = "int8",
) -> nn.Module:
    """The model of a quantized checkpoint, as `from_pretrained` loads it from the directory that a conversion writes.

    Example:
        model = load_quantized("Qwen/Qwen2.5-0.5B-Instruct-AWQ", "int8-token")

    Args:
        model: directory of the checkpoint (safetensors), or a hub id; its linears are in the codes of AWQ, GPTQ,
            compressed-tensors or fp8.
        scheme: of KV cache and attention, as in `ConvertRequest`, with no scales to calibrate.
        kv_scales: "source" keeps the static scales of K and V that the checkpoint has, for a scheme that takes such.
        architecture: folder under `models/`, or what stands in it; None: found by config.json's model_type.
        dtype: of what is in float; None: that of the checkpoint.
        device: "cpu", "cuda" or "npu".
        cpu_activations: what weight-only linears multiply with on the CPU, as in `ConvertRequest`.

    Raises:
        OctavoError: no linear is in codes, or no kind of linear here holds them; the scheme needs a calibration; what a
            conversion refuses, too.
    """
    with naming_fields():
        request = ConvertRequest(model, ".", scheme=scheme, kv_scales=kv_scales, cpu_activations=cpu_activations)
        chosen = chosen_scheme(request)
        check_device(device)
        directory = find_source(request.model)
        found = chosen_architecture(directory, architecture)
        config, headers = read_source_config(directory, found), read_source_headers(directory)
        check_settings(f"{directory}/config.json", config)
        check_stored_sizes(f"{directory}/config.json", config, headers)
        check_transformers(found.model_class)
        source = layerwise_source(directory, "cpu", found)
        stored = source_dtype(headers)
        plan = _plan(source, request, chosen, stored, engine_dtype(config, stored))
        loaded = _filled(OutputModel(found, source, plan), source, plan, dtype or SAFETENSORS_DTYPES[stored])
        _finish(loaded, directory)
        return loaded.to(device)


def _plan(source: LayerwiseModel, request: ConvertRequest, scheme: Scheme, stored: str, engine: torch.dtype) -> Plan:
    """What a conversion would make of the checkpoint."""
    coded = choose_codes(request, source.coded_linears(), source.facts.head)
    if not coded:
        raise OctavoError(f"{named('model')} {request.model}: no linear is in codes; load it by from_pretrained")
    linear = scheme_of_codes(coded)
    check_activations(request, linear, named("cpu_activations"))
    scales = _static_scales(source, scheme, request)
    return Plan(
        scheme, linear, tuple(coded), "", stored, request.cpu_activations, False, engine,
        coded=coded, source_scales=scales,
    )  # fmt: skip


def _static_scales(source: LayerwiseModel, scheme: Scheme, request: ConvertRequest) -> tuple[LayerScales, ...]:
    """The static scales of a scheme; none of one without.

    Raises:
        OctavoError: they are to be calibrated.
    """
    if not scheme.is_static:
        return ()
    found = source.static_scales(scheme) if request.kv_scales == "source" else ()
    if not found or lacks_query(scheme, found):
        lacking = "q, and the source keeps no scale of it" if found else "K and V by scales of calibration"
        raise OctavoError(f"{named('scheme')} {scheme.name}: quantizes {lacking}; convert the checkpoint")
    return found


def _filled(output: OutputModel, source: LayerwiseModel, plan: Plan, dtype: torch.dtype) -> nn.Module:
    """The model with all of its tensors."""
    model, of_model = output.module(""), {}
    for name in plan.linears:
        bias = source.tensor(f"{name}.bias") if model.get_submodule(name).bias is not None else None
        parts = coded_parts(name, source.coded_weight(name), plan.label_of(name), bias, plan.engine_dtype)
        of_model |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    scales = scale_tensors(attention_modules(model), plan.scheme, plan.source_scales) if plan.source_scales else {}
    state = of_model | scales
    for name in output.planned():
        if name not in state:
            state[name] = source.tensor(name).to(dtype)
        elif name.endswith(".bias"):
            state[name] = state[name].to(dtype)
    tied = {name: state[origin] for name, origin in source.tied.items() if name in output.tied()}
    assign_state(model, state | tied)
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval()


def _finish(model: Any, directory: Path) -> None:
    """Check the values of a model, and give it what stands beside them."""
    check_values(str(directory), model, model.scheme)
    model.config._name_or_path = model.name_or_path = str(directory)
    if (directory / GENERATION_FILE).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
