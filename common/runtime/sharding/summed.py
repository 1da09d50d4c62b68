"""The modules of a rank's model whose outputs are summed over all ranks, and those that need to know others' inputs."""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..decoder import decoder_layers, stated_decoder
from ..gradients import refuse_gradient
from .ranks import Ranks


def _wrap(module: nn.Module, run: Callable[..., torch.Tensor], *before: Any) -> None:
    """Put `run(*before, forward, ...)` in the place of a module's forward.

    Not a hook, since somebody who looks at what goes through a module would keep a long pass from being taken in
    chunks. A module with a forward of its own keeps the layers from being run in one call, which sums nothing.
    """
    module.forward = update_wrapper(partial(run, *before, module.forward), module.forward)


def _summed(ranks: Ranks, forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    part = forward(*args, **kwargs)
    total = ranks.sum(part)
    if torch.is_grad_enabled() and part.requires_grad:
        total = refuse_gradient(total, part, "a model that is shared among ranks")
    return total


def _with_largest(
    ranks: Ranks, extra: int, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """Run a linear on `[..., K]` and `extra` channels more, of weight 0: the token's largest |x| on any rank, and 0."""
    largest = ranks.largest(x.abs().amax(dim=-1, keepdim=True))
    return forward(torch.cat((x, functional.pad(largest, (0, extra - 1))), dim=-1))


def _refuse_other_tokens(ranks: Ranks, names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: Any) -> None:
    ids = {**dict(zip(names, args, strict=False)), **kwargs}.get("input_ids")
    if ids is not None:
        ranks.check_same(ids)


def sum_over_ranks(model: nn.Module, ranks: Ranks, extra_inputs: dict[str, int]) -> None:
    """Let a rank's model, which is stated, sum what it computes with those of the other ranks, in place.

    Args:
        extra_inputs: see `Shares.extra_inputs`.
    """
    decoder, config = stated_decoder(model), model.base_model.config
    for name, extra in extra_inputs.items():
        _wrap(model.get_submodule(name), _with_largest, ranks, extra)
    for index, (_, layer) in enumerate(decoder_layers(model)):
        experts = decoder.experts_in(config, index)
        for name in (decoder.attention.output, decoder.experts.name if experts else decoder.mlp.down):
            _wrap(layer.get_submodule(name), _summed, ranks)
    names = model.base_model.octavo_parameters
    model.base_model.register_forward_pre_hook(partial(_refuse_other_tokens, ranks, names), with_kwargs=True)
