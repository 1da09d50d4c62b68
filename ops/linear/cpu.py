"""The W8A8 linear op on the CPU: `linear.c` behind the Python signature of the reference."""

import struct

import torch

from ..compile import CKernel
from ..operands import KINDS
from .reference import linear_w8a8_reference

LINEAR_KERNEL = CKernel("linear", ("ops/vector.h", "ops/linear/linear.c"), ("linear_w8a8",))
_pack_linear = struct.Struct("10q2d").pack


def linear_w8a8_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> torch.Tensor:
    """`linear_w8a8_reference` in C.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        MemoryError: no room for the scratch of the threads.
    """
    run = LINEAR_KERNEL.load().get("linear_w8a8")
    if run is None:
        return linear_w8a8_reference(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    columns, depth = weight.shape
    shape = x.shape
    if shape[-1] != depth or weight.dtype != torch.int8:
        raise ValueError(f"x {tuple(shape)} and weight {weight.dtype} {tuple(weight.shape)} do not go together")
    if quant_bias.dtype != torch.int32 or deq_scale.dtype != torch.float32:
        raise ValueError(f"quant_bias must be int32 and deq_scale float32, not {quant_bias.dtype}, {deq_scale.dtype}")
    values = x if x.dtype in KINDS and x.dtype != torch.int8 else x.float()
    if not values.is_contiguous():
        values = values.contiguous()
    if not (weight.is_contiguous() and quant_bias.is_contiguous() and deq_scale.is_contiguous()):
        weight, quant_bias, deq_scale = weight.contiguous(), quant_bias.contiguous(), deq_scale.contiguous()
    output = torch.empty((*shape[:-1], columns))
    rows = output.numel() // columns if columns else 0
    if rows == 0:
        return output.to(x.dtype)
    failed = run(
        _pack_linear(
            values.data_ptr(),
            weight.data_ptr(),
            output.data_ptr(),
            quant_bias.data_ptr(),
            deq_scale.data_ptr(),
            KINDS[values.dtype],
            rows,
            depth,
            columns,
            torch.get_num_threads(),
            input_scale.item(),
            input_offset.item(),
        )
    )
    if failed:
        raise MemoryError("linear_w8a8 on the CPU found no memory for its scratch")
    return output if x.dtype == torch.float32 else output.to(x.dtype)
