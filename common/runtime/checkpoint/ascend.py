"""Ascend's dialect: `quant_model_description.json` beside `quant_model_weight_*.safetensors`, as msmodelslim writes it.

It is also the form in which Octavo's own models hold their tensors. Zero points are stored in units of codes with
`x = (code - offset) * scale`, which is this project's definition, so nothing is converted here.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import OctavoError
from ..linear_kinds import QUANTIZED_LINEARS
from ..schemes.kv_scheme import Scheme, load_scheme
from ..schemes.linear_scheme import FP8, FP8_BLOCK, FP8_DYNAMIC, INT4_LABELS, W4A16_DOUBLE, W8A8
from ..static_scales import LayerScales, Scales
from .files import TensorHeader

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
CACHE_PARTS = ("key_scale", "key_zero", "key_levels", "value_scale", "value_zero", "value_levels", "query_scale",
               "key_mean", "key_basis", "value_basis")  # fmt: skip
SCALAR_DTYPES = {"I64": torch.int64, "F32": torch.float32}
FLOATS = ("F32", "F16", "BF16")
WEIGHT_LABELS = tuple(QUANTIZED_LINEARS)
W8A8_MIX, W8A8FP8_DYNAMIC = "W8A8_MIX", "W8A8FP8_DYNAMIC"
ALSO_CALLED = {W8A8_MIX: W8A8, W8A8FP8_DYNAMIC: FP8_DYNAMIC}
"""Labels of engines for tensors that are those of one of our labels. Of W8A8_MIX, engines that prefill and decode apart
quantize inputs by token where they prefill, and by the static scale where they decode; others, by token always."""
WEIGHT_DTYPES = {
    **dict.fromkeys(INT4_LABELS, ("U8", "I8")),
    **dict.fromkeys((FP8, FP8_DYNAMIC, FP8_BLOCK), ("F8_E4M3",)),
}
"""Dtypes of weights in codes where they are not int8; those in int4 may have a byte for each code."""
LINEAR_DTYPES = {
    "weight_scale": FLOATS,
    "weight_offset": FLOATS,
    "input_scale": FLOATS,
    "input_offset": FLOATS,
    "quant_bias": ("I32",),
    "deq_scale": ("I64", "F32"),
    "outlier_columns": ("I32",),
    "input_order": ("I32",),
    "outlier_weight": FLOATS,
    "row_scale": FLOATS,
}
"""Dtypes of the other parts of a quantized linear layer, which are labelled as its weight."""
DOUBLE_DTYPES = {"weight_scale": ("U8",), "weight_offset": ("I8",)}
"""The same of W4A16_DOUBLE, where they differ."""
STORED_AS = {
    "bias": (("FLOAT",), FLOATS),
    "kv_cache_scale": (("C8", "W8A8"), FLOATS),
    "kv_cache_offset": (("C8", "W8A8"), FLOATS),
    "scale": (("FAQuant",), FLOATS),
    "offset": (("FAQuant",), ("I8", *FLOATS)),
    **dict.fromkeys(CACHE_PARTS, ((OWN_LABEL,), ("F32",))),
}
"""Labels and dtypes of parts of other modules; the labels of the KV cache were W8A8 before they were C8."""
FA_PARTS = ("q", "k", "v")
C8_MODULES = ("k_proj", "v_proj")
"""Modules of an attention that the scales of K and V are named for, whatever its projections are called."""
_OF_VLLM = re.compile(r"\.attn\.([kv])_cache_(scale|offset)$")
"""Names of the scales of K and V in vLLM's own models, as `c8_place` makes them."""
SCALE_MODULES = (*(f"fa_{part}" for part in FA_PARTS), "octavo_cache", "attn")
LAYOUT_KEYS = ("quantized_linears", "weight_scales", "unpacked", "deq_scale", "biases", "is_of_vllm")
"""What `linear_layout` tells of a checkpoint."""
FILE_ORDER = (
    *CACHE_PARTS,
    "scale",
    "offset",
    "kv_cache_scale",
    "kv_cache_offset",
    *(f"{part}_cache_{end}" for part in "kv" for end in ("scale", "offset")),
    "weight",
    "bias",
    *LINEAR_DTYPES,
)


