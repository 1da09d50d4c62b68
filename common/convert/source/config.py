"""The JSON of a float checkpoint: which of it is read, and which of it an output can bear."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from ...architecture import (
    Architecture,
    check_model_type,
    load_architecture,
    nearest_stated,
    refuse_around,
    stated_architectures,
)
from ...errors import OctavoError, first_line
from ...runtime.checkpoint.ascend import DESCRIPTION_FILE
from ...runtime.checkpoint.files import read_json
from ..spelling import named

LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    StrictDataclassError,
)
"""What transformers raises of files that it cannot load."""
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate")
"""Keys that name code which lies beside a checkpoint, or in another repository."""
ATTENTION_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "use_flash_attention_2",
    "output_attentions",
    "_output_attentions",
)
"""Keys that choose how attention is computed, which an output does from codes, or that want its weights."""
PATCH_KEYS = (
    "fusion_config",
    "kernel_config",
    "distributed_config",
    "quantization_config",
    "pruned_heads",
    "torchscript",
    "return_dict",
)
"""Keys that change modules or their outputs when a model is made."""
CACHE_KEYS = ("cache_implementation", "cache_config")
"""Keys of generation that choose a cache; an output has its own."""
MODEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of models."""
GENERATION_FILE = "generation_config.json"


def without_keys(data: Any, keys: tuple[str, ...]) -> Any:
    """JSON without some keys, at any depth."""
    if isinstance(data, dict):
        return {name: without_keys(value, keys) for name, value in data.items() if name not in keys}
    return [without_keys(value, keys) for value in data] if isinstance(data, list) else data


def bearable(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what an output cannot bear: code of others, and choices of attention and modules."""
    return without_keys(config, CODE_KEYS + ATTENTION_KEYS + PATCH_KEYS)


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").is_file():
        raise OctavoError(f"{named('model')} {directory}: holds no config.json, so it is no Hugging Face checkpoint")
    return read_json(directory / "config.json")


def chosen_architecture(directory: Path, chosen: Architecture | str | None) -> Architecture:
    """The architecture that converts a checkpoint: the one that is given, by itself or by name, or else its own.

    Raises:
        OctavoError: the zoo has none of that name, or for that checkpoint; the message lists those it has.
    """
    if isinstance(chosen, Architecture):
        return chosen
    known = stated_architectures()
    if chosen is not None:
        if chosen not in known.values():
            raise OctavoError(f"architecture {chosen}: is none of {', '.join(sorted(known.values()))}")
        return load_architecture(chosen)
    settings = _read_config(directory)
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        refuse_around(directory / "config.json", model_type)
        raise OctavoError(
            f"{directory}/config.json: model_type is {model_type!r}, and the zoo has none for it "
            f"(it has {', '.join(sorted(known))}){nearest_stated(settings)}; CONTRIBUTING.md has the recipe for another"
        )
    return load_architecture(known[model_type])


def read_source_config(directory: Path, architecture: Architecture) -> dict[str, Any]:
    """The config.json of a float checkpoint of this architecture.

    Raises:
        OctavoError: there is none, it is another architecture's, or the checkpoint is Octavo's or Ascend's own.
    """
    config = _read_config(directory)
    who, way_out = f"models/{architecture.name} converts", named("give architecture='{}'")
    check_model_type(directory / "config.json", config.get("model_type"), architecture, who, way_out)
    if (directory / DESCRIPTION_FILE).exists():
        raise OctavoError(f"{named('model')} {directory}: is quantized already; give the float checkpoint")
    if config.get("is_causal") is False:
        raise OctavoError(f"{directory}/config.json: is_causal is false, and a KV cache serves causal models only")
    return config


def load_source_config(directory: Path) -> PreTrainedConfig:
    """The config of a float checkpoint, as transformers reads it, without what it says of attention.

    Raises:
        OctavoError: transformers cannot read it.
    """
    found = bearable(read_json(directory / "config.json"))
    try:
        config = CONFIG_MAPPING[found.get("model_type")].from_dict(found)
    except LOAD_ERRORS as error:
        raise OctavoError(f"{named('model')} {directory}: cannot be loaded ({first_line(error)})") from None
    if config.dtype not in (None, *MODEL_DTYPES):
        raise OctavoError(f"{directory}/config.json: dtype is {config.dtype}, in which no model is loaded; mend it")
    return config


def carried_generation_config(directory: Path) -> dict[str, Any] | None:
    """The generation_config.json to write: the source's, without code and caches of others; None if it has none.

    Raises:
        OctavoError: transformers cannot read it.
    """
    if not (directory / GENERATION_FILE).is_file():
        return None
    try:
        GenerationConfig.from_pretrained(directory, local_files_only=True)
    except LOAD_ERRORS as error:
        raise OctavoError(
            f"{directory / GENERATION_FILE}: cannot be loaded ({first_line(error)}); mend or remove it"
        ) from None
    return without_keys(read_json(directory / GENERATION_FILE), CODE_KEYS + CACHE_KEYS)
