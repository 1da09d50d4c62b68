"""Calls of the ops with random arguments, good and bad: what a kernel takes, it computes as the reference does."""

import functools
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from octavo import ops
from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.reference import attention_lse_reference, attention_reference
from octavo.ops.codec.reference import decode_reference, encode_reference, encode_token_reference
from octavo.ops.linear.reference import (
    linear_fp8_reference,
    linear_grouped_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)

from ...tolerances import TOLERANCES
from ..op_arguments import (
    Arguments,
    attention,
    damage_arguments,
    decode,
    encode,
    encode_token,
    linear_fp8,
    linear_grouped,
    linear_w8a8,
    linear_w8a8_dynamic,
    linear_weight_only,
    shown,
)
from ..trial import Accepted, Attempt, Room

REFUSALS = ("ValueError", "IndexError", "TypeError", "NotImplementedError", "OctavoError")
HALF = {torch.float16: TOLERANCES["cuda attention float16"], torch.bfloat16: TOLERANCES["cuda attention bfloat16"]}
LARGEST = 1e12
"""Products of three such numbers are finite."""


def _flat(reference: Callable) -> Callable:
    """The reference of attention, which takes a call, of its arguments by name."""
    return lambda **arguments: reference(ATTENTION_CALL.of(**arguments))


OPS: dict[str, tuple[Callable, Callable, Callable[[Random], Arguments]]] = {
    "attention": (ops.attention, _flat(attention_reference), attention),
    "attention_lse": (ops.attention_lse, _flat(attention_lse_reference), attention),
    "encode": (ops.encode, encode_reference, encode),
    "encode_token": (ops.encode_token, encode_token_reference, encode_token),
    "decode": (ops.decode, decode_reference, decode),
    "linear_w8a8": (ops.linear_w8a8, linear_w8a8_reference, linear_w8a8),
    "linear_w8a8_dynamic": (ops.linear_w8a8_dynamic, linear_w8a8_dynamic_reference, linear_w8a8_dynamic),
    "linear_weight_only": (ops.linear_weight_only, linear_weight_only_reference, linear_weight_only),
    "linear_grouped": (ops.linear_grouped, linear_grouped_reference, linear_grouped),
    "linear_fp8": (ops.linear_fp8, linear_fp8_reference, linear_fp8),
}


def _differs(found: torch.Tensor, expected: torch.Tensor) -> str:
    """How a result differs from the reference's, beyond rounding of floats; NaN and Inf stand where its do."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    if not expected.is_floating_point() or expected.dtype.itemsize == 1:
        wrong = int((found.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)).sum())
        return f"{wrong} of {expected.numel()} codes" if wrong else ""
    found, expected, dtype = found.double(), expected.double(), expected.dtype
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(found), finite):
        return "finite in other places"
    if not finite.any():
        return ""
    error = (found - expected)[finite].square().mean().sqrt() / expected[finite].square().mean().sqrt().clamp_min(1e-30)
    return f"a relative rmse of {error:.3g}" if error > HALF.get(dtype, TOLERANCES["attention"]) else ""


def _tensors(result: Any, storages: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a call gave: what it returned and what it wrote."""
    returned = result if isinstance(result, (tuple, list)) else [] if result is None else [result]
    return [*returned, *storages]


def _overflows(op: str, arguments: Arguments) -> bool:
    """Whether numbers that end as NaN or Inf stand among arguments of attention.

    The reference multiplies by 0 what a mask hides of them, and a kernel does not look at it.
    """
    tensors = [value for value in arguments.values.values() if isinstance(value, torch.Tensor)]
    largest = [part.double().abs().max() for part in tensors if part.is_floating_point() and part.numel()]
    return "attention" in op and not all(value < LARGEST for value in (*largest, abs(arguments.values["scaling"])))


def _call(op: str, arguments: Arguments, is_damaged: bool) -> Accepted:
    run, reference, _ = OPS[op]
    copy = arguments.copy()
    try:
        found = _tensors(run(**arguments.values), arguments.storages)
    except Exception as error:
        if not is_damaged:
            raise AssertionError(f"a good call is refused: {error}") from None
        raise
    try:
        expected = _tensors(reference(**copy.values), copy.storages)
    except Exception as error:
        return Accepted(False, f"the reference refuses it: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    if _overflows(op, copy):
        return Accepted(found[0].shape == expected[0].shape, "another shape")
    differing = [text for a, b in zip(found, expected, strict=True) if (text := _differs(a, b))]
    return Accepted(not differing, "; ".join(differing))


def op_call(rng: Random, room: Room) -> Attempt:
    """A call of an op: with arguments that go together, or with one or two that do not."""
    op = rng.choice(list(OPS))
    torch.manual_seed(rng.getrandbits(32))
    arguments = OPS[op][2](rng)
    damages = [damage_arguments(rng, arguments) for _ in range(rng.choices((0, 1, 2), (2, 6, 1))[0])]
    what = f"{op}: {', '.join(damages) or 'good arguments'} [{shown(arguments)}]"
    return Attempt(what, functools.partial(_call, op, arguments, bool(damages)), refusals=REFUSALS)
