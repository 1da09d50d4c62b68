"""The linear op of W8A8: int8 activations times int8 weights, accumulated in int32."""

import torch

EXACT_PRODUCTS = 1024
"""Products of two int8 codes that float32 adds up exactly: 1024 * 128 * 128 = 2^24."""


def _int32_matmul(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`codes @ weight.T` as int32, through float32 pieces that are short enough to be exact."""
    total = torch.zeros((codes.shape[0], weight.shape[0]), dtype=torch.int32, device=codes.device)
    for start in range(0, weight.shape[1], EXACT_PRODUCTS):
        stop = start + EXACT_PRODUCTS
        total += (codes[:, start:stop] @ weight[:, start:stop].float().T).to(torch.int32)
    return total


def linear_w8a8_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> torch.Tensor:
    """`(clamp(round(x / input_scale + input_offset)) @ weight.T + quant_bias) * deq_scale`, Ascend's static W8A8.

    Args:
        x: `[..., K]`, any float dtype.
        weight: int8 codes `[N, K]`, symmetric per output channel.
        input_scale, input_offset: float32 `[1]`; the offset is the zero point of the activation, in units of codes.
        quant_bias: int32 `[N]`: the bias in units of `deq_scale`, less `input_offset * sum_k weight`.
        deq_scale: float32 `[N]`: `input_scale * weight_scale`.

    Returns:
        `[..., N]`, of the dtype of `x`.
    """
    codes = (x.float().reshape(-1, x.shape[-1]) / input_scale + input_offset).round().clamp(-128, 127)
    total = _int32_matmul(codes, weight) + quant_bias
    return (total.float() * deq_scale).to(x.dtype).view(*x.shape[:-1], weight.shape[0])
