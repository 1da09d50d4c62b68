"""Random calls of attention as the CUDA kernels get them, and how near to the reference they come."""

from typing import Any

import torch

from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.cuda import attention_cuda, attention_lse_cuda
from octavo.ops.attention.reference import attention_lse_reference, attention_reference
from octavo.ops.shared.codes import to_codes

from ..metrics import relative_rmse
from ..tolerances import TOLERANCES
from .cuda_double import interpreted

BATCH, GROUPS = 2, 2
CODES = {
    "int8": (torch.int8, 40.0),
    "int4": (torch.uint8, 3.0),
    "e4m3": (torch.float8_e4m3fn, 100.0),
    "e5m2": (torch.float8_e5m2, 100.0),
}
"""By kind: dtype, and the codes of a value of 1."""


def storage(kind: str, capacity: int, width: int, query: torch.dtype) -> torch.Tensor:
    """Random codes `[B, G, capacity, D]` of a kind, or float values of the query's dtype or in float32."""
    values = torch.randn(BATCH, capacity, GROUPS, width).transpose(1, 2)
    if kind in CODES:
        return to_codes(values * CODES[kind][1], CODES[kind][0], width)
    return values.to(query if kind == "own" else torch.float32)


def part(form: str, capacity: int, width: int, factor: float, is_zero: bool, token_group: int) -> torch.Tensor | None:
    """A random scale, or zero, of a form."""
    rows = -(-capacity // token_group)
    shapes = {
        "none": None,
        "head": (GROUPS, 1, 1),
        "channel": (GROUPS, 1, width),
        "token": (BATCH, GROUPS, rows, 1),
        "token and channels": (BATCH, GROUPS, rows, 2),
        "token and few channels": (BATCH, GROUPS, rows, width // 8),
        "tokens and channel": (BATCH, GROUPS, rows, width),
    }
    if shapes[form] is None:
        return None
    return torch.randn(shapes[form]) * 2 if is_zero else (torch.rand(shapes[form]) + 0.5) / factor


def call(
    key: str = "int8",
    value: str = "int8",
    forms: tuple[str, str, str, str] = ("channel", "none", "channel", "none"),
    dtype: torch.dtype = torch.float32,
    queries: int = 3,
    tokens: int = 40,
    width: int = 32,
    ratio: int = 3,
    token_groups: tuple[int, int] = (1, 1),
    unused: int = 0,
) -> dict[str, Any]:
    """Arguments of the op, by name; `unused` tokens of capacity hold NaN or garbage."""
    capacity = tokens + unused
    factors = [CODES[kind][1] if kind in CODES else 1.0 for kind in (key, value)]
    states = [storage(kind, capacity, width, dtype) for kind in (key, value)]
    for kind, codes in zip((key, value), states, strict=True):
        codes[:, :, tokens:] = float("nan") if kind not in ("int8", "int4") else 77
    parts = [
        part(form, capacity, width, factors[index // 2], index % 2 == 1, token_groups[index // 2])
        for index, form in enumerate(forms)
    ]
    for one, group in zip(parts, (token_groups[0],) * 2 + (token_groups[1],) * 2, strict=True):
        if one is not None and one.shape[-2] > 1:
            one[:, :, -(-tokens // group) :] = float("nan")
    return {
        "query": torch.randn(BATCH, queries, GROUPS * ratio, width).transpose(1, 2).to(dtype),
        "key": states[0],
        "value": states[1],
        "key_scale": parts[0],
        "key_zero": parts[1],
        "value_scale": parts[2],
        "value_zero": parts[3],
        "query_scale": None,
        "mask": None,
        "scaling": width**-0.5,
        "causal": True,
        "length": torch.full((BATCH,), tokens, dtype=torch.int32) if unused else None,
        "window": 0,
        "key_group": token_groups[0],
        "value_group": token_groups[1],
        "position_query": None,
        "position_table": None,
        "position_start": None,
    }


def with_positions(arguments: dict[str, Any], width: int, rows: int = 90, size: float = 1.0) -> dict[str, Any]:
    """The call with random scores by position, which start elsewhere in each sequence."""
    batch, heads, queries, _ = arguments["query"].shape
    return {
        **arguments,
        "position_query": torch.randn(batch, queries, heads, width).transpose(1, 2) * size,
        "position_table": torch.randn(rows, width),
        "position_start": torch.tensor([-7, 40]),
    }


def attend(arguments: dict[str, Any]) -> torch.Tensor:
    return attention_cuda(ATTENTION_CALL.of(**arguments))


def attend_lse(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_lse_cuda(ATTENTION_CALL.of(**arguments))


def run(arguments: dict[str, Any], capability: int = 90, processors: int = 4) -> torch.Tensor:
    with interpreted(capability, processors):
        return attend(arguments)


def run_lse(arguments: dict[str, Any], capability: int = 90, processors: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    with interpreted(capability, processors):
        return attend_lse(arguments)


def assert_close(actual: torch.Tensor, arguments: dict[str, Any]) -> None:
    """Within the tolerance of the query's dtype of the reference in float32."""
    expected = attention_reference(ATTENTION_CALL.of(**{**arguments, "query": arguments["query"].float()}))
    assert (actual.shape, actual.dtype) == (expected.shape, arguments["query"].dtype)
    assert relative_rmse(actual, expected) <= TOLERANCES[f"cuda attention {str(actual.dtype)[6:]}"]


def assert_both_close(actual: tuple[torch.Tensor, torch.Tensor], arguments: dict[str, Any]) -> None:
    """Output and log-sum-exp, an error in which is one of the weights."""
    assert_close(actual[0], arguments)
    expected = attention_lse_reference(ATTENTION_CALL.of(**{**arguments, "query": arguments["query"].float()}))[1]
    assert actual[1].shape == expected.shape and actual[1].dtype == torch.float32
    sees = expected > float("-inf")
    assert torch.equal(actual[1] > float("-inf"), sees)
    limit = TOLERANCES[f"cuda attention {str(arguments['query'].dtype)[6:]}"]
    torch.testing.assert_close(actual[1][sees], expected[sees], rtol=limit, atol=10 * limit)
