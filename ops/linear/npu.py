"""The W8A8 linear op on an Ascend NPU: npu_quantize and npu_quant_matmul behind the reference's signature."""

import torch

from ..npu import npu_description, require_npu_float, torch_npu_module

LINEAR_NPU = npu_description("npu_quantize and npu_quant_matmul")
LARGEST_MATMUL_WIDTH = 65535
"""Limit of the last dimension of both matrices (ascend-op-plugin docs: npu_quant_matmul)."""


def linear_w8a8_npu(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> torch.Tensor:
    """`linear_w8a8_reference` by npu_quant_matmul (ascend-op-plugin docs: npu_quantize, npu_quant_matmul).

    With float16 the op itself drops the 13 lowest bits of `deq_scale` (npu_trans_quant_param); with bfloat16 not.

    Args:
        x: `[..., K]`, float16 or bfloat16.
        weight: int8 `[N, K]`; the op gets the transposed view.
        input_scale: float32 `[1]`.
        input_offset: float32 `[1]`, an integer, as the format stores it: npu_quantize takes it as int32.
        quant_bias: int32 `[N]`, added to the int32 sums.
        deq_scale: float32 `[N]`.

    Returns:
        `[..., N]`, of the dtype of `x`.

    Raises:
        ValueError: x in another dtype, or a matrix wider than the op takes.
        RuntimeError: torch_npu cannot be imported.
    """
    require_npu_float("x", x)
    columns, depth = weight.shape
    if max(columns, depth) > LARGEST_MATMUL_WIDTH:
        raise ValueError(
            f"npu_quant_matmul takes at most {LARGEST_MATMUL_WIDTH} columns, and the weight is {columns} x {depth}"
        )
    shape = (*x.shape[:-1], columns)
    if x.numel() == 0:
        return x.new_empty(shape)
    npu = torch_npu_module()
    rows = x.reshape(-1, depth)
    codes = npu.npu_quantize(rows, input_scale, input_offset.to(torch.int32), torch.qint8, 1, True)
    return npu.npu_quant_matmul(codes, weight.t(), deq_scale, bias=quant_bias, output_dtype=x.dtype).view(shape)
