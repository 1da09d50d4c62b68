"""What every version of the linear ops refuses; those that may meet tensors of several devices check these first."""

import torch

from ..shared.operands import VALUE_DTYPES, dtype_name

WEIGHT_BLOCK = 32
"""Codes of an int4 weight that are packed together: the smallest group, which divides every K."""
FP8_BLOCK_SIZE = 128
"""Input and output channels of a block of an fp8 weight that share a scale."""
LARGEST_IN_FEATURES = 131071
"""Input channels up to which sums of products of int8 codes fit 32 bits: one more, and 2^17 * 128 * 128 is 2^31."""


def check_matrix(x: torch.Tensor, weight: torch.Tensor, *dtypes: torch.dtype) -> tuple[int, int]:
    """N and K of a weight `[N, K]`, in uint8 `[N, K / 2]`, that belongs to x `[..., K]`.

    Raises:
        ValueError: it does not, or is of another dtype.
    """
    shape, sizes, dtype = x.shape, weight.shape, weight.dtype
    if dtype in dtypes and x.dtype in VALUE_DTYPES and len(sizes) == 2 and len(shape) > 0:
        in_features = shape[-1]
        is_packed = dtype == torch.uint8
        held = 2 * sizes[1] if is_packed else sizes[1]
        if in_features == held > 0 and not (is_packed and in_features % WEIGHT_BLOCK):
            return sizes[0], in_features
    raise ValueError(
        f"x {dtype_name(x.dtype)} {tuple(shape)} and weight {dtype} {tuple(sizes)} do not go together: [..., K] in "
        f"float, and [N, K] in {' or '.join(dtype_name(dtype) for dtype in dtypes)}"
    )


def _check_codes_matrix(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
    """As `check_matrix` for an int8 weight that is multiplied by codes."""
    out_features, in_features = check_matrix(x, weight, torch.int8)
    if in_features > LARGEST_IN_FEATURES:
        raise ValueError(
            f"W8A8 adds up to {LARGEST_IN_FEATURES} products exactly, and the weight has {in_features} input channels"
        )
    return out_features, in_features


def _check_part(name: str, part: torch.Tensor, dtype: torch.dtype, length: int) -> None:
    """Raise ValueError unless a part is of this dtype and length."""
    if part.dtype != dtype or part.shape != (length,):
        raise ValueError(f"{name} must be {dtype_name(dtype)} [{length}], not {part.dtype} {tuple(part.shape)}")


def _check_bias(bias: torch.Tensor | None, out_features: int) -> None:
    if bias is not None and (bias.shape != (out_features,) or bias.dtype not in VALUE_DTYPES):
        raise ValueError(
            f"bias {tuple(bias.shape)} in {dtype_name(bias.dtype)} does not belong to {out_features} output channels"
        )


def check_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> tuple[int, int]:
    """N and K; raises ValueError as `linear_w8a8` does."""
    out_features, in_features = _check_codes_matrix(x, weight)
    _check_part("quant_bias", quant_bias, torch.int32, out_features)
    _check_part("deq_scale", deq_scale, torch.float32, out_features)
    _check_part("input_scale", input_scale, torch.float32, 1)
    _check_part("input_offset", input_offset, torch.float32, 1)
    return out_features, in_features


def check_w8a8_dynamic(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> tuple[int, int]:
    """N and K; raises ValueError as `linear_w8a8_dynamic` does."""
    out_features, in_features = _check_codes_matrix(x, weight)
    _check_part("weight_scale", weight_scale, torch.float32, out_features)
    _check_bias(bias, out_features)
    return out_features, in_features


def check_weight_only(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[int, int, int]:
    """N, K and the groups of a row of the weight; raises ValueError as `linear_weight_only` does."""
    out_features, in_features = check_matrix(x, weight, torch.int8, torch.uint8)
    num_groups = weight_scale.shape[1] if weight_scale.dim() == 2 else 0
    fits = num_groups > 0 and weight_scale.shape[0] == out_features and in_features % num_groups == 0
    if not fits or weight_scale.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"weight_scale {tuple(weight_scale.shape)} in {dtype_name(weight_scale.dtype)} does not belong to "
            f"{out_features} output and {in_features} input channels"
        )
    if weight_zero is not None and (weight_zero.shape != weight_scale.shape or weight_zero.dtype not in VALUE_DTYPES):
        raise ValueError(
            f"weight_zero {tuple(weight_zero.shape)} in {dtype_name(weight_zero.dtype)} must be float, and of the "
            f"shape of weight_scale"
        )
    _check_bias(bias, out_features)
    return out_features, in_features, num_groups


def check_grouped(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> tuple[int, int, int]:
    """N, K and the groups of a row of the weight; raises ValueError as `linear_grouped` does."""
    out_features, in_features, num_groups = check_weight_only(x, weight, weight_scale, weight_zero, bias)
    if group < 1 or in_features // num_groups % group:
        raise ValueError(
            f"a group of {group} input channels does not divide the {in_features // num_groups} that share a scale of "
            f"the weight"
        )
    if group > LARGEST_IN_FEATURES:
        raise ValueError(f"products of up to {LARGEST_IN_FEATURES} codes add up exactly, and a group has {group}")
    return out_features, in_features, num_groups


def check_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[int, int]:
    """N and K; raises ValueError as `linear_fp8` does."""
    out_features, in_features = check_matrix(x, weight, torch.float8_e4m3fn)
    _check_part("weight_scale", weight_scale, torch.float32, 1 if weight_scale.numel() == 1 else out_features)
    if input_scale is not None:
        _check_part("input_scale", input_scale, torch.float32, 1)
    _check_bias(bias, out_features)
    return out_features, in_features


def block_counts(out_features: int, in_features: int) -> tuple[int, int]:
    """Blocks of an fp8 weight `[N, K]` along both."""
    return -(-out_features // FP8_BLOCK_SIZE), -(-in_features // FP8_BLOCK_SIZE)


def check_fp8_block(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> tuple[int, int]:
    """N and K; raises ValueError as `linear_fp8_block` does."""
    out_features, in_features = check_matrix(x, weight, torch.float8_e4m3fn)
    if in_features % FP8_BLOCK_SIZE:
        raise ValueError(f"blocks are of {FP8_BLOCK_SIZE} input channels, and the weight has {in_features}")
    blocks = block_counts(out_features, in_features)
    if weight_scale.dtype != torch.float32 or weight_scale.shape != blocks:
        raise ValueError(
            f"weight_scale must be float32 {blocks}, not {dtype_name(weight_scale.dtype)} {tuple(weight_scale.shape)}"
        )
    _check_bias(bias, out_features)
    return out_features, in_features
