"""Ascend's dialect: `quant_model_description.json` beside `quant_model_weight_*.safetensors`, as msmodelslim writes it.

It is also the form in which Octavo's own models hold their tensors. Zero points are stored in units of codes with
`x = (code - offset) * scale`, which is this project's definition, so nothing is converted here.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import OctavoError
from ..linear import QUANTIZED_LINEARS, W8A8Linear
from ..scheme import Scheme, load_scheme
from ..statistics import LayerScales, Scales

DESCRIPTION_FILE = "quant_model_description.json"
WEIGHT_FILE = "quant_model_weight_{kind}.safetensors"
NOT_TENSORS = (
    "model_quant_type",
    "version",
    "group_size",
    "kv_cache_type",
    "kv_quant_type",
    "fa_quant_type",
    "reduce_quant_type",
    "metadata",
    "optional",
)
SCALAR_DTYPES = {"I64": torch.int64, "F32": torch.float32}
FLOATS = ("F32", "F16", "BF16")
WEIGHT_LABELS = tuple(QUANTIZED_LINEARS)
STORED_AS = {
    "weight": (WEIGHT_LABELS, ("I8",)),
    "bias": (("FLOAT",), FLOATS),
    "weight_scale": (WEIGHT_LABELS, FLOATS),
    "weight_offset": (WEIGHT_LABELS, FLOATS),
    "input_scale": (("W8A8",), FLOATS),
    "input_offset": (("W8A8",), FLOATS),
    "quant_bias": (("W8A8",), ("I32",)),
    "deq_scale": (("W8A8",), ("I64", "F32")),
    "kv_cache_scale": (("C8", "W8A8"), FLOATS),
    "kv_cache_offset": (("C8", "W8A8"), FLOATS),
    "scale": (("FAQuant",), FLOATS),
    "offset": (("FAQuant",), ("I8", *FLOATS)),
}
"""Labels and dtypes of each part of a quantized module; the labels of the KV cache were W8A8 before they were C8."""
PARTS = ("q", "k", "v")
FILE_ORDER = (
    "scale",
    "offset",
    "kv_cache_scale",
    "kv_cache_offset",
    "weight",
    "bias",
    "weight_scale",
    "weight_offset",
    "input_scale",
    "input_offset",
    "quant_bias",
    "deq_scale",
)


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of a tensor without reading it: dtype as spelled there ("I8", "F32"), and shape."""

    dtype: str
    shape: tuple[int, ...]


class StaticScale(nn.Module):
    """`fa_q`, `fa_k` and `fa_v` of an attention module: one scale and one offset per head, `[heads, 1]`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty((heads, 1), dtype=torch.float32))
        self.register_buffer("offset", torch.empty((heads, 1), dtype=torch.int8))


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the attentions of a decoder, in the order of its layers."""
    found = [(n, m) for n, m in model.named_modules() if hasattr(m, "k_proj") and hasattr(m, "layer_idx")]
    return sorted(found, key=lambda item: item[1].layer_idx)


def is_c8(scheme: Scheme) -> bool:
    """Whether a layer's scheme is stored as `kv_cache_scale` and `kv_cache_offset`: static per channel."""
    return all(codec is not None and codec.granularity == "channel" for codec in (scheme.key, scheme.value))


def is_fa(scheme: Scheme) -> bool:
    """Whether a layer's scheme is stored as `fa_q`, `fa_k` and `fa_v`: static per head."""
    return all(codec is not None and codec.granularity == "head" for codec in (scheme.query, scheme.key, scheme.value))


