"""The linear ops: `x W^T + bias` where W, and for some x too, is in codes; `codes.py` says how codes are stored.

N output channels, K input channels.
"""

import torch

from ..shared.codes import CODE_RANGES, INT8_MAX, dynamic_scale, expand_scale, from_codes
from ..shared.operands import check_devices
from .arguments import (
    FP8_BLOCK_SIZE,
    WEIGHT_BLOCK,
    check_fp8,
    check_fp8_block,
    check_grouped,
    check_w8a8,
    check_w8a8_dynamic,
    check_weight_only,
)

EXACT_PRODUCTS = 1024
"""Products of two int8 codes that float32 adds up exactly: 1024 * 128 * 128 = 2^24."""


def _int32_matmul(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`codes @ weight.T` as int32, through float32 pieces that are short enough to be exact."""
    codes = codes.nan_to_num(0.0)
    total = torch.zeros((codes.shape[0], weight.shape[0]), dtype=torch.int32, device=codes.device)
    for start in range(0, weight.shape[1], EXACT_PRODUCTS):
        stop = start + EXACT_PRODUCTS
        total += (codes[:, start:stop] @ weight[:, start:stop].float().T).to(torch.int32)
    return total


def _finished(output: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """float32 `[M, N]` with the bias added, of the shape and dtype that belong to `x`."""
    output = output if bias is None else output + bias.float()
    return output.to(x.dtype).view(*x.shape[:-1], output.shape[-1])


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
        `[..., N]`, of the dtype of `x`; NaN for a row of x in which there is one.

    Raises:
        ValueError: dtypes, shapes or devices that do not go together, or a K of more than 131,071.
    """
    check_devices(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    check_w8a8(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    codes = (x.float().reshape(-1, x.shape[-1]) / input_scale + input_offset).round().clamp(-128, 127)
    total = _int32_matmul(codes, weight) + quant_bias
    is_nan = codes.isnan().any(dim=-1, keepdim=True)
    return _finished((total.float() * deq_scale).masked_fill(is_nan, float("nan")), None, x)


def linear_w8a8_dynamic_reference(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """W8A8 whose activations are quantized per token as they come: `scale = max|x| / 127` of each row of x.

    `(round(x / scale) @ weight.T) * (scale * weight_scale) + bias`

    Args:
        x: `[..., K]`, any float dtype.
        weight: int8 codes `[N, K]`.
        weight_scale: float32 `[N]`.
        bias: `[N]`, any float dtype, or None.

    Returns:
        `[..., N]`, of the dtype of `x`; NaN for a row of x in which there is one.

    Raises:
        ValueError: as `linear_w8a8_reference`.
    """
    check_devices(x, weight, weight_scale, bias)
    check_w8a8_dynamic(x, weight, weight_scale, bias)
    rows = x.float().reshape(-1, x.shape[-1])
    scale = dynamic_scale(rows.abs().amax(dim=-1, keepdim=True), INT8_MAX)
    codes = (rows / scale).round().clamp(-128, 127)
    return _finished(_int32_matmul(codes, weight).float() * (scale * weight_scale), bias, x)


def linear_weight_only_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """W8A16 and W4A16: float activations times weights `(code - zero) * scale`, per output channel or in groups of K.

    Args:
        x: `[..., K]`, any float dtype.
        weight: int8 `[N, K]`, or for int4 uint8 `[N, K / 2]` packed in blocks of 32 codes.
        weight_scale: float32 or float16 `[N, K / group]`; `[N, 1]` is per output channel.
        weight_zero: zero points in units of codes, shaped as `weight_scale`; None if symmetric.
        bias: `[N]`, any float dtype, or None.

    Returns:
        `[..., N]`, of the dtype of `x`, computed in float32.

    Raises:
        ValueError: as `linear_w8a8_reference`.
    """
    check_devices(x, weight, weight_scale, weight_zero, bias)
    check_weight_only(x, weight, weight_scale, weight_zero, bias)
    codes = from_codes(weight, WEIGHT_BLOCK, torch.float32)
    out_features, in_features = codes.shape
    if weight_zero is not None:
        codes = codes - expand_scale(weight_zero.float(), out_features, in_features)
    values = codes * expand_scale(weight_scale.float(), out_features, in_features)
    return _finished(x.float().reshape(-1, in_features) @ values.T, bias, x)


def quantize_by_group(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of x as float32 `[M, K / group, group]`, and their scales `max|x| / 127`, float32 `[M, K / group, 1]`.

    Args:
        x: `[..., K]`, any float dtype; M rows.
        group: channels that share a scale; a divisor of K.
    """
    grouped = x.float().reshape(-1, x.shape[-1] // group, group)
    scale = dynamic_scale(grouped.abs().amax(dim=-1, keepdim=True), INT8_MAX)
    return (grouped / scale).round().clamp(-128, 127), scale


def with_remainder(x: torch.Tensor, group: int) -> torch.Tensor:
    """x, and what its int8 codes leave of it: float32 `[2, ..., K]`.

    The products of the two with a weight, each of its own codes, add up to that of x in 15 bits.

    Args:
        x, group: as of `quantize_by_group`.
    """
    codes, scale = quantize_by_group(x, group)
    return torch.stack((x.float(), x.float() - (codes * scale).view(x.shape)))


def linear_grouped_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """W8A8 and W4A8 in groups: `linear_weight_only` of an x that is quantized to int8 per row and group of channels.

    `scale = max|x| / 127` of each group, so that a kernel multiplies codes and adds whole numbers within a group.

    Args:
        x: `[..., K]`, any float dtype.
        weight: int8 `[N, K]`, or for int4 uint8 `[N, K / 2]` packed in blocks of 32 codes.
        weight_scale: float32 or float16 `[N, W]`, W groups of a row of the weight; `[N, 1]` is per output channel.
        weight_zero: zero points in units of codes, shaped as `weight_scale`; None if symmetric.
        bias: `[N]`, any float dtype, or None.
        group: input channels that share a scale of x; a divisor of those that share one of the weight, `K / W`.

    Returns:
        `[..., N]`, of the dtype of `x`, summed in float32; NaN for a row of x in which there is one.

    Raises:
        ValueError: as `linear_w8a8_reference`, or a group that does not divide the weight's.
    """
    check_devices(x, weight, weight_scale, weight_zero, bias)
    check_grouped(x, weight, weight_scale, weight_zero, bias, group)
    codes, scale = quantize_by_group(x, group)
    rows = (codes * scale).view(*x.shape)
    return linear_weight_only_reference(rows, weight, weight_scale, weight_zero, bias).to(x.dtype)


def linear_fp8_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """W8A8 in fp8, e4m3: `e4m3(x / scale) @ weight.T * (scale * weight_scale) + bias`.

    Args:
        x: `[..., K]`, any float dtype.
        weight: float8_e4m3fn `[N, K]`.
        weight_scale: float32 `[N]` per output channel, or `[1]` per tensor.
        input_scale: float32 `[1]`, static; None: per token, `max|x| / 448` of each row of x.
        bias: `[N]`, any float dtype, or None.

    Returns:
        `[..., N]`, of the dtype of `x`, summed in float32.

    Raises:
        ValueError: as `linear_w8a8_reference`.
    """
    check_devices(x, weight, weight_scale, input_scale, bias)
    check_fp8(x, weight, weight_scale, input_scale, bias)
    rows = x.float().reshape(-1, x.shape[-1])
    low, high = CODE_RANGES[torch.float8_e4m3fn]
    if input_scale is None:
        input_scale = dynamic_scale(rows.abs().amax(dim=-1, keepdim=True), high)
    codes = (rows / input_scale).clamp(low, high).to(torch.float8_e4m3fn).float()
    return _finished((codes @ weight.float().T) * (input_scale * weight_scale), bias, x)


def fp8_by_group(x: torch.Tensor) -> torch.Tensor:
    """x through e4m3 codes, float32 `[..., K]`: `max|x| / 448` is the scale of each row's 128 channels."""
    low, high = CODE_RANGES[torch.float8_e4m3fn]
    grouped = x.float().unflatten(-1, (-1, FP8_BLOCK_SIZE))
    scale = dynamic_scale(grouped.abs().amax(dim=-1, keepdim=True), high)
    codes = (grouped / scale).clamp(low, high).to(torch.float8_e4m3fn)
    return codes.float().mul_(scale).flatten(-2)


def scales_by_row(weight_scale: torch.Tensor, out_features: int) -> torch.Tensor:
    """Scales of blocks as those of rows and 128 input channels: `[ceil(N / 128), G] -> [N, G]`."""
    return weight_scale.repeat_interleave(FP8_BLOCK_SIZE, dim=0)[:out_features]


def linear_fp8_block_reference(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """W8A8 in fp8, e4m3, with a scale for each block of 128 x 128 weights (DeepSeek-V3, arXiv 2412.19437, 3.3.2).

    `(e4m3(x / s) * s) @ (weight * weight_scale).T + bias`, `s = max|x| / 448` of each row and 128 channels.

    Args:
        x: `[..., K]`, any float dtype; K a multiple of 128.
        weight: float8_e4m3fn `[N, K]`.
        weight_scale: float32 `[ceil(N / 128), K / 128]`.
        bias: `[N]`, any float dtype, or None.

    Returns:
        `[..., N]`, of the dtype of `x`, summed in float32; NaN for a row of x in which there is one.

    Raises:
        ValueError: as `linear_w8a8_reference`.
    """
    check_devices(x, weight, weight_scale, bias)
    out_features, in_features = check_fp8_block(x, weight, weight_scale, bias)
    values = weight.float() * expand_scale(scales_by_row(weight_scale, out_features), out_features, in_features)
    return _finished(fp8_by_group(x).reshape(-1, in_features) @ values.T, bias, x)
