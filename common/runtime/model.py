"""What turns a causal language model of transformers into one that loads and runs a quantized checkpoint."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...ops.shared.registry import NAMESPACE
from ..errors import OctavoError, first_line
from .adapters import ADAPTER_WEIGHTS, HasAdapters, check_adapter_file
from .attention import register_attention
from .bias_fold import fold_biases
from .cache.quantized_cache import QuantizedCache
from .cache.sizes import kept_kv_bytes
from .checkpoint.buffers import attach_buffers, read_scales
from .checkpoint.files import TensorHeader
from .checkpoint.loading import CONFIG_KEY, check_shapes, describe_checkpoint, finder, read_config
from .checkpoint.values import check_values
from .compatibility import (
    cache_argument,
    check_stand_in,
    keep_stored_names,
    parameter_names,
    take_cache,
    without_cache,
)
from .decoder import Decoder, attention_modules, list_experts, state_decoder, stated_decoder
from .fused_decoder import IS_ZOO
from .generation_step import keep_cache
from .offload import check_device_map, check_tied, in_memory
from .passes import chunk_passes
from .quantized_embedding import QuantizedEmbedding
from .quantized_linear import QuantizedLinear
from .schemes.kv_scheme import CROP_ROOM, Scheme, load_scheme
from .sharding.load import Shared, shared_checkpoint, shared_state
from .sharding.ranks import ranks_asked_for
from .sharding.summed import sum_over_ranks

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
ASSISTED_ROOM = 256
"""Tokens that a cache can forget again where `generate` verifies candidates, whose number some assistants raise."""
_STATIC_CACHES = ("static", "offloaded_static")
_GROWING_CACHES = (None, "dynamic", "offloaded")
_NO_PAGES = (
    "continuous batching keeps pages of float keys and values, and this model's cache is quantized; call generate with "
    "a batch that is padded at the left"
)


def _new_cache(decoder: torch.nn.Module, **arguments: Any) -> QuantizedCache:
    scheme, attentions = decoder.octavo_scheme, attention_modules(decoder)
    with in_memory(part for _, attention in attentions for part in attention.modules()):
        scales = read_scales(attentions, scheme, stated_decoder(decoder))
    return QuantizedCache(decoder.config, scheme, scales=scales, **arguments)


def _starts_anew(arguments: dict[str, Any]) -> bool:
    """Whether positions say that several sequences lie behind one another, as transformers finds it out.

    It does so in passes without a cache and without a mask, which those that are given one of ours are no longer.
    """
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None or torch.compiler.is_compiling():
        return False
    return bool((positions.diff(dim=-1) != 1).any())


def _provide_cache(decoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Every pass reads codes: give one without a cache a new one, and refuse what cannot read or store codes."""
    if decoder.config._attn_implementation != NAMESPACE:
        raise OctavoError(
            f"attn_implementation {decoder.config._attn_implementation!r} cannot read a quantized cache; "
            f"call set_attn_implementation({NAMESPACE!r})"
        )
    name = decoder.octavo_cache_argument
    arguments = {**dict(zip(decoder.octavo_parameters, args, strict=False)), **kwargs}
    cache = take_cache(arguments)
    if cache is None:
        if _starts_anew(arguments):
            raise OctavoError(
                "position_ids do not follow one another within a row, as of packed sequences, which a quantized cache "
                "does not keep apart: give the sequences as rows of a batch, padded, with attention_mask"
            )
        cache = _new_cache(decoder)
    elif not hasattr(cache, "scheme"):
        raise OctavoError(f"{name} is a {type(cache).__name__}; pass model.new_cache() or leave it out")
    elif len(cache.layers) != decoder.config.num_hidden_layers:
        layers = decoder.config.num_hidden_layers
        raise OctavoError(f"{name} is of {len(cache.layers)} layers, and this model has {layers}: another model's?")
    else:
        cache.check_share(name, decoder.config)
    return (), {**arguments, name: cache}


