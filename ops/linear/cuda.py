"""Linear layers on CUDA GPUs: the Triton kernels of `cuda_kernels.py` behind the signatures of the references."""

from typing import NamedTuple

import torch

from ..shared.codes import CODE_RANGES, SMALLEST_SCALE
from ..shared.fallback import fell_back
from ..shared.operands import check_devices
from ..shared.triton_helpers import (
    FP8_CAPABILITY,
    cuda_description,
    gpu_of,
    on_device,
    raw_codes,
    strided,
    triton_supports,
)
from .arguments import WEIGHT_BLOCK, check_fp8, check_w8a8, check_w8a8_dynamic, check_weight_only
from .cuda_kernels import codes_linear_kernel, quantize_rows_kernel, weight_only_kernel
from .reference import (
    linear_fp8_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)

LINEAR_CUDA = cuda_description("codes times codes in the matrix units, a row of tiles for few tokens")
WEIGHT_ONLY_CUDA = cuda_description("weights decoded in registers, a row of tiles for few tokens")
LARGEST_ROW_BLOCK = 4096


class _Tiles(NamedTuple):
    """How a linear is cut: rows, output and input channels of a tile, warps, and tiles in flight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def _linear_tiles(rows: int, in_features: int, bits: int, capability: int) -> _Tiles:
    """Tiles for so many tokens: narrow ones for few, which are bound by the bandwidth of memory.

    Args:
        bits: of an element of x as it is multiplied.
    """
    has_room = capability in (80, 90, 100, 103)  # 163 KiB of shared memory and more; others have 99 KiB
    if rows <= 16:
        block_k_of_few = {8: 512, 16: 256, 32: 64}[bits]
        tiles = _Tiles(16, 32, block_k_of_few, 4, 4 if has_room else 3)  # of four warps on 16 columns some do the same
    elif rows <= 64 or bits == 32:
        tiles = _Tiles(64, 64, {8: 128, 16: 64, 32: 32}[bits], 4, 3)
    else:
        tiles = _Tiles(128, 128, 128 if bits == 8 else 64, 8, 3 if has_room else 2)
    return tiles._replace(block_k=min(tiles.block_k, max(32, 1 << (in_features - 1).bit_length())))


def _contiguous(part: torch.Tensor | None) -> torch.Tensor | None:
    return None if part is None else part.contiguous()


def _quantized_rows(
    rows: torch.Tensor, dtype: torch.dtype, kind: str, scale: torch.Tensor | None, offset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes `[M, K]`, fp8 as bytes, and float32 scales `[M]`: those found, or 1 and NaN where `scale` is that of codes.

    Codes in fp8 have a NaN of their own, and by `scale` no scales.
    """
    is_fp8 = dtype != torch.int8
    count, in_features = rows.shape
    codes = torch.empty((count, in_features), dtype=torch.uint8 if is_fp8 else torch.int8, device=rows.device)
    is_whole = scale is None or not is_fp8  # a program takes a row
    found = torch.empty((count,), dtype=torch.float32, device=rows.device) if is_whole else None
    block = min(LARGEST_ROW_BLOCK if is_whole else 1024, max(128, 1 << (in_features - 1).bit_length()))
    low, high = CODE_RANGES[dtype]
    quantize_rows_kernel[(count, 1 if is_whole else -(-in_features // block))](
        strided(rows), codes, found, scale, offset, in_features,
        LOW=low, HIGH=high, SMALLEST=SMALLEST_SCALE, BLOCK=block, KIND=kind,
        num_warps=8 if block > 1024 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, found


def _multiplied(
    x: torch.Tensor,
    codes: torch.Tensor,
    weight: torch.Tensor,
    row_scale: tuple | None,
    column_scale: tuple,
    quant_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    dot: str,
) -> torch.Tensor:
    """Codes times codes, scaled, in the shape and dtype that belong to x."""
    rows, in_features = codes.shape
    out_features = weight.shape[0]
    output = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    tiles = _linear_tiles(rows, in_features, 16 if dot == "fp16" else 8, gpu_of(x.device).capability)
    codes_linear_kernel[(-(-rows // tiles.block_m) * -(-out_features // tiles.block_n),)](
        codes, strided(raw_codes(weight)), output, row_scale, column_scale, quant_bias, bias,
        rows, out_features, in_features,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        IS_EVEN=in_features % tiles.block_k == 0, DOT=dot,
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return output


def linear_w8a8_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> torch.Tensor:
    """`linear_w8a8_reference` in Triton, bit for bit.

    Raises:
        ValueError: shapes that do not go together.
    """
    if fell_back("linear_w8a8", "CUDA", triton_supports(x)):
        return linear_w8a8_reference(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    check_devices(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    out_features, in_features = check_w8a8(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    rows, quant_bias, deq_scale = x.reshape(-1, in_features), quant_bias.contiguous(), deq_scale.contiguous()
    if rows.shape[0] == 0 or out_features == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    with on_device(x):
        codes, scale = _quantized_rows(rows, torch.int8, "int8", input_scale, input_offset)
        return _multiplied(x, codes, weight, (scale, 1), (deq_scale, 1), quant_bias, None, "int8")


def linear_w8a8_dynamic_cuda(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`linear_w8a8_dynamic_reference` in Triton, bit for bit.

    Raises:
        ValueError: shapes that do not go together.
    """
    if fell_back("linear_w8a8_dynamic", "CUDA", triton_supports(x)):
        return linear_w8a8_dynamic_reference(x, weight, weight_scale, bias)
    check_devices(x, weight, weight_scale, bias)
    out_features, in_features = check_w8a8_dynamic(x, weight, weight_scale, bias)
    rows, weight_scale, bias = x.reshape(-1, in_features), weight_scale.contiguous(), _contiguous(bias)
    if rows.shape[0] == 0 or out_features == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    with on_device(x):
        codes, scale = _quantized_rows(rows, torch.int8, "int8", None, None)
        return _multiplied(x, codes, weight, (scale, 1), (weight_scale, 1), None, bias, "int8")


def linear_fp8_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_fp8_reference` in Triton; before Ada, codes become float16 in registers, which holds each exactly.

    Raises:
        ValueError: shapes that do not go together, or a weight that is not e4m3.
    """
    if fell_back("linear_fp8", "CUDA", triton_supports(x)):
        return linear_fp8_reference(x, weight, weight_scale, input_scale, bias)
    check_devices(x, weight, weight_scale, input_scale, bias)
    out_features, in_features = check_fp8(x, weight, weight_scale, input_scale, bias)
    rows, bias = x.reshape(-1, in_features), _contiguous(bias)
    if rows.shape[0] == 0 or out_features == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    dot = "fp8" if gpu_of(x.device).capability >= FP8_CAPABILITY else "fp16"
    with on_device(x):
        codes, scale = _quantized_rows(rows, torch.float8_e4m3fn, "e4m3", input_scale, None)
        row_scale = (scale, 1) if input_scale is None else (input_scale, 0)
        column_scale = (weight_scale, weight_scale.stride(0) if weight_scale.shape[0] == out_features else 0)
        return _multiplied(x, codes, weight, row_scale, column_scale, None, bias, dot)


def linear_weight_only_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_weight_only_reference` in Triton: x in its own 16 bits, or in float32 as three products of TF32.

    Raises:
        ValueError: shapes that do not go together, or groups that are no multiple of 16 (int8) or 32 (int4).
    """
    if fell_back("linear_weight_only", "CUDA", triton_supports(x)):
        return linear_weight_only_reference(x, weight, weight_scale, weight_zero, bias)
    check_devices(x, weight, weight_scale, weight_zero, bias)
    out_features, in_features, num_groups = check_weight_only(x, weight, weight_scale, weight_zero, bias)
    rows, bias = x.reshape(-1, in_features), _contiguous(bias)
    smallest = WEIGHT_BLOCK if weight.dtype == torch.uint8 else 16
    if num_groups > 1 and in_features // num_groups % smallest:
        raise ValueError(
            f"linear_weight_only on CUDA takes groups of a multiple of {smallest}, not {in_features // num_groups}"
        )
    output = x.new_empty((*x.shape[:-1], out_features))
    if output.numel() == 0:
        return output
    dot = "fp32" if x.dtype == torch.float32 else "own"
    group_size = in_features // num_groups
    tiles = _linear_tiles(
        rows.shape[0], in_features, 32 if dot == "fp32" else 16, gpu_of(x.device).capability
    )  # fmt: skip
    if num_groups > 1:  # a tile stays within a group, and has a sum for it beside the whole sum
        block = min(tiles.block_k, group_size & -group_size)
        stages = min(tiles.stages * (tiles.block_k // block), 8)  # as many bytes in flight
        tiles = tiles._replace(block_k=block, block_n=min(tiles.block_n, 64), stages=stages)
    with on_device(x):
        weight_only_kernel[(-(-rows.shape[0] // tiles.block_m) * -(-out_features // tiles.block_n),)](
            strided(rows), strided(weight), strided(weight_scale),
            None if weight_zero is None else strided(weight_zero), output, bias,
            rows.shape[0], out_features, in_features, group_size,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            IS_EVEN=in_features % tiles.block_k == 0,
            IS_INT4=weight.dtype == torch.uint8, IS_GROUPED=num_groups > 1, PACKED=WEIGHT_BLOCK, DOT=dot,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return output
