"""What differs between versions of transformers, in one place: the name by which a forward takes its cache.

transformers 5.24 renamed `past_key_values` to `cache` in every forward, attention layer, mask and output. The name is
read off the signature of what is called, so that neither a version number nor a guess decides it.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import __version__ as transformers_version

from ..errors import OctavoError, first_line
from .version import REFRESH, VERSION

TESTED_TRANSFORMERS = ("5.17.0", "5.24.0")
"""Oldest and newest version of transformers that the tests have run with."""
CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of the cache, in forwards and outputs; the newest first."""
OF_GENERATION = ("tokenizer", "assistant_tokenizer")
"""What `generate` is given for itself and hands on to forwards, which do not read it."""


def not_understood(what: str) -> OctavoError:
    """The error that says that this version of transformers does something else than those that are known."""
    oldest, newest = TESTED_TRANSFORMERS
    return OctavoError(
        f"transformers {transformers_version} is not understood: {what}; install one that was tested "
        f"(pip install 'transformers>={oldest},<={newest}'), or a newer Octavo than {VERSION}, whose code a converted "
        f"directory is given by {REFRESH} DIRECTORY"
    )


def parameter_names(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward as its class has it, without `self`, whatever wraps it."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def cache_argument(module: torch.nn.Module) -> str:
    """The name by which the forward of a model, decoder or decoder layer takes its cache: `cache`, or what it was.

    Raises:
        OctavoError: it takes none.
    """
    names = parameter_names(module)
    for name in CACHE_ARGUMENTS:
        if name in names:
            return name
    raise not_understood(f"{type(module).__name__}.forward takes no cache by a name that is known")


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of the arguments of a forward, under whichever name it is there; None if there is none.

    Raises:
        OctavoError: there are two.
    """
    given = [arguments.pop(name, None) for name in CACHE_ARGUMENTS]
    found = [cache for cache in given if cache is not None]
    if len(found) > 1:
        raise OctavoError("cache and past_key_values are both given, the new name and the old one: give one")
    return found[0] if found else None


def without_cache(output: Any, cache: Any) -> Any:
    """The output of a decoder, an object of transformers or a tuple, without the cache in it."""
    if isinstance(output, tuple):
        return tuple(part for part in output if part is not cache)
    return type(output)(**{name: part for name, part in output.items() if part is not cache})


def _is_custom() -> bool:
    return True


def keep_stored_names(decoder: torch.nn.Module) -> None:
    """Let transformers load and save a decoder's tensors under the names that its modules have.

    It merges the experts of a checkpoint into one tensor for its own classes, by the model type of every model that is
    not custom code; the decoder within one of ours is its own, with other modules.
    """
    decoder.is_custom_code = _is_custom


def check_stand_in(build: Callable[[], torch.nn.Module], layers: int, tokens: int) -> None:
    """Raise an `OctavoError` unless a forward of a tiny model leaves codes in the cache that it hands out.

    Args:
        build: makes the model, whose scheme quantizes k and v of `layers` layers.
        tokens: how many to give it.
    """
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            model = build().eval()
            output = model(torch.zeros((1, tokens), dtype=torch.long), use_cache=True)
        cache = next(output[name] for name in CACHE_ARGUMENTS if name in output.keys())  # noqa: SIM118, keys as they are
        stored = [layer.key_store.codes().codes for layer in cache.layers]
    except OctavoError as error:
        raise not_understood(first_line(error)) from error
    except Exception as error:
        raise not_understood(f"a tiny model fails with {type(error).__name__} ({first_line(error)})") from error
    is_coded = [codes.dtype == torch.int8 and codes.shape[2] == tokens for codes in stored]
    if len(is_coded) != layers or not all(is_coded):
        raise not_understood("a tiny model does not store its keys as codes")
