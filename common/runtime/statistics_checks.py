"""Whether a statistics file is one, and of the model that it is used with: see `static_scales.py` for what it holds."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import OctavoError
from .model_sizes import MOST_LAYERS, attention_sizes
from .rotary import basis_of, rope_constants

_NAME = re.compile(
    r"layers\.(?P<layer>[0-9]{1,6})\.(?:"
    r"(?P<part>q|k)\.(?P<bound>max|radius)|(?P<folded>k\.folded)\.radius|"
    r"v\.(?:folded\.)?(?:low|high)|(?P<before>k\.before)\.(?:low|high)|[kv]\.levels\.(?P<bits>[1-4])|"
    r"k\.(?:folded\.)?(?P<mean>mean)|k\.(?P<basis>balanced|oscar)|v\.(?P<value_basis>oscar)|k\.(?P<single>sharpness)"
    r")|linears\..+\.(?P<input>low|high|mean_abs|mean_square)"
)
_NEEDED = ("q.radius", "k.radius", "v.low", "v.high")
_NOT_NEGATIVE = ("max", "radius", "mean_abs", "mean_square", "sharpness")
_WAY_OUT = "write the statistics again with --save_statistics"


def is_basis(tensor: torch.Tensor) -> bool:
    """Whether matrices `[G, D, D]` can be undone in float32."""
    square = tensor.dim() == 3 and tensor.shape[1] == tensor.shape[2]
    return square and basis_of(tensor).is_sound


def layer_count(metadata: Mapping[str, str]) -> int:
    """The number of layers that metadata tells.

    Raises:
        OctavoError: it tells none.
    """
    text = metadata.get("num_hidden_layers", "")
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 0 < int(text) <= MOST_LAYERS:
        raise OctavoError(f"calibration statistics: num_hidden_layers is {text!r}, no number of layers; {_WAY_OUT}")
    return int(text)


def check_statistics(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Raise an `OctavoError` that names the first tensor that no statistics hold, or that is missing.

    Whether values are finite is for the caller to check.
    """
    layers = layer_count(metadata)
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or (found["layer"] is not None and not int(found["layer"]) < layers):
            raise OctavoError(f"calibration statistics of {layers} layers: {name} is none of them; {_WAY_OUT}")
        dims = (
            1
            if found["input"] or found["bits"] or found["single"]
            else 3
            if found["basis"] or found["value_basis"]
            else 2
        )
        is_single = not found["single"] or len(tensor) == 1
        if tensor.dtype != torch.float32 or tensor.dim() != dims or 0 in tensor.shape or not is_single:
            shape = list(tensor.shape)
            raise OctavoError(f"calibration statistics: {name} is {tensor.dtype} of shape {shape}; {_WAY_OUT}")
        last = name.rpartition(".")[2]
        if last in _NOT_NEGATIVE and bool((tensor < 0).any()):
            raise OctavoError(f"calibration statistics: {name} is negative, and a size is not; {_WAY_OUT}")
        if found["bits"] and (len(tensor) != 2 ** int(found["bits"]) or bool((tensor.diff() < 0).any())):
            raise OctavoError(f"calibration statistics: {name} holds no codebook that ascends; {_WAY_OUT}")
        if last == "low":
            _check_range(name, tensors)
        if dims == 3 and not is_basis(tensor):
            raise OctavoError(f"calibration statistics: {name} holds no bases that can be undone; {_WAY_OUT}")
    for index in range(layers):
        for part in _NEEDED:
            if f"layers.{index}.{part}" not in tensors:
                raise OctavoError(f"calibration statistics: layers.{index}.{part} is missing; {_WAY_OUT}")


def _check_range(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """That what `name`, which ends in `low`, is the low end of has a high end, and not below."""
    other = f"{name.removesuffix('low')}high"
    if other not in tensors:
        raise OctavoError(f"calibration statistics: {other} is missing; {_WAY_OUT}")
    if tensors[name].shape != tensors[other].shape or bool((tensors[name] > tensors[other]).any()):
        raise OctavoError(f"calibration statistics: {name} exceeds {other} or is of another shape; {_WAY_OUT}")


def check_statistics_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], config: Any) -> None:
    """Raise an `OctavoError` if statistics are not of the model of a config: type, layers, heads and their head_dim.

    Args:
        config: the model's, or that of its text decoder.
    """
    where = "calibration statistics of another model:"
    kinds = {config.model_type, config.get_text_config(decoder=True).model_type}
    if metadata.get("model_type") not in kinds:
        own = metadata.get("model_type")
        raise OctavoError(f"{where} model_type is {own!r}, and this model's {config.model_type!r}; {_WAY_OUT}")
    config = config.get_text_config(decoder=True)
    if layer_count(metadata) != config.num_hidden_layers:
        own = layer_count(metadata)
        raise OctavoError(f"{where} {own} layers, and this model has {config.num_hidden_layers}; {_WAY_OUT}")
    heads, groups, head_dim = attention_sizes(config)
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or found["layer"] is None or found["bits"] or found["single"]:
            continue
        is_pair = found["bound"] == "radius" or found["folded"]
        wanted = (
            heads if found["part"] == "q" else groups,
            head_dim - len(rope_constants(config, head_dim, int(found["layer"]))[0]) if is_pair else head_dim,
            *([head_dim] if found["basis"] or found["value_basis"] else []),
        )
        if tuple(tensor.shape) != wanted:
            shape = list(tensor.shape)
            raise OctavoError(f"{where} {name} is of shape {shape}, and this model's of {list(wanted)}; {_WAY_OUT}")
