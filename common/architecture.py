"""What the shared scripts need to know of an architecture; each `models/` folder states one."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .errors import OctavoError
from .runtime.decoder import STATED, Decoder, check_anatomy, state_decoder, stated_decoder

REPOSITORY = Path(__file__).parents[1]
LEAST_SHARE = 0.5
"""Of the names of settings of two kinds of models together, those that both have, where they are told to be near."""


@dataclass(frozen=True)
class Architecture:
    """One architecture of the zoo.

    Attributes:
        name: folder under `models/`.
        model_type: as in the config.json of the checkpoints it converts.
        model_class: the quantized model class, in `models/{name}/{module}.py`.
        float_linears: from a config and the dtype of the checkpoint, globs of the linear layers that the recipe leaves
            in float; see `floats`.
        inside: model_type of multimodal checkpoints around such a model, which are refused with the way out.
    """

    name: str
    model_type: str
    model_class: type
    float_linears: Callable[[Any, torch.dtype], list[str]] | None = None
    inside: str | None = None

    def floats(self, config: Any, dtype: torch.dtype) -> list[str]:
        """Globs of the linears that Ascend's recipe for static W8A8 leaves in float.

        Where an architecture has no recipe of its own, that of MindIE-LLM (qwen/convert_quant_weights_72b.py) and
        msmodelslim for most models: the last linear of each MLP, of each expert, and of the model.
        """
        if self.float_linears is not None:
            return self.float_linears(config, dtype)
        experts = self.decoder.experts
        of_experts = [] if experts is None else [f"*.{experts.name}.*.{experts.down}"]
        return [f"*.{self.decoder.mlp.down}", *of_experts, self.decoder.head]

    @property
    def decoder(self) -> Decoder:
        """Its anatomy, which the modeling file states, since it travels with that file."""
        return getattr(self.model_class, STATED)

    def layer_name(self, index: int) -> str:
        """Name of a decoder layer in a model and in its files, as `model.layers.3`."""
        return f"{self.model_class.base_model_prefix}.{self.decoder.layers}.{index}"

    @property
    def module(self) -> str:
        """Name of the modeling file, without `.py`."""
        return self.model_class.__module__.rpartition(".")[2]

    @property
    def source(self) -> Path:
        """The modeling file in this tree."""
        return REPOSITORY / "models" / self.name / f"{self.module}.py"

    @property
    def auto_map(self) -> dict[str, str]:
        """What makes transformers load the modeling file that lies beside the weights."""
        return {"AutoModelForCausalLM": f"{self.module}.{self.model_class.__name__}"}


def architecture_names() -> list[str]:
    """The folders of architectures."""
    return sorted(file.parent.name for file in REPOSITORY.glob("models/*/modeling_*_fa3.py"))


def load_architecture(name: str) -> Architecture:
    """The architecture of a folder under `models/`.

    Raises:
        OctavoError: there is no such folder; the message lists those there are.
    """
    if name not in architecture_names():
        raise OctavoError(f"--arch {name}: is none of {', '.join(architecture_names())}")
    return import_module(f"..models.{name}", __package__).ARCHITECTURE


def known_decoders() -> list[Decoder]:
    """The anatomies that the zoo states, each once."""
    found = (load_architecture(name).decoder for name in architecture_names())
    return list(dict.fromkeys(found))


def architecture_of(config: Any) -> Architecture:
    """The architecture that converts models of a config.

    Raises:
        OctavoError: the zoo has none for its model type.
    """
    known = stated_architectures()
    if config.model_type not in known:
        has = ", ".join(sorted(known))
        raise OctavoError(f"model_type {config.model_type!r}: the zoo states no anatomy of it (it has {has})")
    return load_architecture(known[config.model_type])


def stated_or_known(model: nn.Module) -> Decoder:
    """The anatomy of a model of transformers: what it says itself, or else, once checked, what the zoo states.

    Its linears may be those of another library, which quantized them or put adapters in.

    Raises:
        OctavoError: the zoo states none for its model type, or the model is not as stated.
    """
    if not hasattr(model, STATED):
        architecture = architecture_of(model.base_model.config)
        check_anatomy(model, architecture.decoder, f"models/{architecture.name}", are_linears_float=False)
        state_decoder(model, architecture.decoder)
    return stated_decoder(model)


_STATED = re.compile(r'^ARCHITECTURE = Architecture\(\s*"(\w+)",\s*"([\w.-]+)"', re.MULTILINE)


def stated_architectures(models: Path = REPOSITORY / "models") -> dict[str, str]:
    """Folder under `models/` by the model_type that it converts, as the folders state it; none is imported."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(models.glob("*/__init__.py"))]
    return {model_type: name for text in texts for name, model_type in _STATED.findall(text)}


def nearest_stated(settings: Mapping[str, Any]) -> str:
    """Which model_type of the zoo another one comes nearest to, by the names of its settings, as the end of a message.

    Args:
        settings: the config.json of a model that the zoo does not serve.

    Returns:
        the nearest, and up to three settings that it does not have; nothing if it shares less than half of them.
    """
    base, classes = PreTrainedConfig().to_dict().keys(), {name: CONFIG_MAPPING[name] for name in stated_architectures()}
    own = settings.keys() - base
    known = {name: {*kind().to_dict(), *kind.attribute_map} - base for name, kind in classes.items()}
    shares = {name: len(own & keys) / max(1, len(own | keys)) for name, keys in known.items()}
    name = max(shares, key=shares.__getitem__)
    if shares[name] < LEAST_SHARE:
        return ""
    others = sorted(own - known[name])[:3]
    lacks = f", which has no {', '.join(others)}" if others else ""
    return f"; by its settings it comes nearest to {name!r}{lacks}"


def refuse_around(config: Path, model_type: Any) -> None:
    """Raise an `OctavoError` that says what to do if a config.json is of a multimodal model around one of the zoo.

    Args:
        config: the file, for the message.
        model_type: what it says.
    """
    for name in architecture_names() if isinstance(model_type, str) else ():
        architecture = load_architecture(name)
        if architecture.inside == model_type:
            raise OctavoError(
                f"{config}: model_type is {model_type!r}, which takes more than text, and models/{name} serves "
                f"{architecture.model_type!r}; save its text model first, as models/{name}/README.md shows"
            )


def check_model_type(config: Path, model_type: Any, architecture: Architecture, who: str, way_out: str) -> None:
    """Raise an `OctavoError` if a config.json is of another architecture than the one that is to serve it.

    Args:
        config: the file, for the message.
        model_type: what it says.
        who: what serves the architecture, and that it does: "models/llama3 converts".
        way_out: what serves the other one, with `{}` for its folder under `models/`.
    """
    if model_type == architecture.model_type:
        return
    refuse_around(config, model_type)
    known = stated_architectures()
    other = known.get(model_type) if isinstance(model_type, str) else None
    mend = way_out.format(other) if other else f"the zoo has none for it (it has {', '.join(sorted(known))})"
    raise OctavoError(f"{config}: model_type is {model_type!r} and {who} {architecture.model_type!r}; {mend}")
