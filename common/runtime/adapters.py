"""LoRA adapters of PEFT on a model whose linears are in codes: which are served, and the layer that runs them.

PEFT puts a layer of its own in the place of each linear that an adapter changes: `y = W x + (alpha / r) B A x`, A
`[r, K]` and B `[N, r]` (LoRA, arXiv 2106.09685). It takes that layer from the adapter's config, where others may
register one, and keeps its configs in the dict `peft_config` of the model, if there is one. Ours looks at each config
before PEFT changes anything, refuses what codes do not bear, and registers the layer for linears in codes.

Nothing here is asked for before PEFT is there, and PEFT is never imported before.
"""

import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import OctavoError
from .checkpoint.files import read_headers
from .decoder import STATED, attention_modules, has_foldable_bias, stated_decoder, without_adapter
from .quantized_embedding import QuantizedEmbedding, TiedLinear
from .quantized_linear import QuantizedLinear

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MERGE_FIRST = "merge it into the float model (PEFT's merge_and_unload), save that, and convert it"
_OF_WEIGHT = (
    "use_dora", "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config", "kasa_config", "megatron_config",
)  # fmt: skip
"""Fields of a config that ask for more than products with A and B."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin a training that leave the weight of the model as it is."""
_PEFT_WARNS = "Already found a `peft_config` attribute in the model"
_PEFT_PREFIX = "base_model.model."
_LORA_KEY = re.compile(rf"(?:{re.escape(_PEFT_PREFIX)})?(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight$")


def _in_codes(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the linears, and of an embedding, in codes, those within PEFT's layers too."""
    kinds = (QuantizedLinear, TiedLinear)
    return ((name, module) for name, module in model.named_modules() if isinstance(without_adapter(module), kinds))


def _has_folds(model: nn.Module) -> bool:
    """Whether biases are left out of linears, or are about to be."""
    if getattr(model, STATED, None) is None:  # of a prepared model's class, and not prepared itself
        return False
    has_biases = (has_foldable_bias(stated_decoder(model), attention) for _, attention in attention_modules(model))
    return any(has_biases)


def _matches(config: Any, name: str) -> bool:
    """Whether an adapter changes the module of this name."""
    found = import_module("peft.tuners.tuners_utils").check_target_module_exists
    return config.target_modules is not None and bool(found(config, name))


def _kind_refusal(config: Any) -> str | None:
    """Why linears in codes do not bear what a config asks for, or None."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"it is of kind {kind}, and linears in codes bear LoRA alone; {_MERGE_FIRST}"
    if not config.inference_mode:
        return (
            "it is to be trained, and codes pass no gradient on; train it on the float model, and load it here as "
            "PEFT does unless told otherwise (is_trainable=False)"
        )
    for name in _OF_WEIGHT:
        if getattr(config, name, None):
            return f"{name} asks for more than the two products of LoRA; {_MERGE_FIRST}"
    start = getattr(config, "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        return f"init_lora_weights={start!r} changes the weight of the model, which is in codes; {_MERGE_FIRST}"
    if getattr(config, "bias", "none") != "none":
        return f"bias={config.bias!r} changes biases of the model, which belong to its codes; {_MERGE_FIRST}"
    return None


def _place_refusal(model: nn.Module, config: Any) -> str | None:
    """Why a model in codes has no place for an adapter, or None."""
    whole = tuple(getattr(config, "modules_to_save", None) or ())
    for name, module in _in_codes(model):
        if name.rpartition(".")[2] in whole:
            return f"modules_to_save replaces {name}, which is in codes; {_MERGE_FIRST}"
        if isinstance(without_adapter(module), QuantizedEmbedding) and _matches(config, name):
            return f"it changes {name}, which is an embedding in codes; {_MERGE_FIRST}"
    facts = getattr(model, STATED, None)
    if facts is None:
        return None
    experts = facts.experts and re.compile(rf"\.{re.escape(facts.experts.name)}\.\d+\.")
    for name, _ in model.named_modules():
        if experts and experts.search(name) and _matches(config, name):
            return f"it changes {name}, an expert, whose names differ between versions of transformers; {_MERGE_FIRST}"
    return None


def _fused_refusal(model: nn.Module, config: Any) -> str | None:
    """Why an adapter that names linears which are parts of another one here is not of this model, or None."""
    facts, targets = getattr(model, STATED, None), getattr(config, "target_modules", None)
    if facts is None or not isinstance(targets, (list, set, tuple)):
        return None
    fused = [part.inputs[0] for part in (facts.attention, facts.mlp) if part.is_fused]
    ends = [f".{name}" for name, _ in model.named_modules()] if fused else []
    for target in sorted(targets) if fused else ():
        if not any(end.endswith(f".{target}") for end in ends):
            return f"it changes {target}, and this model has {' and '.join(fused)} instead; train one on this model"
    return None


class Adapters(dict):
    """The configs of a model's adapters by their names, each of which is looked at before it is taken.

    Args:
        model: whose `peft_config` this is; known weakly, since it holds this in turn.
        adapters: configs that it has already.

    Raises:
        OctavoError: when a config is set that the model does not bear.
    """

    _model: Callable[[], nn.Module | None] = type(None)

    def __init__(self, model: nn.Module, adapters: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self.update(adapters or {})

    def __setitem__(self, name: str, config: Any) -> None:
        _hear_peft()
        self.admit(config)
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of any dict; PEFT adds configs so."""
        for name, config in dict(*args, **kwargs).items():
            self[name] = config

    def admit(self, config: Any) -> None:
        """Let a config have the layer of linears in codes, if the model has any.

        Raises:
            OctavoError: the model does not bear what it asks for.
        """
        model = self._model()
        if model is None:
            raise OctavoError("this adapter: the model that it is for is gone; load the model anew")
        if getattr(model, "octavo_shared", None) is not None:
            raise OctavoError("this adapter: the model is shared among ranks, whose parts of it an adapter has not")
        is_coded = any(True for _ in _in_codes(model))
        refusal = _fused_refusal(model, config)
        if is_coded:
            refusal = refusal or _kind_refusal(config) or _place_refusal(model, config)
        elif getattr(config, "use_dora", False) and _has_folds(model):
            refusal = "use_dora reads biases that prepare folds; call merge_and_unload before prepare"
        if refusal is not None:
            raise OctavoError(
                f"this adapter does not run on a model in codes: {refusal}" if is_coded else f"this adapter: {refusal}"
            )
        if is_coded:
            layer = _layer_in_codes()
            config._register_custom_module({QuantizedLinear: layer, TiedLinear: layer})

    def __reduce__(self) -> tuple:
        return _restored, (dict(self),), self._model()

    def __setstate__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)


