"""Attention that reads the codes of K and V; the semantics are in README.md and reference.py."""

import torch

from ..shared.registry import define, implement
from .cpu import attention_cpu, attention_cpu_description, attention_lse_cpu
from .cuda import ATTENTION_CUDA, attention_cuda, attention_lse_cuda
from .npu import ATTENTION_NPU, attention_lse_npu, attention_npu
from .reference import attention_lse_reference, attention_reference

_ATTENTION_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_scale, Tensor? key_zero, Tensor? value_scale, "
    "Tensor? value_zero, Tensor? query_scale, Tensor? mask, float scaling, bool causal, Tensor? length=None, "
    "int window=0, int key_group=1, int value_group=1, Tensor? position_query=None, Tensor? position_table=None, "
    "Tensor? position_start=None"
)


def _attention_fake(query: torch.Tensor, *unused: object) -> torch.Tensor:
    batch, heads, queries, width = query.shape
    return query.new_empty((batch, queries, heads, width))


def _attention_lse_fake(query: torch.Tensor, *unused: object) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _attention_fake(query), query.new_empty(query.shape[:3], dtype=dtype)


attention = define(f"attention({_ATTENTION_ARGUMENTS}) -> Tensor", attention_reference, _attention_fake)
attention_lse = define(
    f"attention_lse({_ATTENTION_ARGUMENTS}) -> (Tensor, Tensor)", attention_lse_reference, _attention_lse_fake
)
implement("attention", "CPU", attention_cpu, attention_cpu_description)
implement("attention_lse", "CPU", attention_lse_cpu, attention_cpu_description)
implement("attention", "CUDA", attention_cuda, ATTENTION_CUDA)
implement("attention_lse", "CUDA", attention_lse_cuda, ATTENTION_CUDA)
implement("attention", "PrivateUse1", attention_npu, ATTENTION_NPU)
implement("attention_lse", "PrivateUse1", attention_lse_npu, "reference (PyTorch); fp8 raises")
