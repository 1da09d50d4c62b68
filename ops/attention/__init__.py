"""Attention that reads the codes of K and V; the semantics are in README.md and reference.py."""

import torch

from ..library import define, implement
from .cpu import attention_cpu, attention_cpu_description
from .cuda import ATTENTION_CUDA, attention_cuda
from .npu import ATTENTION_NPU, attention_npu
from .reference import attention_reference


def _attention_fake(query: torch.Tensor, *unused: object) -> torch.Tensor:
    batch, heads, queries, width = query.shape
    return query.new_empty((batch, queries, heads, width))


attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_scale, Tensor? key_zero, Tensor? value_scale, "
    "Tensor? value_zero, Tensor? query_scale, Tensor? mask, float scaling, bool causal, Tensor? length=None, "
    "int window=0, int key_group=1, int value_group=1) -> Tensor",
    attention_reference,
    _attention_fake,
)
implement("attention", "CPU", attention_cpu, attention_cpu_description)
implement("attention", "CUDA", attention_cuda, ATTENTION_CUDA)
implement("attention", "PrivateUse1", attention_npu, ATTENTION_NPU)
