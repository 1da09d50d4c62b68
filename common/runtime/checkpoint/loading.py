"""What a load of a checkpoint reads before the weights: files, config and description, checked against one another."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ...errors import OctavoError, first_line
from ..model_sizes import check_sizes, check_sizes_stored, check_stated
from ..schemes.kv_scheme import Scheme, load_scheme
from ..schemes.linear_scheme import CPU_ACTIVATIONS
from ..version import RECIPE_KEYS, check_version
from .ascend import (
    DESCRIPTION_FILE,
    LAYOUT_KEYS,
    check_description,
    described_scheme,
    in_our_labels,
    linear_layout,
    quantized_linears,
    weight_file_names,
)
from .files import TensorHeader, read_headers, read_json

CONFIG_KEY = "octavo"
NATIVE_LOAD_HINT = "needs-trust_remote_code=True"
"""Name of the weight file in config.json, which no file can have, since it is none of a safetensors file: a load by
transformers' own class, which would take codes for weights, fails with an error that repeats it, from a directory and
from the hub. `from_pretrained` puts in the real name."""
OTHERS_CODES = ("awq", "gptq", "compressed-tensors", "fp8")
"""Values of quant_method of the checkpoints that a conversion reads."""
FREE_FIELDS = ("name", "origin", "prefill")
"""Fields of a scheme that say nothing of what is stored, so that they may be edited in config.json."""
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.")
_AGAIN = "copy it again or convert again"
_PACKED = 2
"""Codes that a byte of a weight may hold."""

Find = Callable[[str], Path | None]
"""The path of a file of a checkpoint by its name, fetched if need be; None if there is none."""


def finder(source: str, hub_arguments: dict[str, Any]) -> Find:
    """A way to the files of a checkpoint.

    Args:
        source: local directory or hub id.
        hub_arguments: `revision`, `cache_dir` and the like.
    """

    def find(name: str) -> Path | None:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        return None if found is None else Path(found)

    return find


def read_config(source: str, hub_arguments: dict[str, Any]) -> Any:
    """The config of a checkpoint, as transformers reads it.

    Raises:
        OctavoError: config.json is damaged, or states sizes that no model has.
    """
    file = finder(source, hub_arguments)(CONFIG_FILE)
    if file is not None:
        check_sizes(str(file), read_json(file))
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **hub_arguments)
    except Exception as error:  # a damaged config can make transformers raise anything
        if file is None:
            raise
        raise OctavoError(f"{file}: is no config of a model ({first_line(error)}); {_AGAIN}") from error


def check_generation_config(find: Find) -> None:
    """Raise an `OctavoError` if there is a generation_config.json that transformers would drop, or stumble over."""
    file = find(GENERATION_FILE)
    if file is None:
        return
    data = read_json(file)
    try:
        GenerationConfig.from_dict(data)
    except Exception as error:
        raise OctavoError(f"{file}: cannot be used ({first_line(error)}); {_AGAIN}, or remove it") from error


def _weight_map(index: Path) -> dict[str, str]:
    """File by name of the tensors that an index lists."""
    data = read_json(index, is_strict=True)
    found, metadata = data.get("weight_map"), data.get("metadata")
    if not isinstance(found, dict) or not isinstance(metadata, dict):
        raise OctavoError(f"{index}: maps no tensors to files of this directory; {_AGAIN}")
    for tensor, name in found.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise OctavoError(f"{index}: {tensor} lies in {name!r}, which is no file of this directory; {_AGAIN}")
    return found


def _indexed_headers(index: Path, find: Find) -> dict[str, TensorHeader]:
    """Headers of all tensors of the files that an index lists, each found (or fetched)."""
    wanted = _weight_map(index)
    headers: dict[str, TensorHeader] = {}
    for name in sorted(set(wanted.values())):
        file = find(name)
        if file is None:
            raise OctavoError(f"{index}: lists {name}, which is missing; copy the directory again or convert again")
        stored = read_headers([file])
        for tensor in stored:
            if wanted.get(tensor) != name:
                raise OctavoError(f"{index}: says nothing of {tensor}, which is stored in {name}; {_AGAIN}")
        headers |= stored
    for tensor in wanted.keys() - headers.keys():
        raise OctavoError(f"{index}: {tensor} is not stored in {wanted[tensor]}, where it is to be; {_AGAIN}")
    return headers


def _agreed_scheme(source: str, config: Any, description: dict[str, Any]) -> Scheme:
    """The scheme that config.json names, if it does, which must be the one that the description tells of."""
    own = getattr(config, CONFIG_KEY, None)
    if own is not None and not (isinstance(own, dict) and "scheme" in own):
        raise OctavoError(f"{source}: {CONFIG_KEY!r} in config.json names no scheme; {_AGAIN}")
    if own is not None:
        check_version(source, own, RECIPE_KEYS + LAYOUT_KEYS)
    if own is not None and str(own["scheme"]).endswith(".json"):
        raise OctavoError(f"{source}: the scheme in config.json is {own['scheme']!r}; put the scheme itself there")
    described = described_scheme(description, config.num_hidden_layers)
    scheme = load_scheme(own["scheme"]) if own else described or load_scheme("float")
    stored = described or (load_scheme("float") if scheme.is_static else scheme)
    for part in dataclasses.fields(Scheme):
        if part.name not in FREE_FIELDS and getattr(scheme, part.name) != getattr(stored, part.name):
            raise OctavoError(f"{source}: config.json and {DESCRIPTION_FILE} disagree on {part.name}; convert again")
    return scheme


def _stated_activations(source: str, config: Any) -> str:
    """What weight-only linears multiply with on the CPU, as config.json says it; float where it says nothing."""
    stated = (getattr(config, CONFIG_KEY, None) or {}).get("cpu_activations", "float")
    if stated not in CPU_ACTIVATIONS:
        raise OctavoError(
            f"{source}/{CONFIG_FILE}: cpu_activations is {stated!r}, which is none of {', '.join(CPU_ACTIVATIONS)}"
        )
    return stated


def check_stored_sizes(where: str, settings: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Raise an `OctavoError` if a config states sizes that no model has, or that the stored weights do not bear out.

    Args:
        where: config.json, for the message.
        settings: what it holds, or the attributes of a config.
        headers: of all tensors that are stored.
    """
    check_sizes(where, settings)
    layers = 1 + max((int(found[1]) for name in headers if (found := _LAYER.search(name))), default=-1)
    largest = max((size for header in headers.values() for size in header.shape), default=0)
    check_sizes_stored(where, settings, layers, _PACKED * largest)


