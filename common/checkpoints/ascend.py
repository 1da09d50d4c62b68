"""Ascend's dialect: `quant_model_description.json` beside `quant_model_weight_*.safetensors`, as msmodelslim writes it.

It is also the form in which Octavo's own models hold their tensors. Zero points are stored in units of codes with
`x = (code - offset) * scale`, which is this project's definition, so nothing is converted here.
"""

import json
import re
from collections.abc import Callable, Iterable
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
    "octavo_scheme",
    "reduce_quant_type",
    "metadata",
    "optional",
)
OWN_LABEL = "OCTAVO"
"""Label of static scales and codebooks of schemes that Ascend's format has no names for."""
CACHE_PARTS = ("key_scale", "key_zero", "key_levels", "value_scale", "value_zero", "value_levels", "query_scale")
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
    **dict.fromkeys(CACHE_PARTS, ((OWN_LABEL,), ("F32",))),
}
"""Labels and dtypes of each part of a quantized module; the labels of the KV cache were W8A8 before they were C8."""
FA_PARTS = ("q", "k", "v")
FILE_ORDER = (
    *CACHE_PARTS,
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


class CacheConstants(nn.Module):
    """`octavo_cache` of an attention module: static scales, zeros and codebooks of a layer, float32."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for part, shape in shapes.items():
            self.register_buffer(part, torch.empty(shape, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "CacheConstants":
        """They follow the model to another device, and stay what they are when it changes its dtype."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for part, tensor in before.items():
            if getattr(self, part).dtype != tensor.dtype:
                setattr(self, part, tensor.to(getattr(self, part).device))
        return self


def _is_ascend(scheme: Scheme, preset: str) -> bool:
    """Whether a layer is stored as Ascend's format stores the preset: nothing is left out, rotated or kept in float."""
    other = load_scheme(preset)
    same = (scheme.key, scheme.value, scheme.query) == (other.key, other.value, other.query)
    changes = scheme.fold_bias or scheme.is_segmented or scheme.rotate_key or scheme.rotate_value or scheme.smooth_key
    return same and not changes and not scheme.layers


def is_c8(scheme: Scheme) -> bool:
    """Whether a layer's scheme is stored as `kv_cache_scale` and `kv_cache_offset`: static per channel."""
    return _is_ascend(scheme, "ascend-c8")


def is_fa(scheme: Scheme) -> bool:
    """Whether a layer's scheme is stored as `fa_q`, `fa_k` and `fa_v`: static per head."""
    return _is_ascend(scheme, "ascend-fa")


def constant_shapes(scheme: Scheme, heads: int, groups: int, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's `CacheConstants`: H query heads, G KV heads, D head_dim; empty where there are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, codec, count in (
        ("key", scheme.key, groups),
        ("value", scheme.value, groups),
        ("query", scheme.query, heads),
    ):
        if codec is None or not codec.is_calibrated:
            continue
        if not codec.dynamic:
            shape = {"tensor": (1, 1, 1), "head": (count, 1, 1), "channel": (count, 1, width)}[codec.granularity]
            shapes[f"{part}_scale"] = shape
            if codec.has_zero:
                shapes[f"{part}_zero"] = shape
        if codec.levels == "calibrated":
            shapes[f"{part}_levels"] = (2**codec.bits,)
    return shapes


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
        else:
            heads = attention.q_proj.out_features // attention.head_dim
            if shapes := constant_shapes(layer_scheme, heads, groups, attention.head_dim):
                attention.octavo_cache = CacheConstants(shapes)


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
            stored = {part: getattr(attention, f"fa_{part}") for part in FA_PARTS}
            q, k, v = (
                _scale_and_zero(f"{name}.fa_{part}", m.scale, m.offset, m.scale.shape[0]) for part, m in stored.items()
            )
            if q[1] is not None:
                raise OctavoError(f"checkpoint: {name}.fa_q has an offset, which int8 attention does not serve")
            result.append(LayerScales(k, v, q[0]))
        else:
            result.append(_read_constants(name, attention, layer_scheme))
    return result


def _read_constants(name: str, attention: nn.Module, scheme: Scheme) -> LayerScales:
    """The scales of a layer out of its `CacheConstants`, if it has any."""
    if not hasattr(attention, "octavo_cache"):
        return LayerScales()
    found = dict(attention.octavo_cache.named_buffers())
    for part, tensor in found.items():
        if not torch.isfinite(tensor).all() or (part.endswith("scale") and not (tensor > 0).all()):
            raise OctavoError(f"checkpoint: {name}.octavo_cache.{part} is no positive number; convert the model again")
        if part.endswith("levels") and not (tensor.diff() >= 0).all():
            raise OctavoError(f"checkpoint: {name}.octavo_cache.{part} do not ascend; convert the model again")
    has_bias = any(linear.bias is not None for linear in (attention.k_proj, attention.v_proj))
    key, value = (
        (found[f"{part}_scale"], found.get(f"{part}_zero")) if f"{part}_scale" in found else None
        for part in ("key", "value")
    )
    return LayerScales(
        key, value, found.get("query_scale"), found.get("key_levels"), found.get("value_levels"),
        scheme.fold_bias and has_bias,
    )  # fmt: skip


def _constant_tensors(name: str, layer: LayerScales) -> dict[str, torch.Tensor]:
    """The inverse of `_read_constants`."""
    pairs = {"key": layer.key or (None, None), "value": layer.value or (None, None), "query": (layer.query, None)}
    parts = {
        f"{part}_{kind}": tensor
        for part, pair in pairs.items()
        for kind, tensor in zip(("scale", "zero"), pair, strict=True)
    }
    parts |= {"key_levels": layer.key_levels, "value_levels": layer.value_levels}
    return {f"{name}.octavo_cache.{part}": tensor for part, tensor in parts.items() if tensor is not None}


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
            for part, scale in zip(FA_PARTS, (layer.query, layer.key[0], layer.value[0]), strict=True):
                tensors[f"{name}.fa_{part}.scale"] = scale.flatten(1)
                tensors[f"{name}.fa_{part}.offset"] = torch.zeros(scale.shape[:2], dtype=torch.int8)
        else:
            tensors |= _constant_tensors(name, layer)
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
    if description.get("octavo_scheme"):
        return Scheme.from_dict(description["octavo_scheme"])
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
            # torch maps files copy-on-write, which fails for one larger than memory
            with safe_open(file, framework="numpy") as opened:
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
    elif scheme.is_quantized:
        description["octavo_scheme"] = scheme.to_dict()
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part.startswith("kv_cache_"):
            description[name] = "C8"
        elif module.endswith(".octavo_cache"):
            description[name] = OWN_LABEL
        elif module.rpartition(".")[2].startswith("fa_"):
            description[name] = "FAQuant"
        else:
            description[name] = linears.get(module, "FLOAT") if part != "bias" else "FLOAT"
    return description | dict.fromkeys(tied, "FLOAT")
