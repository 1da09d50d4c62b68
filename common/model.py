"""What turns a causal language model of transformers into one that loads and runs a quantized checkpoint."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import cached_file

from ..ops.library import NAMESPACE
from .cache import QuantizedCache
from .checkpoints.ascend import (
    DESCRIPTION_FILE,
    check_description,
    described_scheme,
    linear_layout,
    quantized_linears,
    read_headers,
    read_json,
    weight_file_names,
)
from .checkpoints.buffers import attach_buffers, read_scales
from .errors import OctavoError
from .folds import fold_biases
from .linear import QuantizedLinear
from .scheme import CROP_ROOM, Scheme, load_scheme

CONFIG_KEY = "octavo"
NATIVE_LOAD_HINT = "needs-trust_remote_code=True.safetensors"
"""Name of the weight file in config.json. There is none of that name, so that a load by transformers' own class, which
would take codes for weights, fails with an error that says what is missing. `from_pretrained` puts in the real one."""
FREE_FIELDS = ("name", "origin", "prefill")
"""Fields of a scheme that say nothing of what is stored, so that they may be edited in config.json."""
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_STATIC_CACHES = ("static", "offloaded_static")
_GROWING_CACHES = (None, "dynamic", "offloaded")


def _weight_files(index: Path, find: Any) -> list[Path]:
    """The files that an index lists, each found (or fetched) by `find(name)`."""
    data = read_json(index)
    weight_map = data.get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) and "metadata" in data else {None}
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise OctavoError(f"{index}: maps no tensors to files of this directory; copy it again or convert again")
    files = {name: find(name) for name in sorted(names)}
    for name, file in files.items():
        if file is None:
            raise OctavoError(f"{index}: lists {name}, which is missing; copy the directory again or convert again")
    return list(files.values())


def _agreed_scheme(source: str, config: Any, description: dict[str, Any]) -> Scheme:
    """The scheme that config.json names, if it does, which must be the one that the description tells of."""
    own = getattr(config, CONFIG_KEY, None)
    if own is not None and not (isinstance(own, dict) and "scheme" in own):
        raise OctavoError(f"{source}: {CONFIG_KEY!r} in config.json names no scheme; copy it again or convert again")
    described = described_scheme(description, config.num_hidden_layers)
    scheme = load_scheme(own["scheme"]) if own else described or load_scheme("float")
    stored = described or (load_scheme("float") if scheme.is_static else scheme)
    for part in dataclasses.fields(Scheme):
        if part.name not in FREE_FIELDS and getattr(scheme, part.name) != getattr(stored, part.name):
            raise OctavoError(f"{source}: config.json and {DESCRIPTION_FILE} disagree on {part.name}; convert again")
    return scheme


def describe_checkpoint(config: Any, source: str, tied: Iterable[str], hub_arguments: dict[str, Any]) -> None:
    """Set on `config` what the quantized checkpoint at `source` needs; leave it alone if `source` is an ordinary one.

    Args:
        config: gets `octavo`: the scheme and the layout of the quantized linears (see `linear_layout`); and
            `transformers_weights`, the name of the weight file, which keeps a load without this code from succeeding.
        source: local directory or hub id.
        tied: names of weights that are stored once, under another name, if the config ties embeddings.
        hub_arguments: `revision`, `cache_dir` and the like.

    Raises:
        OctavoError: files are missing or damaged, or description and weights disagree.
    """

    def find(name: str) -> Path | None:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        return None if found is None else Path(found)

    description_file = find(DESCRIPTION_FILE)
    if description_file is None:
        if CONFIG_KEY in vars(config) and "auto_map" in vars(config):
            raise OctavoError(f"{source}: {DESCRIPTION_FILE} is missing; copy the directory again or convert again")
        return
    description = read_json(description_file)
    single, index = weight_file_names(description)
    single_file, index_file = find(single), find(index)
    if single_file is None and index_file is None:
        raise OctavoError(f"{source}: neither {single} nor {index} is there; copy the directory again or convert again")
    files = [single_file] if single_file is not None else _weight_files(index_file, find)
    headers = read_headers(files)
    check_description(description, headers, tied if config.tie_word_embeddings else ())
    config.octavo = {
        "scheme": _agreed_scheme(source, config, description).to_dict(),
        **linear_layout(quantized_linears(description), headers),
    }
    config.transformers_weights = single if single_file is not None else index


def _new_cache(decoder: torch.nn.Module, **arguments: Any) -> QuantizedCache:
    scheme = decoder.octavo_scheme
    return QuantizedCache(decoder.config, scheme, scales=read_scales(decoder, scheme), **arguments)


def _provide_cache(decoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Every pass reads codes: give one without a cache a new one, and refuse what cannot read or store codes."""
    if decoder.config._attn_implementation != NAMESPACE:
        raise OctavoError(
            f"attn_implementation {decoder.config._attn_implementation!r} cannot read a quantized cache; "
            f"call set_attn_implementation({NAMESPACE!r})"
        )
    cache = kwargs.get("past_key_values")
    if cache is None:
        kwargs["past_key_values"] = _new_cache(decoder)
    elif not hasattr(cache, "scheme"):
        raise OctavoError(f"past_key_values is a {type(cache).__name__}; pass model.new_cache() or leave it out")
    return args, kwargs