def _restored(configs: dict[str, Any]) -> Adapters:
    """For copies and pickles, in which the model is not whole yet."""
    found = Adapters.__new__(Adapters)
    dict.update(found, configs)
    return found


_FALSE_ALARM = ("ignore", re.compile(_PEFT_WARNS, re.IGNORECASE), UserWarning, None, 0)
"""The filter as `warnings` keeps it."""


def _quiet_peft() -> None:
    """Keep PEFT from warning of adapters that a model has already: one with a dict for them, it takes to have some."""
    warnings.filterwarnings("ignore", message=_PEFT_WARNS, category=UserWarning)


def _hear_peft() -> None:
    """Let PEFT warn again, which has by now: it asks for the dict, warns, and sets a config in it."""
    if _FALSE_ALARM in warnings.filters:
        warnings.filters.remove(_FALSE_ALARM)


class HasAdapters:
    """Mixin of a model whose `peft_config`, where PEFT looks for configs and which it deletes, is `Adapters` always."""

    @property
    def peft_config(self) -> Adapters:
        """Configs of adapters by their names."""
        if "octavo_adapters" not in vars(self):
            vars(self)["octavo_adapters"] = Adapters(self)
        found = vars(self)["octavo_adapters"]
        if not found:
            _quiet_peft()
        return found

    @peft_config.setter
    def peft_config(self, adapters: Any) -> None:
        vars(self)["octavo_adapters"] = adapters if isinstance(adapters, Adapters) else Adapters(self, adapters)

    @peft_config.deleter
    def peft_config(self) -> None:
        vars(self).pop("octavo_adapters", None)


