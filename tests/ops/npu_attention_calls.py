"""Calls of attention on an NPU, over storage with room behind the valid tokens, as the cache hands it out."""

from typing import Any

import torch

from octavo.ops import attention
from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.reference import attention_reference

from ..tolerances import TOLERANCES
from .npu_double import on_npu

FLOATS = (torch.float16, torch.bfloat16)
BATCH, HEADS, GROUPS, WIDTH = 2, 6, 3, 32
NAMES = ("query", "key", "value", "key_scale", "key_zero", "value_scale", "value_zero", "query_scale", "mask")


def problem(granularity: str | None, affine: bool, dtype: torch.dtype, tokens: int, capacity: int) -> dict[str, Any]:
    """Arguments of a decode step whose K and V are views of storage with garbage behind the valid tokens."""
    generator = torch.Generator().manual_seed(tokens)

    def part(code_range: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if granularity is None:
            storage = torch.full((BATCH, GROUPS, capacity, WIDTH), float("nan"), dtype=dtype)
            storage[:, :, :tokens] = torch.randn((BATCH, GROUPS, tokens, WIDTH), generator=generator).to(dtype)
            return storage[:, :, :tokens], None, None
        storage = torch.randint(-code_range, code_range, (BATCH, GROUPS, capacity, WIDTH), generator=generator)
        shape = {"channel": (GROUPS, 1, WIDTH), "head": (GROUPS, 1, 1), "token": (BATCH, GROUPS, capacity, 1)}
        scale = torch.rand(shape[granularity], generator=generator) * 0.02 + 0.005
        zero = torch.randint(-60, 60, scale.shape, generator=generator).float() if affine else None
        if granularity == "token":
            scale[:, :, tokens:] = float("nan")
            scale, zero = scale[:, :, :tokens], None if zero is None else zero[:, :, :tokens]
        return storage.to(torch.int8)[:, :, :tokens], scale, zero

    (key, key_scale, key_zero), (value, value_scale, value_zero) = part(120), part(120)
    query = torch.randn((BATCH, HEADS, 1, WIDTH), generator=generator).to(dtype)
    values = (query, key, value, key_scale, key_zero, value_scale, value_zero, None, None)
    return {**dict(zip(NAMES, values, strict=True)), "scaling": WIDTH**-0.5, "causal": True}


def int8_problem(dtype: torch.dtype, tokens: int, capacity: int) -> dict[str, Any]:
    scale = torch.rand((HEADS, 1, 1), generator=torch.Generator().manual_seed(3)) * 0.01 + 0.015
    return {**problem("head", False, dtype, tokens, capacity), "query_scale": scale}


def both(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the NPU kernel and the reference make of the same arguments."""
    return on_npu(attention, **arguments), attention_reference(ATTENTION_CALL.of(**arguments))


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES[f"npu rmse {str(dtype)[6:]}"]


def with_queries(arguments: dict[str, Any], queries: int) -> dict[str, Any]:
    """The same K and V for several queries, in the layout of a model."""
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn((BATCH, queries, HEADS, WIDTH), generator=generator).to(arguments["query"].dtype)
    return {**arguments, "query": query.transpose(1, 2)}


def with_room(arguments: dict[str, Any], capacity: int) -> dict[str, Any]:
    """What a call over a whole storage with a `length` gets: K and V, and scales per token, with all their room."""
    whole = dict(arguments)
    for name, part in arguments.items():
        if isinstance(part, torch.Tensor) and name.startswith(("key", "value")) and part.dim() == 4:
            whole[name] = part.as_strided((*part.shape[:2], capacity, part.shape[3]), part.stride())
    return whole


def padding_mask(queries: int, tokens: int) -> torch.Tensor:
    """Causal, and the second sequence begins with 3 tokens of padding, which see nothing."""
    mask = torch.ones((BATCH, 1, queries, tokens), dtype=torch.bool).tril(tokens - queries)
    mask[1, ..., :3] = False
    return mask
