"""The codec on an Ascend NPU: npu_quantize and npu_dynamic_quant behind the Python signature of the references."""

import torch

from ..codes import SMALLEST_SCALE
from ..npu import npu_description, quantize_static, require_npu_float, torch_npu_module

ENCODE_NPU = npu_description("npu_quantize")
ENCODE_TOKEN_NPU = npu_description("npu_dynamic_quant")


def encode_npu(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> None:
    """`encode_reference` by npu_quantize (ascend-op-plugin docs: npu_quantize).

    Args:
        x: `[B, G, S, D]`, float32, float16 or bfloat16.
        scale, zero: float32, `[G, 1, D]` or `[G, 1, 1]`.
        codes: int8 `[B, G, S, D]`, may be a strided view; overwritten.

    Raises:
        ValueError: a scale that varies along the batch or the tokens.
        RuntimeError: torch_npu cannot be imported.
    """
    if x.numel():
        codes.copy_(quantize_static(x, scale, zero).transpose(1, 2))


def encode_token_npu(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> None:
    """`encode_token_reference` by npu_dynamic_quant (ascend-op-plugin docs: npu_dynamic_quant).

    Differs from the reference where a token's maximum is below 127 * 2^-23: its scale is not raised to that floor. What
    the op makes of a token of zeros is not documented, so its codes and its scale are set here.

    Args:
        x: `[B, G, S, D]`, float16 or bfloat16.
        codes: int8 `[B, G, S, D]`, may be a strided view; overwritten.
        scale: float32 `[B, G, S, 1]`, may be a strided view; overwritten.

    Raises:
        ValueError: x in another dtype.
        RuntimeError: torch_npu cannot be imported.
    """
    require_npu_float("K and V", x)
    if x.numel():
        new_codes, new_scale = torch_npu_module().npu_dynamic_quant(x)
        new_scale = new_scale.unsqueeze(-1)
        is_zero = new_scale == 0
        codes.copy_(new_codes.masked_fill(is_zero, 0))
        scale.copy_(new_scale.masked_fill(is_zero, SMALLEST_SCALE))