def _is_ascend(scheme: Scheme, preset: str) -> bool:
    """Whether a layer is stored as Ascend's format stores the preset: nothing is left out, rotated or kept in float."""
    other = load_scheme(preset)
    same = (scheme.key, scheme.value, scheme.query) == (other.key, other.value, other.query)
    turns = scheme.rotate_key or scheme.rotate_value or scheme.smooth_key or scheme.has_bases
    return same and not (scheme.fold_bias or scheme.is_segmented or turns) and not scheme.layers


def is_c8(scheme: Scheme) -> bool:
    """Whether a layer's scheme is stored as `kv_cache_scale` and `kv_cache_offset`: static per channel."""
    return _is_ascend(scheme, "ascend-c8")


def c8_place(module: str, end: str, is_of_vllm: bool) -> tuple[str, str]:
    """Where a scale of K or V is stored: name of a module within attention, and of the tensor in it.

    Args:
        module: one of `C8_MODULES`.
        end: "scale" or "offset".
        is_of_vllm: by the name that it has in vLLM's models, which vllm-ascend 0.23 looks for; descriptions have the
            name by the projection all the same, since it finds the layers by that.
    """
    return ("attn", f"{module[0]}_cache_{end}") if is_of_vllm else (module, f"kv_cache_{end}")


def described_name(name: str) -> str:
    """The name under which a description has a tensor that is stored by this one."""
    return _OF_VLLM.sub(r".\1_proj.kv_cache_\2", name)


def is_fa(scheme: Scheme) -> bool:
    """Whether a layer's scheme is stored as `fa_q`, `fa_k` and `fa_v`: static per head."""
    return _is_ascend(scheme, "ascend-fa")


def _constant_tensors(name: str, layer: LayerScales) -> dict[str, torch.Tensor]:
    """The inverse of `_read_constants`."""
    pairs = {"key": layer.key or (None, None), "value": layer.value or (None, None), "query": (layer.query, None)}
    parts = {
        f"{part}_{kind}": tensor
        for part, pair in pairs.items()
        for kind, tensor in zip(("scale", "zero"), pair, strict=True)
    }
    for part in ("key_levels", "value_levels", "key_mean", "key_basis", "value_basis"):
        parts[part] = getattr(layer, part)
    return {f"{name}.octavo_cache.{part}": tensor for part, tensor in parts.items() if tensor is not None}


def scale_tensors(
    attentions: Iterable[tuple[str, nn.Module]], scheme: Scheme, scales: Scales, is_of_vllm: bool = False
) -> dict[str, torch.Tensor]:
    """The inverse of `read_scales`: static scales as tensors named for the file; `is_of_vllm` as in `c8_place`."""
    tensors = {}
    for (name, attention), layer in zip(attentions, scales, strict=True):
        layer_scheme = scheme.of_layer(attention.layer_idx)
        if is_c8(layer_scheme):
            for part, (scale, _) in zip(C8_MODULES, (layer.key, layer.value), strict=True):
                values = {"scale": scale.flatten(), "offset": torch.zeros_like(scale.flatten())}
                for end, tensor in values.items():
                    tensors[".".join((name, *c8_place(part, end, is_of_vllm)))] = tensor
        elif is_fa(layer_scheme):
            for part, scale in zip(FA_PARTS, (layer.query, layer.key[0], layer.value[0]), strict=True):
                tensors[f"{name}.fa_{part}.scale"] = scale.flatten(1)
                tensors[f"{name}.fa_{part}.offset"] = torch.zeros(scale.shape[:2], dtype=torch.int8)
        else:
            tensors |= _constant_tensors(name, layer)
    return tensors


