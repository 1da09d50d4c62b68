"""Passes of many tokens, taken in chunks: the logits of one pass, for the memory of one chunk's activations.

Every query reads what the cache stores, its own tokens included, so that a chunk sees what it would see in the whole.
A pass that is more than that goes whole: `_goes_whole` says when.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn

from .compatibility import CACHE_ARGUMENTS, OF_GENERATION, parameter_names
from .decoder_step import fused_pass
from .rotary import changes_with_length

CHUNK = 512
"""Tokens of a chunk, over all sequences of a batch."""
SHORTEST_CHUNK = 64
"""Tokens of a chunk in each sequence of a batch, at least: each chunk reads all weights."""
_SLICED = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "attention_mask")
_PLAIN = (*CACHE_ARGUMENTS, "use_cache", "return_dict", *OF_GENERATION)
_COLLECTED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What outputs hold of every layer, where arguments or the config say so."""
_WHOLE = "octavo_whole_passes"
"""Attribute of a decoder within `whole_passes`."""


def chunk_passes(base: nn.Module) -> None:
    """Let a decoder, the `base_model` of a model whose attention reads codes, take long passes in chunks.

    Its forward is wrapped in place, as accelerate wraps it, so that copies of the model have copies of their own.
    """
    if getattr(base.forward, "func", None) is not run_pass:
        bound = partial(run_pass, base, base.forward, parameter_names(base))
        base.forward = update_wrapper(bound, base.forward)


@contextmanager
def whole_passes(base: nn.Module) -> Iterator[None]:
    """Within it, a decoder takes passes whole and module by module: where stand-ins for its layers are to see them."""
    had_none = not getattr(base, _WHOLE, False)
    setattr(base, _WHOLE, True)
    try:
        yield
    finally:
        if had_none:
            delattr(base, _WHOLE)


def run_pass(base: nn.Module, forward: Callable[..., Any], names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
    """A pass of a decoder, in chunks where it is long.

    Args:
        base: the decoder.
        forward: as it was before it was wrapped.
        names: of its parameters.
        args, kwargs: of the pass.

    Returns:
        what `forward` returns: the last hidden states `[B, S, hidden]` and the cache.
    """
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    size = chunk_size(base, arguments)
    if not size:
        return one_pass(base, forward, arguments)
    is_tuple = arguments.pop("return_dict", getattr(base.config, "return_dict", True)) is False
    output = _in_chunks(base, forward, arguments, size)
    return output.to_tuple() if is_tuple else output


def one_pass(base: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """A pass, or a chunk of one: all layers in one call where that is served, or else module by module."""
    is_seen = torch.compiler.is_compiling() or hasattr(base, _WHOLE)  # somebody looks at the modules
    output = None if is_seen else fused_pass(base, arguments)
    return forward(**arguments) if output is None else output


def _in_chunks(base: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any], size: int) -> Any:
    """The output of a pass whose chunks have `size` tokens each."""
    states, start, cache = None, 0, _cache_of(arguments)
    cache.expect(int(cache.get_seq_length()) + _new_tokens(arguments))  # storage that grows leaves holes behind
    for chunk in _chunks(arguments, size):
        output = one_pass(base, forward, chunk)
        part = output.last_hidden_state
        if states is None:  # not torch.cat at the end, which holds all parts twice
            states = part.new_empty((part.shape[0], _new_tokens(arguments), part.shape[2]))
        states[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    output.last_hidden_state = states
    return output


def _given(arguments: dict[str, Any]) -> torch.Tensor | None:
    """Token ids `[B, S]` or embeddings `[B, S, hidden]`."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def _cache_of(arguments: dict[str, Any]) -> Any:
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def _new_tokens(arguments: dict[str, Any]) -> int:
    return _given(arguments).shape[1]


def _chunks(arguments: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """The arguments of each chunk."""
    tokens, past = _new_tokens(arguments), int(_cache_of(arguments).get_seq_length())
    for start in range(0, tokens, size):
        stop = min(tokens, start + size)
        chunk = dict(arguments)
        for name in _SLICED:
            value = arguments.get(name)
            if value is None:
                continue
            if name == "attention_mask":
                chunk[name] = value[:, : past + stop]
            elif name == "inputs_embeds":
                chunk[name] = value[:, start:stop]
            else:
                chunk[name] = value[..., start:stop]
        yield chunk


def tokens_of_chunk(batch: int) -> int:
    """Tokens of a chunk in each sequence of a batch."""
    return max(SHORTEST_CHUNK, CHUNK // max(1, batch) // SHORTEST_CHUNK * SHORTEST_CHUNK)


def chunk_size(base: nn.Module, arguments: dict[str, Any]) -> int:
    """Tokens of a chunk of a pass in each sequence; 0 where it goes whole."""
    given = _given(arguments)
    if not isinstance(given, torch.Tensor) or given.dim() < 2 or given.shape[1] <= SHORTEST_CHUNK:
        return 0
    size = tokens_of_chunk(given.shape[0])
    return 0 if given.shape[1] <= size or _goes_whole(base, arguments, given.shape[1]) else size


def _goes_whole(base: nn.Module, arguments: dict[str, Any], tokens: int) -> bool:
    """Whether chunks would not give what one pass does, or somebody looks at what is inside of it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or base.training or hasattr(base, _WHOLE):
        return True
    cache = _cache_of(arguments)
    if not hasattr(cache, "expect"):
        return True
    is_first_decisive = cache.scheme.prefill == "float" or cache.scheme.smooth_key
    past = int(cache.get_seq_length())
    if is_first_decisive and not past:
        return True
    return (
        _has_others(base, arguments, tokens)
        or changes_with_length(base.config.get_text_config(decoder=True), past + tokens)
        or _is_hooked(base)
    )


def _has_others(base: nn.Module, arguments: dict[str, Any], tokens: int) -> bool:
    """Whether a pass is given, or asked for, more than tokens by position behind a cache."""
    for name, value in arguments.items():
        if value is None or name in _PLAIN:
            continue
        if name in _SLICED:
            is_mask = name == "attention_mask"
            at = 1 if name == "inputs_embeds" else -1
            if not isinstance(value, torch.Tensor) or (value.dim() != 2 if is_mask else value.shape[at] != tokens):
                return True
        elif value is not False:
            return True
    config = base.config
    asked = (arguments.get(name, getattr(config, name, False)) for name in _COLLECTED)
    return any(value not in (None, False) for value in asked) or bool(getattr(config, "is_encoder_decoder", False))


def _is_hooked(base: nn.Module) -> bool:
    """Whether somebody is called with what goes into a module of the decoder or comes out of it."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in base.modules() if module is not base)
