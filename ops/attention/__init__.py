"""Attention that reads the codes of K and V; the semantics are in README.md and reference.py."""

from collections.abc import Callable
from typing import Any

import torch

from ..shared.fallback import fell_back
from ..shared.registry import define, implement, is_unobserved
from .call import ATTENTION_CALL, AttentionCall
from .cpu import attention_cpu, attention_cpu_description, attention_cpu_supports, attention_lse_cpu
from .cuda import ATTENTION_CUDA, attention_cuda, attention_cuda_supports, attention_lse_cuda
from .npu import ATTENTION_LSE_NPU, ATTENTION_NPU, attention_lse_npu_supports, attention_npu, attention_npu_supports
from .reference import attention_lse_reference, attention_reference


def _attention_fake(call: AttentionCall) -> torch.Tensor:
    batch, heads, queries, width = call.query.shape
    return call.query.new_empty((batch, queries, heads, width))


def _attention_lse_fake(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    return _attention_fake(call), call.query.new_empty(call.query.shape[:3], dtype=dtype)


def _define(name: str, returns: Any, reference: Callable, fake: Callable) -> Callable:
    """Define an op of attention calls, whose flat arguments torch.library gets."""
    for function in (reference, fake):
        ATTENTION_CALL.check(function, returns)
    schema = ATTENTION_CALL.schema(name, returns)
    return define(schema, ATTENTION_CALL.flattened(reference), ATTENTION_CALL.flattened(fake))


def _implement(
    name: str, dispatch_key: str, supports: Callable, kernel: Callable, description: str | Callable[[], str]
) -> Callable[[AttentionCall], Any]:
    """Register the kernel of a device for the calls that it supports; the reference takes the others, and that is said.

    Returns:
        what is registered, of a call.

    Raises:
        TypeError: a signature other than that of the op.
    """
    returns, reference = _OPS[name]
    ATTENTION_CALL.check(supports, str | None)
    ATTENTION_CALL.check(kernel, returns)
    device = "NPU" if dispatch_key == "PrivateUse1" else dispatch_key

    def attend(call: AttentionCall) -> Any:
        return reference(call) if fell_back(name, device, supports(call)) else kernel(call)

    implement(name, dispatch_key, ATTENTION_CALL.flattened(attend), description)
    return attend


_OPS = {
    "attention": (torch.Tensor, attention_reference),
    "attention_lse": (tuple[torch.Tensor, torch.Tensor], attention_lse_reference),
}
"""What each returns, and its reference."""
attention = _define("attention", *_OPS["attention"], _attention_fake)
attention_lse = _define("attention_lse", *_OPS["attention_lse"], _attention_lse_fake)
_ATTEND_CPU = _implement("attention", "CPU", attention_cpu_supports, attention_cpu, attention_cpu_description)
_implement("attention_lse", "CPU", attention_cpu_supports, attention_lse_cpu, attention_cpu_description)
_ATTEND_CUDA = _implement("attention", "CUDA", attention_cuda_supports, attention_cuda, ATTENTION_CUDA)
_implement("attention_lse", "CUDA", attention_cuda_supports, attention_lse_cuda, ATTENTION_CUDA)
_implement("attention", "PrivateUse1", attention_npu_supports, attention_npu, ATTENTION_NPU)
_implement("attention_lse", "PrivateUse1", attention_lse_npu_supports, attention_lse_reference, ATTENTION_LSE_NPU)


def attend(call: AttentionCall) -> torch.Tensor:
    """What the op `attention` gives of a call, without torch's dispatcher where nobody listens to it.

    It takes as long as a third of all else around the kernel.
    """
    if not torch.compiler.is_compiling() and is_unobserved(call.query):
        query, key, value = call.query, call.key.codes, call.value.codes
        if query.is_cpu and key.is_cpu and value.is_cpu:
            return _ATTEND_CPU(call)
        if query.is_cuda and key.is_cuda and value.is_cuda:
            return _ATTEND_CUDA(call)
    return attention(*ATTENTION_CALL.flat(call))
