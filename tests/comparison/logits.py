"""Digests of what a model computes: a prompt, more tokens at once, and single ones, through one cache."""

import hashlib
from typing import Any

import torch

from ..support import CACHE_NAME, random_ids, with_cache

PARTS = {"prompt": 150, "chunk": 7, "first step": 1, "second step": 1, "third step": 1}
"""Tokens of each pass; the prompt is longer than every window that stays in float."""


def digest_of(tensor: torch.Tensor) -> str:
    """Of the bytes of a tensor."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@torch.inference_mode()
def logits_of(model: torch.nn.Module, cache: Any = None) -> dict[str, str]:
    """Digest of the logits of each pass.

    Args:
        model: in eval mode.
        cache: None for the model's own.
    """
    ids, found = random_ids(2, sum(PARTS.values())).split(list(PARTS.values()), dim=1), {}
    for name, part in zip(PARTS, ids, strict=True):
        output = model(part, use_cache=True, **({} if cache is None else with_cache(cache)))
        cache = getattr(output, CACHE_NAME)
        found[name] = digest_of(output.logits)
    return found


def _message(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}"}


def logits_or_error(make: Any) -> dict[str, str]:
    """Of the model, and cache if any, that `make()` returns; an exception is a result, too."""
    try:
        return logits_of(*make())
    except Exception as error:
        return _message(error)