def attach_buffers(model: nn.Module, scheme: Scheme, quantized: dict[str, str], deq_scale_dtype: torch.dtype) -> None:
    """Give a float model the modules and buffers that hold a quantized checkpoint, empty.

    Args:
        model: a decoder as transformers builds it, changed in place.
        scheme: what attention and cache store; its static scales get buffers.
        quantized: label by name of the linear layers that are quantized.
        deq_scale_dtype: dtype of `deq_scale` on disk.
    """
    for name, label in quantized.items():
        parent, _, child = name.rpartition(".")
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise OctavoError(
                f"{DESCRIPTION_FILE} names {name}, which config.json gives the model no room for"
            ) from None
        if not isinstance(linear, nn.Linear):
            raise OctavoError(f"{DESCRIPTION_FILE}: {name} is labelled {label} and is no linear layer; convert again")
        options = (deq_scale_dtype,) if label == W8A8Linear.LABEL else ()
        layer = QUANTIZED_LINEARS[label](linear.in_features, linear.out_features, linear.bias is not None, *options)
        setattr(model.get_submodule(parent), child, layer)
    for _, attention in attention_modules(model):
        layer_scheme = scheme.of_layer(attention.layer_idx)
        groups = attention.k_proj.out_features // attention.head_dim
        if is_c8(layer_scheme):
            for projection in (attention.k_proj, attention.v_proj):
                for part in ("kv_cache_scale", "kv_cache_offset"):
                    projection.register_buffer(part, torch.empty(projection.out_features, dtype=torch.float32))
        elif is_fa(layer_scheme):
            attention.fa_q = StaticScale(attention.q_proj.out_features // attention.head_dim)
            attention.fa_k, attention.fa_v = StaticScale(groups), StaticScale(groups)


def _scale_and_zero(
    name: str, scale: torch.Tensor, offset: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scale and offset as `[heads, 1, D or 1]` float32; no zero where every offset is 0."""
    if not (torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(offset.float()).all()):
        raise OctavoError(f"checkpoint: {name} holds a scale that is not a positive number; convert the model again")
    zero = offset.float().view(heads, 1, -1) if bool((offset != 0).any()) else None
    return scale.float().view(heads, 1, -1), zero


def read_scales(model: nn.Module, scheme: Scheme) -> Scales:
    """The static scales out of the buffers that `attach_buffers` made and a checkpoint filled."""
    result = []
    for name, attention in attention_modules(model):
        layer_scheme = scheme.of_layer(attention.layer_idx)
        groups = attention.k_proj.out_features // attention.head_dim
        if is_c8(layer_scheme):
            k, v = attention.k_proj, attention.v_proj
            key = _scale_and_zero(f"{name}.k_proj", k.kv_cache_scale, k.kv_cache_offset, groups)
            value = _scale_and_zero(f"{name}.v_proj", v.kv_cache_scale, v.kv_cache_offset, groups)
            result.append(LayerScales(key, value))
        elif is_fa(layer_scheme):
            stored = {part: getattr(attention, f"fa_{part}") for part in PARTS}
            q, k, v = (
                _scale_and_zero(f"{name}.fa_{part}", m.scale, m.offset, m.scale.shape[0]) for part, m in stored.items()
            )
            if q[1] is not None:
                raise OctavoError(f"checkpoint: {name}.fa_q has an offset, which int8 attention does not serve")
            result.append(LayerScales(k, v, q[0]))
        else:
            result.append(LayerScales())
    return result


def scale_tensors(model: nn.Module, scheme: Scheme, scales: Scales) -> dict[str, torch.Tensor]:
    """The inverse of `read_scales`: static scales as tensors named for the file."""
    tensors = {}
    for (name, attention), layer in zip(attention_modules(model), scales, strict=True):
        layer_scheme = scheme.of_layer(attention.layer_idx)
        if is_c8(layer_scheme):
            for part, (scale, _) in (("k_proj", layer.key), ("v_proj", layer.value)):
                tensors[f"{name}.{part}.kv_cache_scale"] = scale.flatten()
                tensors[f"{name}.{part}.kv_cache_offset"] = torch.zeros_like(scale.flatten())
        elif is_fa(layer_scheme):
            for part, scale in zip(PARTS, (layer.query, layer.key[0], layer.value[0]), strict=True):
                tensors[f"{name}.fa_{part}.scale"] = scale.flatten(1)
                tensors[f"{name}.fa_{part}.offset"] = torch.zeros(scale.shape[:2], dtype=torch.int8)
    return tensors


def in_file_order(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in the order in which msmodelslim writes them: module by module, and within one as in `FILE_ORDER`."""
    positions = {name: position for position, (name, _) in enumerate(model.named_modules())}

    def key(name: str) -> tuple[int, int]:
        module, _, part = name.rpartition(".")
        while module not in positions:
            module = module.rpartition(".")[0]
        return positions[module], FILE_ORDER.index(part)

    return {name: tensors[name] for name in sorted(tensors, key=key)}


def quantized_linears(description: dict[str, Any]) -> dict[str, str]:
    """Label by name of the linear layers that a description says are quantized.

    Raises:
        OctavoError: a label that Octavo does not load, with its tensor.
    """
    labels = {}
    for tensor, label in description.items():
        if tensor in NOT_TENSORS or not tensor.endswith(".weight") or label == "FLOAT":
            continue
        if label not in WEIGHT_LABELS:
            known = ", ".join(WEIGHT_LABELS)
            raise OctavoError(f"{DESCRIPTION_FILE}: {tensor} is labelled {label!r}; Octavo loads {known} and FLOAT")
        labels[tensor.removesuffix(".weight")] = label
    return labels


def described_scheme(description: dict[str, Any], layers: int) -> Scheme | None:
    """The scheme that a description stands for, float layers included; None if it quantizes no attention.

    Raises:
        OctavoError: it quantizes attention in a way that Octavo does not read.
    """
    for key, known in (("fa_quant_type", "FAQuant"), ("kv_cache_type", "C8"), ("kv_quant_type", "C8")):
        if description.get(key) not in (None, "", known):
            raise OctavoError(f"{DESCRIPTION_FILE}: {key} is {description[key]!r}; Octavo reads {known!r}")
    if description.get("fa_quant_type"):
        preset, present = "ascend-fa", "model.layers.{}.self_attn.fa_k.scale"
    elif description.get("kv_cache_type") or description.get("kv_quant_type"):
        preset, present = "ascend-c8", "model.layers.{}.self_attn.k_proj.kv_cache_scale"
    else:
        return None
    absent = [index for index in range(layers) if present.format(index) not in description]
    return Scheme.from_dict({**load_scheme(preset).to_dict(), "float_layers": absent})


def weight_file_names(description: dict[str, Any]) -> tuple[str, str]:
    """Names of the weight file and of the index that replaces it when the weights are in several files."""
    kind = str(description.get("model_quant_type", "")).lower()
    if not re.fullmatch(r"[a-z0-9_]+", kind):
        raise OctavoError(f"{DESCRIPTION_FILE}: model_quant_type {kind!r} is none; copy it again or convert again")
    single = WEIGHT_FILE.format(kind=kind)
    return single, f"{single}.index.json"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        OctavoError: unreadable, or no object.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OctavoError(f"{file}: cannot be read ({error}); copy it again or convert the model again") from None
    if not isinstance(data, dict):
        raise OctavoError(f"{file}: is no JSON object; copy it again or convert the model again")
    return data


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Dtype and shape of every tensor in some safetensors files, without reading the tensors.

    Raises:
        OctavoError: a file is missing, truncated or no safetensors file.
    """
    headers = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    part = opened.get_slice(name)
                    headers[name] = TensorHeader(part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise OctavoError(f"{file}: is truncated or damaged ({error}); copy it again or convert again") from None
    return headers


def check_description(description: dict[str, Any], headers: dict[str, TensorHeader], tied: Iterable[str]) -> None:
    """Raise an `OctavoError` that names the first tensor on which description and weight files disagree.

    Args:
        tied: names that may be described without being stored.
    """
    described = {
        name: label
        for name, label in description.items()
        if name not in NOT_TENSORS and not (name in tied and name not in headers)
    }
    where = f"{DESCRIPTION_FILE} and the weights disagree"
    for name in sorted(described.keys() - headers.keys()):
        raise OctavoError(f"{where}: {name} is described and not stored; convert the model again")
    for name in sorted(headers.keys() - described.keys()):
        raise OctavoError(f"{where}: {name} is stored and not described; convert the model again")
    for name, label in described.items():
        module, _, part = name.rpartition(".")
        of_module = described.get(f"{module}.weight")
        kind = part if of_module in WEIGHT_LABELS or part not in ("weight", "bias") else "float"
        labels, dtypes = STORED_AS.get(kind, (("FLOAT",), FLOATS))
        if label not in labels or (labels == WEIGHT_LABELS and label != of_module) or headers[name].dtype not in dtypes:
            raise OctavoError(f"{where}: {name} is labelled {label} and stored as {headers[name].dtype}; convert again")
    for linear, label in quantized_linears(described).items():
        for part in QUANTIZED_LINEARS[label].PARTS:
            if f"{linear}.{part}" not in headers:
                raise OctavoError(f"{where}: {linear}.{part} is missing; convert the model again")
    kinds = {header.dtype for name, header in headers.items() if name.endswith(".deq_scale")}
    if len(kinds) > 1:
        raise OctavoError(f"{where}: deq_scale is stored as {' and '.join(sorted(kinds))}; convert the model again")


def build_description(
    tensors: Iterable[str], tied: Iterable[str], linears: dict[str, str], scheme: Scheme
) -> dict[str, Any]:
    """The description of a checkpoint: what kind it is, and a label for each tensor, as msmodelslim writes them.

    Args:
        tensors: names of what is stored.
        tied: names that share a stored tensor and are labelled too, since readers look for `lm_head.weight` here.
        linears: label by name of the quantized linears, which are all of one kind.
        scheme: of attention and cache.
    """
    kind = next(iter(linears.values()), "FLOAT")
    description: dict[str, Any] = {"version": "1.0.0", "model_quant_type": kind}
    if is_c8(scheme):
        description |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    elif is_fa(scheme):
        description["fa_quant_type"] = "FAQuant"
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part.startswith("kv_cache_"):
            description[name] = "C8"
        elif module.rpartition(".")[2].startswith("fa_"):
            description[name] = "FAQuant"
        else:
            description[name] = linears.get(module, "FLOAT") if part != "bias" else "FLOAT"
    return description | dict.fromkeys(tied, "FLOAT")
