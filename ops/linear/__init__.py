"""Linear layers that compute on codes; the semantics are in README.md and reference.py."""

import torch

from ..shared.registry import define_op, implement
from .cpu import (
    LINEAR_KERNEL,
    linear_fp8_block_cpu,
    linear_fp8_cpu,
    linear_grouped_cpu,
    linear_w8a8_cpu,
    linear_w8a8_dynamic_cpu,
    linear_weight_only_cpu,
)
from .cuda import (
    LINEAR_CUDA,
    WEIGHT_ONLY_CUDA,
    linear_fp8_cuda,
    linear_w8a8_cuda,
    linear_w8a8_dynamic_cuda,
    linear_weight_only_cuda,
)
from .npu import (
    LINEAR_DYNAMIC_NPU,
    LINEAR_FP8_NPU,
    LINEAR_NPU,
    LINEAR_WEIGHT_ONLY_NPU,
    linear_fp8_block_npu,
    linear_fp8_npu,
    linear_w8a8_dynamic_npu,
    linear_w8a8_npu,
    linear_weight_only_npu,
)
from .reference import (
    linear_fp8_block_reference,
    linear_fp8_reference,
    linear_grouped_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, *unused: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


linear_w8a8 = define_op("linear_w8a8", linear_w8a8_reference, _linear_fake)
linear_w8a8_dynamic = define_op("linear_w8a8_dynamic", linear_w8a8_dynamic_reference, _linear_fake)
linear_weight_only = define_op("linear_weight_only", linear_weight_only_reference, _linear_fake)
linear_grouped = define_op("linear_grouped", linear_grouped_reference, _linear_fake)
linear_fp8 = define_op("linear_fp8", linear_fp8_reference, _linear_fake)
linear_fp8_block = define_op("linear_fp8_block", linear_fp8_block_reference, _linear_fake)
implement("linear_w8a8", "CPU", linear_w8a8_cpu, LINEAR_KERNEL.description)
implement("linear_w8a8_dynamic", "CPU", linear_w8a8_dynamic_cpu, LINEAR_KERNEL.description)
implement("linear_weight_only", "CPU", linear_weight_only_cpu, LINEAR_KERNEL.description)
implement("linear_grouped", "CPU", linear_grouped_cpu, LINEAR_KERNEL.description)
implement("linear_fp8", "CPU", linear_fp8_cpu, LINEAR_KERNEL.description)
implement("linear_fp8_block", "CPU", linear_fp8_block_cpu, LINEAR_KERNEL.description)
implement("linear_w8a8", "CUDA", linear_w8a8_cuda, LINEAR_CUDA)
implement("linear_w8a8_dynamic", "CUDA", linear_w8a8_dynamic_cuda, LINEAR_CUDA)
implement("linear_weight_only", "CUDA", linear_weight_only_cuda, WEIGHT_ONLY_CUDA)
implement("linear_fp8", "CUDA", linear_fp8_cuda, LINEAR_CUDA)
implement("linear_w8a8", "PrivateUse1", linear_w8a8_npu, LINEAR_NPU)
implement("linear_w8a8_dynamic", "PrivateUse1", linear_w8a8_dynamic_npu, LINEAR_DYNAMIC_NPU)
implement("linear_weight_only", "PrivateUse1", linear_weight_only_npu, LINEAR_WEIGHT_ONLY_NPU)
implement("linear_fp8", "PrivateUse1", linear_fp8_npu, LINEAR_FP8_NPU)
implement("linear_fp8_block", "PrivateUse1", linear_fp8_block_npu, LINEAR_FP8_NPU)