def in_file_order(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in the order in which msmodelslim writes them: module by module, and within one as in `FILE_ORDER`.

    Static scales of attention come first in its module, whether the model has modules for them or not.
    """
    positions = {
        name: position
        for position, (name, _) in enumerate(model.named_modules())
        if name.rpartition(".")[2] not in SCALE_MODULES
    }

    def key(name: str) -> tuple[int, int]:
        module, _, part = name.rpartition(".")
        while module not in positions:
            module = module.rpartition(".")[0]
        return positions[module], FILE_ORDER.index(part)

    return {name: tensors[name] for name in sorted(tensors, key=key)}


def in_our_labels(description: dict[str, Any]) -> dict[str, Any]:
    """A description with our labels in the place of those that are `ALSO_CALLED` otherwise."""
    return {
        name: label if name in NOT_TENSORS or not isinstance(label, str) else ALSO_CALLED.get(label, label)
        for name, label in description.items()
    }


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


def linear_layout(linears: Mapping[str, str], headers: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """What a checkpoint says of its linear layers, as `attach_buffers` takes it and `config.octavo` holds it.

    Args:
        linears: label by name of those that are quantized.
        headers: of all tensors.

    Returns:
        `quantized_linears`: the labels; `weight_scales`: shapes by name, of those that have not one per output channel;
        `unpacked`: names of those in int4 that take a byte for each code; `deq_scale`: its dtype; `biases`: names of
        all modules with a bias, which the architecture need not have; `is_of_vllm`: see `c8_place`.

    Raises:
        OctavoError: a weight, or its scales, that are no matrix.
    """
    scales = {}
    for name in linears:
        shape, of_weight = headers[f"{name}.weight_scale"].shape, headers[f"{name}.weight"].shape
        for part, stored in (("weight_scale", shape), ("weight", of_weight)):
            if len(stored) != 2 or 0 in stored:
                raise OctavoError(f"{name}.{part} is stored as {stored}, which is no matrix; convert the model again")
        if shape != (of_weight[0], 1):
            scales[name] = list(shape)
    deq_scales = [header.dtype for name, header in headers.items() if name.endswith(".deq_scale")]
    return {
        "quantized_linears": dict(linears),
        "weight_scales": scales,
        "unpacked": [
            n for n, label in linears.items() if label in INT4_LABELS and headers[f"{n}.weight"].dtype == "I8"
        ],
        "deq_scale": next(iter(deq_scales), "F32"),
        "biases": [name.removesuffix(".bias") for name in headers if name.endswith(".bias")],
        "is_of_vllm": any(_OF_VLLM.search(name) for name in headers),
    }


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
        preset, ending = "ascend-fa", ".fa_k.scale"
    elif description.get("kv_cache_type") or description.get("kv_quant_type"):
        preset, ending = "ascend-c8", f".{C8_MODULES[0]}.kv_cache_scale"
    else:
        return None
    matches = (re.search(rf"\.(\d+)\.\w+{re.escape(ending)}$", tensor) for tensor in description)
    present = {int(match[1]) for match in matches if match}
    absent = [index for index in range(layers) if index not in present]
    return Scheme.from_dict({**load_scheme(preset).to_dict(), "float_layers": absent})


def weight_file_names(description: dict[str, Any]) -> tuple[str, str]:
    """Names of the weight file and of the index that replaces it when the weights are in several files."""
    kind = str(description.get("model_quant_type", "")).lower()
    if not re.fullmatch(r"[a-z0-9_]+", kind):
        raise OctavoError(f"{DESCRIPTION_FILE}: model_quant_type {kind!r} is none; copy it again or convert again")
    single = WEIGHT_FILE.format(kind=kind)
    return single, f"{single}.index.json"


def _labels_and_dtypes(part: str, of_module: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How a tensor may be labelled and stored: its name in its module, and the label of the module's weight."""
    kind = QUANTIZED_LINEARS.get(of_module)
    if kind is not None and part == "weight":
        return (of_module,), WEIGHT_DTYPES.get(of_module, ("I8",))
    if part in LINEAR_DTYPES:
        dtypes = DOUBLE_DTYPES.get(part) if of_module == W4A16_DOUBLE else None
        return (of_module,) if kind is not None and part in kind.PARTS else (), dtypes or LINEAR_DTYPES[part]
    return STORED_AS.get(part, (("FLOAT",), FLOATS))


def check_description(description: dict[str, Any], headers: dict[str, TensorHeader], tied: Iterable[str]) -> None:
    """Raise an `OctavoError` that names the first tensor on which description and weight files disagree.

    Args:
        tied: names that may be described without being stored.
    """
    for name, label in description.items():
        if name not in NOT_TENSORS and not isinstance(label, str):
            raise OctavoError(f"{DESCRIPTION_FILE}: {name} is labelled {label!r}, which is no text; convert again")
    described = {
        name: label
        for name, label in description.items()
        if name not in NOT_TENSORS and not (name in tied and name not in headers)
    }
    headers = {described_name(name): header for name, header in headers.items()}
    where = f"{DESCRIPTION_FILE} and the weights disagree"
    for name in sorted(described.keys() - headers.keys()):
        raise OctavoError(f"{where}: {name} is described and not stored; convert the model again")
    for name in sorted(headers.keys() - described.keys()):
        raise OctavoError(f"{where}: {name} is stored and not described; convert the model again")
    for name, label in described.items():
        module, _, part = name.rpartition(".")
        labels, dtypes = _labels_and_dtypes(part, described.get(f"{module}.weight"))
        if label not in labels or headers[name].dtype not in dtypes:
            raise OctavoError(f"{where}: {name} is labelled {label} and stored as {headers[name].dtype}; convert again")
    for linear, label in quantized_linears(described).items():
        for part in QUANTIZED_LINEARS[label].PARTS:
            if f"{linear}.{part}" not in headers:
                raise OctavoError(f"{where}: {linear}.{part} is missing; convert the model again")
    kinds = {header.dtype for name, header in headers.items() if name.endswith(".deq_scale")}
    if len(kinds) > 1:
        raise OctavoError(f"{where}: deq_scale is stored as {' and '.join(sorted(kinds))}; convert the model again")


def build_description(
    tensors: Iterable[str], tied: Mapping[str, str], linears: dict[str, str], scheme: Scheme, group_size: int = 0
) -> dict[str, Any]:
    """The description of a checkpoint: what kind it is, and a label for each tensor, as msmodelslim writes them.

    Args:
        tensors: names of what is stored.
        tied: labels of names that share a stored tensor, since readers look for `lm_head.weight` here.
        linears: label by name of the quantized linears; the model is called by that of most of them.
        scheme: of attention and cache.
        group_size: of the weights that are quantized in groups of input channels; 0 if none are.
    """
    kind = Counter(linears.values()).most_common(1)[0][0] if linears else "FLOAT"
    description: dict[str, Any] = {"version": "1.0.0", "model_quant_type": kind}
    if group_size:
        description["group_size"] = group_size
    if is_c8(scheme):
        description |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    elif is_fa(scheme):
        description["fa_quant_type"] = "FAQuant"
    elif scheme.is_quantized:
        description["octavo_scheme"] = scheme.to_dict()
    for name in map(described_name, tensors):
        module, _, part = name.rpartition(".")
        if part.startswith("kv_cache_"):
            description[name] = "C8"
        elif module.endswith(".octavo_cache"):
            description[name] = OWN_LABEL
        elif module.rpartition(".")[2].startswith("fa_"):
            description[name] = "FAQuant"
        else:
            description[name] = linears.get(module, "FLOAT") if part != "bias" else "FLOAT"
    return description | dict(tied)