def _withdraw_cache(decoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Do not hand out a cache that the caller said it does not want."""
    is_unwanted = kwargs.get("use_cache") is False
    return without_cache(output, kwargs[decoder.octavo_cache_argument]) if is_unwanted else output


@lru_cache
def check_transformers(model_class: type) -> None:
    """Raise an `OctavoError` unless this transformers hands the decoder of a model the cache that stores codes.

    A model of random weights, as small as they come, makes one pass; it is known then for the life of the process.
    """
    layers, tokens = 1, 3
    config = model_class.config_class(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=None,
    )
    config.octavo = {"scheme": "int8-token"}
    check_stand_in(lambda: model_class(config), layers, tokens)


class QuantizedCausalLM(HasAdapters):
    """Mixin placed before a `...ForCausalLM` of transformers.

    Attributes:
        octavo_decoder: the anatomy, which each class states.

    What is quantized stands in `config.octavo`: `scheme` (name of a preset or its fields), and, set by
    `from_pretrained`, the layout of the quantized linears. Without that key the model is the float one.

    Args:
        config: of the model.
        stored: headers by name of the tensors that will be loaded, whose shapes are checked before any is allocated.
        shared: the part of them that is loaded, if this process is one of several that share the model; the config
            says what it holds.

    Raises:
        OctavoError: no model can be built of the config, or its shapes are not those of `stored`.
    """

    octavo_decoder: Decoder

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        keep_cache(cls)

    octavo_shared: Shared | None = None

    def __init__(
        self,
        config: Any,
        *args: Any,
        stored: Mapping[str, TensorHeader] | None = None,
        shared: Shared | None = None,
        **kwargs: Any,
    ) -> None:
        if config._attn_implementation not in (None, NAMESPACE):
            raise OctavoError(
                f"attn_implementation={config._attn_implementation!r} cannot read a quantized cache; leave it out"
            )
        register_attention()
        config._attn_implementation = NAMESPACE
        try:
            super().__init__(config, *args, **kwargs)
        except (OctavoError, ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a damaged config can make transformers raise anything
            raise OctavoError(
                f"{config.name_or_path or 'config'}: no model is of this config ({first_line(error)})"
            ) from error
        recipe = getattr(config, CONFIG_KEY, None) or {}
        state_decoder(self, self.octavo_decoder)
        if self.octavo_decoder.experts is not None:
            list_experts(self)
            keep_stored_names(self.base_model)
        self.scheme: Scheme = load_scheme(recipe.get("scheme", "float")).of_model(config.num_hidden_layers)
        if self.scheme.sharp_share:
            raise OctavoError(f"config.json: octavo.scheme {self.scheme.name} does not say which layers are sharp")
        attach_buffers(self, self.scheme, recipe)
        if self.scheme.is_quantized:
            fold_biases(self, self.scheme, ranks=None if shared is None else shared.ranks)
        check_shapes(config.name_or_path, self, stored or {})
        decoder = self.base_model
        decoder.octavo_scheme = self.scheme
        decoder.octavo_parameters, decoder.octavo_cache_argument = parameter_names(decoder), cache_argument(decoder)
        decoder.register_forward_pre_hook(_provide_cache, with_kwargs=True)
        decoder.register_forward_hook(_withdraw_cache, with_kwargs=True)
        setattr(decoder, IS_ZOO, True)
        chunk_passes(decoder)
        if shared is not None:
            self.octavo_shared = shared
            sum_over_ranks(self, shared.ranks, shared.extra_inputs)

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers, from a quantized directory or hub id, or from an ordinary checkpoint.

        With `tp_plan="auto"`, or a `distributed_config` that says it, in processes that torchrun started: each loads
        its share of the model (`shares.py`), and `config` is that of the share.

        Raises:
            OctavoError: the directory is incomplete, damaged, or not one whole; it cannot be shared among the ranks.
        """
        ranks = ranks_asked_for(kwargs)
        check_device_map(kwargs.get("device_map"))
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        if config is None or isinstance(config, (str, Path)):
            config = read_config(str(source if config is None else config), hub_arguments)
        if not isinstance(config, cls.config_class):
            raise OctavoError(f"{source}: model_type is {config.model_type!r}, not {cls.config_class.model_type!r}")
        stored = describe_checkpoint(config, str(source), cls._tied_weights_keys or (), hub_arguments)
        check_transformers(cls)
        shared = None
        if ranks is not None:
            config, shared = shared_checkpoint(ranks, cls, config, str(source), stored)
            stored, kwargs["shared"] = shared.headers, shared
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        model, info = super().from_pretrained(
            source, *args, config=config, output_loading_info=True, stored=stored, **kwargs
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                first = sorted(map(str, info[problem]))[0]
                raise OctavoError(f"{source}: {problem.replace('_', ' ')}: {first}; config and weights disagree")
        check_tied(model)
        check_values(str(source), model, model.scheme)
        if shared is not None and model.device != ranks.device:
            model.to(ranks.device)
        return (model, info) if wants_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; a rank reads the parts that are its own."""
        if model.octavo_shared is not None:
            state_dict = shared_state(model.octavo_shared, checkpoint_files)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers for a float model; a quantized one is its directory, which can be copied."""
        if self.octavo_shared is not None:
            raise OctavoError(
                "save_pretrained: this model is one rank's share; save one that is loaded without tp_plan"
            )
        if self.scheme != load_scheme("float") or getattr(self.config, CONFIG_KEY, {}).get("quantized_linears"):
            raise OctavoError(f"save_pretrained: copy the directory that was loaded instead ({self.name_or_path})")
        super().save_pretrained(*args, **kwargs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As of the float model: a code of a quantized linear counts as the weight it stands for, however it is packed.

        Codes are not trainable, so that `only_trainable` leaves them out.
        """
        count = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        linears = [
            module
            for module in self.modules()
            if isinstance(module, QuantizedLinear)
            and not (exclude_embeddings and isinstance(module, QuantizedEmbedding))
        ]
        biases = sum(linear.out_features for linear in linears if linear.bias is not None)
        return count + biases + sum(linear.in_features * linear.out_features for linear in linears)

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

    def kept_kv_bytes(self, tokens: int) -> int:
        """Bytes of what this model's cache needs of so many tokens, as `kept_kv_bytes` of `sizes.py` counts them."""
        return kept_kv_bytes(self.config, self.scheme, tokens, self.dtype.itemsize)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_length: int
    ) -> None:
        """`generate` uses the quantized cache by default; `cache_implementation` chooses its storage."""
        name = cache_argument(self)
        if model_kwargs.get(name) is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_length)
        kind = generation_config.cache_implementation
        if kind not in _STATIC_CACHES + _GROWING_CACHES:
            raise OctavoError(f"cache_implementation={kind!r}: this model's cache is quantized already; leave it out")
        length = max(max_length, generation_config.max_cache_len or 0) if kind in _STATIC_CACHES else None
        offloading = bool(kind) and "offloaded" in kind
        # generate compiles the steps over such a cache where that pays, which transformers says is on CUDA; which
        # experts a step takes is not known when it is compiled
        is_steady = self.scheme.is_compileable and self.octavo_decoder.experts is None
        compileable = kind == "static" and self.device.type == "cuda" and is_steady
        room = CROP_ROOM
        if getattr(mode, "value", mode) == "assisted_generation":
            self._check_assisted()
            given = (generation_config.prompt_lookup_num_tokens, generation_config.num_assistant_tokens)
            room = max(ASSISTED_ROOM, *(number or 0 for number in given))
        model_kwargs[name] = self.new_cache(length, offloading, compileable, room)
        return None

    def _check_assisted(self) -> None:
        """Raise an `OctavoError` if the first pass, the prompt and candidates in one, decides what later ones read."""
        for field, is_set in (
            ("prefill 'float'", self.scheme.prefill == "float"),
            ("smooth_key", self.scheme.smooth_key),
        ):
            if is_set:
                raise OctavoError(
                    f"scheme {self.scheme.name}: speculative decoding with {field} would not give what plain decoding "
                    "does; leave out the assistant and prompt lookup, or convert with another scheme"
                )

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """As in transformers, of an adapter that is not to be trained.

        Raises:
            OctavoError: linears in codes do not bear it.
        """
        self.peft_config.admit(adapter_config)
        super().add_adapter(adapter_config, adapter_name)

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            OctavoError: linears in codes do not bear the adapter, or it is of another model.
        """
        if peft_model_id is not None:
            given = {**(getattr(kwargs.get("load_config"), "download_kwargs", None) or {}), **kwargs}
            given |= kwargs.get("adapter_kwargs") or {}
            hub_arguments = {name: given[name] for name in _HUB_ARGUMENTS if name in given}
            file = finder(str(peft_model_id), hub_arguments)(ADAPTER_WEIGHTS)
            if file is not None:
                check_adapter_file(self, file.parent)
        return super().load_adapter(peft_model_id, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not served: raises an `OctavoError` that says what to do instead."""
        raise OctavoError(_NO_PAGES)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not served, as `generate_batch`."""
        raise OctavoError(_NO_PAGES)