def _check_config(source: str, config: Any, headers: Mapping[str, TensorHeader]) -> None:
    """As `check_stored_sizes`, of what transformers made of config.json."""
    where = f"{source}/{CONFIG_FILE}"
    check_stored_sizes(where, vars(config), headers)
    if not isinstance(config.dtype, (torch.dtype, NoneType)):
        raise OctavoError(f"{where}: dtype is {config.dtype!r}, which is none of torch; {_AGAIN}")


def rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_scaling` of transformers 4 holds of `rope_parameters` of 5: all but the base, which stands apart."""
    renamed = {"rope_type" if name == "type" else name: value for name, value in rope.items()}
    return {name: value for name, value in renamed.items() if name != "rope_theta"}


def check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Raise an `OctavoError` if config.json leaves out a number, or states RoPE twice and differently."""
    check_stated(where, settings)
    parts = settings, settings.get("rope_parameters")
    stated = [part["rope_theta"] for part in parts if isinstance(part, dict) and "rope_theta" in part]
    if stated and stated[0] != stated[-1]:
        raise OctavoError(
            f"{where}: rope_theta is {stated[0]!r}, and {stated[-1]!r} in rope_parameters; {_AGAIN}, or change both"
        )
    given = [settings.get(name) for name in ("rope_parameters", "rope_scaling")]
    if all(part and isinstance(part, dict) for part in given) and rope_scaling(given[0]) != rope_scaling(given[1]):
        raise OctavoError(
            f"{where}: rope_scaling, which takes the place of rope_parameters, says something else; {_AGAIN}, or "
            "change both"
        )


def describe_checkpoint(
    config: Any, source: str, tied: Iterable[str], hub_arguments: dict[str, Any]
) -> dict[str, TensorHeader]:
    """Set on `config` what the quantized checkpoint at `source` needs; leave it alone if `source` is an ordinary one.

    Args:
        config: gets `octavo`: the scheme and the layout of the quantized linears (see `linear_layout`); and
            `transformers_weights`, the name of the weight file, which keeps a load without this code from succeeding.
        source: local directory or hub id.
        tied: names of weights that are stored once, under another name, if the config ties embeddings.
        hub_arguments: `revision`, `cache_dir` and the like.

    Returns:
        dtype and shape by name of what is stored; of an ordinary checkpoint, nothing where it has no safetensors.

    Raises:
        OctavoError: files are missing or damaged, or config, description and weights disagree.
    """
    find = finder(source, hub_arguments)
    check_generation_config(find)
    config_file = find(CONFIG_FILE)
    if config_file is not None:
        check_settings(str(config_file), read_json(config_file))
    description_file = find(DESCRIPTION_FILE)
    if description_file is None:
        if CONFIG_KEY in vars(config) and "auto_map" in vars(config):
            raise OctavoError(f"{source}: {DESCRIPTION_FILE} is missing; copy the directory again or convert again")
        _check_float(source, config)
        return _ordinary_headers(source, config, find)
    description = in_our_labels(read_json(description_file, is_strict=True))
    single, index = weight_file_names(description)
    file, index_file = find(single), find(index)
    if file is None and index_file is None:
        raise OctavoError(f"{source}: neither {single} nor {index} is there; copy the directory again or convert again")
    headers = read_headers([file]) if file is not None else _indexed_headers(index_file, find)
    config.transformers_weights = single if file is not None else index
    _check_config(source, config, headers)
    check_description(description, headers, tied if config.tie_word_embeddings else ())
    labels = quantized_linears(description)
    config.octavo = {
        "scheme": _agreed_scheme(source, config, description).to_dict(),
        "cpu_activations": _stated_activations(source, config),
        **linear_layout({name: label for name, label in labels.items() if f"{name}.weight" in headers}, headers),
    }
    return headers


def _check_float(source: str, config: Any) -> None:
    """Raise an `OctavoError` if an ordinary checkpoint is in codes of others, which a bundle cannot read."""
    quantized = getattr(config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if method in OTHERS_CODES:
        raise OctavoError(
            f"{source}: is quantized by {method}; load it by octavo.load_quantized, or convert it, which keeps codes"
        )


def _ordinary_headers(source: str, config: Any, find: Find) -> dict[str, TensorHeader]:
    """Headers of an ordinary checkpoint, which its config has to agree with; none if it has no safetensors."""
    own = getattr(config, CONFIG_KEY, None)
    if own is not None and not (isinstance(own, dict) and own.keys() <= {"scheme"}):
        raise OctavoError(f"{source}: {CONFIG_KEY!r} in config.json is {own!r}; give it a 'scheme' and nothing else")
    first = getattr(config, "transformers_weights", None) or SAFE_WEIGHTS_NAME
    if not isinstance(first, str):
        raise OctavoError(f"{source}/{CONFIG_FILE}: transformers_weights is {first!r}, no file's name; remove it")
    file = find(first) or find(SAFE_WEIGHTS_INDEX_NAME)
    if file is None:
        return {}
    files = [file]
    if file.name.endswith(".index.json"):
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise OctavoError(f"{file}: maps no tensors to files; copy the checkpoint again")
        files = [found for name in sorted(set(weight_map.values())) if (found := find(name)) is not None]
    headers = read_headers(files)
    _check_config(source, config, headers)
    return headers


def check_shapes(source: str, model: nn.Module, headers: Mapping[str, TensorHeader]) -> None:
    """Raise an `OctavoError` that names the first tensor whose shape in a model is not that in which it is stored."""
    for name, tensor in model.state_dict().items():
        stored = headers.get(name)
        if stored is not None and stored.shape != tuple(tensor.shape):
            raise OctavoError(
                f"{source}: {name} is stored as {list(stored.shape)}, and config.json makes it {list(tensor.shape)}; "
                f"{_AGAIN}"
            )