def _withdraw_cache(decoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Do not hand out a cache that the caller said it does not want."""
    if kwargs.get("use_cache") is False and hasattr(output, "past_key_values"):
        output.past_key_values = None
    return output


def _check_loaded(source: str, model: torch.nn.Module) -> None:
    """Raise an `OctavoError` that names the first scale that is no positive number, or norm that is not finite."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.check(f"{source}: {name}")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not parameter.is_meta and not torch.isfinite(parameter).all():
            raise OctavoError(f"{source}: {name} holds NaN or Inf; copy the directory again or convert again")


class QuantizedCausalLM:
    """Mixin placed before a `...ForCausalLM` of transformers.

    What is quantized stands in `config.octavo`: `scheme` (name of a preset or its fields), and, set by
    `from_pretrained`, the layout of the quantized linears. Without that key the model is the float one.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config._attn_implementation not in (None, NAMESPACE):
            raise OctavoError(
                f"attn_implementation={config._attn_implementation!r} cannot read a quantized cache; leave it out"
            )
        config._attn_implementation = NAMESPACE
        super().__init__(config, *args, **kwargs)
        recipe = getattr(config, CONFIG_KEY, None) or {}
        self.scheme: Scheme = load_scheme(recipe.get("scheme", "float"))
        attach_buffers(self, self.scheme, recipe)
        if self.scheme.is_quantized:
            fold_biases(self, self.scheme)
        self.base_model.octavo_scheme = self.scheme
        self.base_model.register_forward_pre_hook(_provide_cache, with_kwargs=True)
        self.base_model.register_forward_hook(_withdraw_cache, with_kwargs=True)

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers, from a quantized directory or hub id, or from an ordinary checkpoint.

        Raises:
            OctavoError: the directory is incomplete, damaged, or not one whole.
        """
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        if config is None or isinstance(config, (str, Path)):
            config = AutoConfig.from_pretrained(source if config is None else config, **hub_arguments)
        if not isinstance(config, cls.config_class):
            raise OctavoError(f"{source}: model_type is {config.model_type!r}, not {cls.config_class.model_type!r}")
        describe_checkpoint(config, str(source), cls._tied_weights_keys or (), hub_arguments)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        model, info = super().from_pretrained(source, *args, config=config, output_loading_info=True, **kwargs)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                first = sorted(map(str, info[problem]))[0]
                raise OctavoError(f"{source}: {problem.replace('_', ' ')}: {first}; config and weights disagree")
        _check_loaded(str(source), model)
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers for a float model; a quantized one is its directory, which can be copied."""
        if self.scheme != load_scheme("float") or getattr(self.config, CONFIG_KEY, {}).get("quantized_linears"):
            raise OctavoError(f"save_pretrained: copy the directory that was loaded instead ({self.name_or_path})")
        super().save_pretrained(*args, **kwargs)

    def new_cache(
        self,
        max_length: int | None = None,
        offloading: bool = False,
        compileable: bool = False,
        crop_room: int = CROP_ROOM,
    ) -> QuantizedCache:
        """An empty cache with this model's scheme and scales; arguments as in `QuantizedCache`."""
        return _new_cache(
            self.base_model,
            max_length=max_length,
            offloading=offloading,
            compileable=compileable,
            crop_room=crop_room,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_length: int
    ) -> None:
        """`generate` uses the quantized cache by default; `cache_implementation` chooses its storage."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_length)
        kind = generation_config.cache_implementation
        if kind not in _STATIC_CACHES + _GROWING_CACHES:
            raise OctavoError(f"cache_implementation={kind!r}: this model's cache is quantized already; leave it out")
        length = max(max_length, generation_config.max_cache_len or 0) if kind in _STATIC_CACHES else None
        offloading = bool(kind) and "offloaded" in kind
        # generate compiles the steps over such a cache where that pays, which transformers says is on CUDA
        compileable = kind == "static" and self.device.type == "cuda" and self.scheme.is_compileable
        model_kwargs["past_key_values"] = self.new_cache(length, offloading, compileable)
        return None
