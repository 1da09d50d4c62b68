"""The codec on CUDA GPUs: the Triton kernels of `cuda_kernels.py` behind the signatures of the references."""

import torch

from ..shared.codes import LARGEST_ZERO, SMALLEST_SCALE, code_range
from ..shared.fallback import fell_back
from ..shared.operands import part_strides
from ..shared.triton_helpers import (
    CODE_KINDS,
    FP8_CAPABILITY,
    cuda_description,
    gpu_of,
    on_device,
    power_of_two,
    raw_codes,
    strided,
    triton_supports,
)
from .arguments import check_decode, check_encode, check_encode_token
from .cuda_kernels import decode_kernel, encode_kernel, encode_token_kernel
from .reference import decode_reference, encode_reference, encode_token_reference

CODEC_CUDA = cuda_description("a pass over the values, with the append at `position` in it")
PARTS = {4: 1, 3: 4, 2: 2}
"""In how many parts kernels take half of the channels, by the bits of codes in uint8."""


def _codec_part(name: str, part: torch.Tensor | None, shape: tuple[int, ...], token_group: int) -> tuple | None:
    """A scale or zero of codes of shape `[B, G, S, D]`: `(pointer, strides of B, G, rows and groups, size of a group)`.

    Raises:
        ValueError: it does not belong to them.
    """
    if part is None:
        return None
    _, num_groups, strides = part_strides(name, part, shape, token_group)
    return (part, *strides, shape[3] // num_groups)


def _channel_constants(codes: torch.Tensor, head_dim: int, bits: int) -> dict[str, int]:
    """How a program takes half of `head_dim` channels: lanes, parts, and the bits of codes in uint8."""
    if codes.dtype != torch.uint8:
        bits = 4
    parts = PARTS[bits]
    return {"BLOCK_H": parts * power_of_two(-(-head_dim // (2 * parts))), "PARTS": parts, "BITS": bits}


def _rows_per_program(rows: int) -> tuple[int, int]:
    """Rows of head_dim and warps of a program: small ones where there are few rows, so that all start at once."""
    return (4, 1) if rows <= 4096 else (16, 4)


def encode_cuda(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    position: torch.Tensor | None = None,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> None:
    """`encode_reference` in Triton; tokens that would go beyond the storage are left out.

    Raises:
        ValueError: what does not go together, as the reference says.
        IndexError: more tokens than the storage has.
    """
    if fell_back("encode", "CUDA", triton_supports(x)):
        return encode_reference(x, scale, zero, codes, position, bits, levels)
    check_encode(x, scale, zero, codes, position, bits, levels)
    batch, kv_heads, tokens, head_dim = x.shape
    rows = batch * kv_heads * tokens
    if x.numel() == 0:
        return None
    block, warps = _rows_per_program(rows)
    with on_device(x):
        encode_kernel[(-(-rows // block),)](
            strided(x), _codec_part("scale", scale, x.shape, 1), _codec_part("zero", zero, x.shape, 1),
            strided(raw_codes(codes)), None if levels is None else levels.contiguous(), position,
            rows, kv_heads, tokens, codes.shape[2],
            HEAD_DIM=head_dim, BLOCK_R=block, KIND=CODE_KINDS[codes.dtype], **_channel_constants(codes, head_dim, bits),
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return None


def encode_token_cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    bits: int = 4,
) -> None:
    """`encode_token_reference` in Triton; tokens that would go beyond the storage are left out.

    Raises:
        ValueError: what does not go together, as the reference says.
        IndexError: more tokens than the storage has.
    """
    if fell_back("encode_token", "CUDA", triton_supports(x)):
        return encode_token_reference(x, codes, scale, zero, position, bits)
    check_encode_token(x, codes, scale, zero, position, bits)
    batch, kv_heads, tokens, head_dim = x.shape
    rows = batch * kv_heads * tokens
    if x.numel() == 0:
        return None
    low, high = code_range(codes.dtype, bits)
    block, warps = _rows_per_program(rows)
    with on_device(x):
        encode_token_kernel[(-(-rows // block),)](
            strided(x), strided(raw_codes(codes)), strided(scale), None if zero is None else strided(zero), position,
            rows, kv_heads, tokens, codes.shape[2],
            HEAD_DIM=head_dim, NUM_GROUPS=scale.shape[3], LOW=low, HIGH=high, SMALLEST=SMALLEST_SCALE,
            LARGEST_ZERO=LARGEST_ZERO, BLOCK_R=block, KIND=CODE_KINDS[codes.dtype],
            **_channel_constants(codes, head_dim, bits), num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return None


def decode_cuda(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_group: int = 1,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode_reference` in Triton.

    Raises:
        ValueError: shapes that do not go together.
    """
    if fell_back("decode", "CUDA", triton_supports(codes)):
        return decode_reference(codes, scale, zero, token_group, bits, levels)
    shape = batch, kv_heads, tokens, head_dim = check_decode(codes, scale, zero, token_group, bits, levels)
    output = torch.empty(shape, dtype=torch.float32, device=codes.device)
    rows = batch * kv_heads * tokens
    if output.numel() == 0:
        return output
    block, warps = _rows_per_program(rows)
    with on_device(codes):
        decode_kernel[(-(-rows // block),)](
            strided(raw_codes(codes)), _codec_part("scale", scale, shape, token_group),
            _codec_part("zero", zero, shape, token_group), None if levels is None else levels.contiguous(), output,
            rows, kv_heads, tokens,
            HEAD_DIM=head_dim, TOKEN_GROUP=token_group, BLOCK_R=block, **_channel_constants(codes, head_dim, bits),
            KIND=CODE_KINDS.get(codes.dtype, "float"), NATIVE=gpu_of(codes.device).capability >= FP8_CAPABILITY,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return output
