"""Which dtype a pass keeps floats in, and arithmetic that autocast leaves alone."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tokens of a pass in `dtype` are kept in where they stay in float: 16 bits in place of float32."""
    return torch.float16 if dtype == torch.float32 else dtype


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function(owner, states, ...)`, whose ops compute in the dtypes of their operands, whatever autocast says."""

    @wraps(function)
    def run(owner: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
        kind = states.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):  # which does not know such tensors
            return function(owner, states, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(owner, states, *args, **kwargs)

    return run