def look_at_adapters(model: nn.Module) -> None:
    """Make a model of transformers one that `HasAdapters`, in place.

    Raises:
        OctavoError: it has one already that it does not bear; the model is as it was.
    """
    adapters = Adapters(model, getattr(model, "peft_config", None))
    if not isinstance(model, HasAdapters):
        vars(model).pop("peft_config", None)
        model.__class__ = _class_with_adapters(type(model))
    model.peft_config = adapters


@cache
def _class_with_adapters(model_class: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name beside one of transformers, which pickles name instead."""

    def reduce(model: nn.Module) -> tuple:
        return _empty_model, (model_class,), vars(model)

    members = {"__module__": model_class.__module__, "__reduce__": reduce}
    return type(model_class.__name__, (HasAdapters, model_class), members)


def _empty_model(model_class: type[nn.Module]) -> nn.Module:
    """For copies and pickles, which fill it."""
    found = _class_with_adapters(model_class)
    return found.__new__(found)


@cache
def _layer_in_codes() -> type[nn.Module]:
    """The class of PEFT's layer over a linear in codes."""

    class LoraInCodes(import_module("peft.tuners.lora").Linear):
        """A linear in codes, and beside it the products of adapters, in their own dtype."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(base_layer, adapter_name, *args, **kwargs)
            self.fan_in_fan_out = False

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            return features_of(module)

        def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
            """To the device of the codes alone: their dtype is none to compute in."""
            base = self.get_base_layer()
            holder = getattr(base, "embedding", base)
            device = next(holder.buffers()).device if device is None else device
            for part in (self.lora_A, self.lora_B):
                if adapter_name in part and not any(weight.is_meta for weight in part[adapter_name].parameters()):
                    part[adapter_name].to(device)

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise OctavoError(
                f"an adapter is not merged into linears in codes: leave it beside them, or {_MERGE_FIRST}"
            )

        def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
            check_adapter_shapes(
                prefix.removesuffix("."), self.get_base_layer(),
                {name: tuple(tensor.shape) for name, tensor in state_dict.items() if name.startswith(prefix)},
            )  # fmt: skip
            super()._load_from_state_dict(state_dict, prefix, *args)

    return LoraInCodes


def features_of(linear: nn.Module) -> tuple[int, int]:
    """Input and output channels K and N of a linear of any kind."""
    embedding = getattr(linear, "embedding", None)
    if embedding is not None:
        return embedding.embedding_dim, embedding.num_embeddings
    return linear.in_features, linear.out_features


def check_adapter_shapes(where: str, linear: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise an `OctavoError` unless A and B of an adapter, by their keys, fit the linear that they are for.

    Args:
        where: the linear's name, for the message.
    """
    fits = dict(zip("AB", features_of(linear), strict=True))
    for key, shape in shapes.items():
        found = _LORA_KEY.match(key)
        if found is None:
            continue
        part, side = found[2], -1 if found[2] == "A" else 0
        if shape[side] != fits[part]:
            raise OctavoError(
                f"{where}: lora_{part} of the adapter is {list(shape)}, and the linear has "
                f"{fits[part]} {'input' if part == 'A' else 'output'} channels; the adapter is of another model"
            )


def check_adapter_file(model: nn.Module, directory: Path) -> None:
    """Raise an `OctavoError` unless a model has linears for all that the file of an adapter changes, of such shapes.

    Args:
        directory: of the adapter; one without safetensors is left to PEFT.
    """
    file = directory / ADAPTER_WEIGHTS
    if not file.is_file():
        return
    modules = {name.replace(".base_layer", ""): module for name, module in model.named_modules()}
    for key, header in read_headers([file]).items():
        found = _LORA_KEY.match(key)
        name = found[1] if found is not None else key.removeprefix(_PEFT_PREFIX).rpartition(".")[0]
        linear = without_adapter(modules.get(name))
        if found is None:
            if isinstance(linear, (QuantizedLinear, TiedLinear)):
                raise OctavoError(f"{file}: {key} replaces what is in codes here; {_MERGE_FIRST}")
        elif linear is None and ".experts." not in key:  # whose names differ between versions of transformers
            raise OctavoError(f"{file}: changes {name}, which this model has not; the adapter is of another model")
        elif isinstance(linear, (nn.Linear, QuantizedLinear, TiedLinear)):
            check_adapter_shapes(f"{file}: {name}", linear, {key: header.shape})
