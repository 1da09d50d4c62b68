"""The model that is planned for: what its config.json says, and nothing else of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from ..common.architecture import Architecture, load_architecture, stated_architectures
from ..common.convert.source.checkpoint import find_source
from ..common.convert.source.config import LOAD_ERRORS, bearable
from ..common.errors import OctavoError, first_line
from ..common.runtime.checkpoint.ascend import DESCRIPTION_FILE
from ..common.runtime.checkpoint.files import read_json
from ..common.runtime.checkpoint.loading import CONFIG_FILE, CONFIG_KEY
from ..common.runtime.model_sizes import check_cache_sizes, check_sizes
from .weights import stored_dtype

ATTENTIONS = {"full_attention", "sliding_attention"}
"""Types of layers that a cache serves."""
NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads")


@dataclass(frozen=True)
class PlannedModel:
    """A model by its config.

    Attributes:
        name: as it was given.
        settings: its config.json.
        config: the same as transformers reads it.
        architecture: what states its anatomy; None where the zoo has none, and only its cache and floats are known.
        dtype: of its weights and states.
    """

    name: str
    settings: Mapping[str, Any]
    config: PreTrainedConfig
    architecture: Architecture | None
    dtype: torch.dtype

    @property
    def is_known(self) -> bool:
        """Whether transformers makes a language model of it, so that its weights are known."""
        return type(self.config) in AutoModelForCausalLM._model_mapping

    @property
    def decoder_config(self) -> PreTrainedConfig:
        """The part of the config that is the decoder's."""
        return self.config.get_text_config(decoder=True)


def config_file(model: str) -> Path:
    """Where the config.json of a model lies: in a directory, as a file, or in the hub, from which it alone is fetched.

    Raises:
        OctavoError: there is none.
    """
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise OctavoError(f"{model}: holds no {CONFIG_FILE}; give a directory that does, or a hub id")
        return path / CONFIG_FILE
    return find_source(model, patterns=(CONFIG_FILE,)) / CONFIG_FILE


def _config_of(file: Path, settings: dict[str, Any]) -> PreTrainedConfig:
    """The config as its class reads it, or, of a type that transformers does not know, as it stands."""
    name = settings.get("model_type")
    kind = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else PreTrainedConfig  # noqa: SIM401, its `get` finds none
    try:
        return kind.from_dict(bearable(settings))
    except LOAD_ERRORS as error:
        raise OctavoError(f"{file}: cannot be read ({first_line(error)}); mend it") from None


def read_model(model: str) -> PlannedModel:
    """The model of a directory, a config.json or a hub id.

    Raises:
        OctavoError: there is no config, it states no sizes that a model has, it is of an output of Octavo, or its
            layers have no keys and values.
    """
    file = config_file(model)
    settings = read_json(file)
    if CONFIG_KEY in settings or (file.parent / DESCRIPTION_FILE).exists():
        raise OctavoError(f"{model}: is converted already; plan for the float model that it was made of")
    check_sizes(str(file), settings)
    config = _config_of(file, settings)
    decoder = config.get_text_config(decoder=True)
    for name in NEEDED:
        if getattr(decoder, name, None) is None:
            raise OctavoError(f"{file}: says no {name}, which every decoder has; give a language model's config")
    check_cache_sizes(decoder)
    others = set(getattr(decoder, "layer_types", None) or []) - ATTENTIONS
    if others:
        raise OctavoError(f"{file}: layers of {', '.join(sorted(others))} have no keys and values to quantize")
    known = stated_architectures().get(settings.get("model_type"))
    return PlannedModel(model, settings, config, load_architecture(known) if known else None, stored_dtype(config))
