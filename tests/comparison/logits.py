"""Digests of what a model computes: a prompt, more tokens at once, and single ones, through one cache; an answer."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from ..support import CACHE_NAME, random_ids, with_cache

PARTS = {"prompt": 150, "chunk": 7, "first step": 1, "second step": 1, "third step": 1}
"""Tokens of each pass; the prompt is longer than every window that stays in float."""
DIGITS = 16
"""Of a digest that are kept, so that a line on a difference can be read."""
PADDING = 5
"""Tokens on the left of one row that are masked where an answer is generated."""

Model = tuple[torch.nn.Module, Callable[[], dict[str, Any]]]
"""A model in eval mode, and what makes the keyword argument of an empty cache; none for the model's own."""


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data + str(tuple(tensor.shape)).encode()).hexdigest()[:DIGITS]


@torch.inference_mode()
def _of_passes(model: torch.nn.Module, cache: dict[str, Any]) -> dict[str, str]:
    """Digest of the logits of each pass."""
    ids, found = random_ids(2, sum(PARTS.values())).split(list(PARTS.values()), dim=1), {}
    for name, part in zip(PARTS, ids, strict=True):
        output = model(part, use_cache=True, **cache)
        cache = with_cache(getattr(output, CACHE_NAME))
        found[name] = _digest(output.logits)
    return found


def _of_answer(model: torch.nn.Module, cache: dict[str, Any]) -> dict[str, str]:
    """Digest of the logits of greedy steps behind a prompt that is padded in one row."""
    ids = random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answer = model.generate(ids, attention_mask=mask, **settings, **cache)
    return {"answer": _digest(torch.stack(answer.logits))}


def _result(name: str, compute: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What is computed; an exception is a result, too."""
    try:
        return compute()
    except Exception as error:
        return {f"error of {name}": f"{type(error).__name__}: {error}"}


def logits_of(make: Callable[[], Model]) -> dict[str, str]:
    """Digests of what the model that `make()` loads computes."""

    def compute() -> dict[str, str]:
        model, cache = make()
        passes = _result("the passes", lambda: _of_passes(model, cache()))
        return passes | _result("the answer", lambda: _of_answer(model, cache()))

    return _result("the load", compute)
