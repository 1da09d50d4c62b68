"""Steps of `generate` in which a model drops its cache, since all keys change: with LongRoPE, by the length.

What takes the place of a cache that is dropped is one of floats, or a new one of another size. A quantized one is
emptied instead, and takes all tokens anew.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import nn
from transformers import GenerationMixin

from .compatibility import CACHE_ARGUMENTS, cache_argument

_STEP = "prepare_inputs_for_generation"


def _keeping(prepare_inputs: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @wraps(prepare_inputs)  # `generate` reads the signature
    def prepared(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs, name = prepare_inputs(model, *args, **kwargs), cache_argument(model)
        given = next((kwargs[known] for known in CACHE_ARGUMENTS if kwargs.get(known) is not None), None)
        if hasattr(given, "scheme") and inputs.get(name) is None:
            given.reset()
            # all tokens: transformers 5.17 drops the cache and still takes the newest alone
            inputs = prepare_inputs(model, *args, **{**kwargs, name: None, "next_sequence_length": None})
            inputs[name] = given
        return inputs

    prepared.keeps_cache = True
    return prepared


def _drops_cache(model_class: type) -> bool:
    """Whether a model class has steps of its own, which may."""
    step = getattr(model_class, _STEP, None)
    return step is not None and step is not getattr(GenerationMixin, _STEP) and not hasattr(step, "keeps_cache")


def keep_cache(model_class: type) -> None:
    """Let `generate` of a model class keep the quantized cache that it is given, in place."""
    if _drops_cache(model_class):
        setattr(model_class, _STEP, _keeping(getattr(model_class, _STEP)))


@cache
def keeping_class(model_class: type[nn.Module]) -> type[nn.Module]:
    """Likewise a class of the same name beside a class of transformers; that class itself if it drops no cache."""
    if not _drops_cache(model_class):
        return model_class
    keeping = type(model_class.__name__, (model_class,), {"__module__": model_class.__module__})
    keep_cache(keeping)
    return keeping
