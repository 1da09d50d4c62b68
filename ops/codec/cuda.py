"""The codec on CUDA GPUs: the Triton kernels of `cuda_kernels.py` behind the signatures of the references."""

from collections.abc import Callable

import torch

from ..shared.codes import LARGEST_ZERO, SMALLEST_SCALE, code_range
from ..shared.operands import part_strides
from ..shared.triton_helpers import (
    CODE_KINDS,
    FP8_CAPABILITY,
    Launch,
    by_plan,
    cuda_description,
    dense_part,
    gpu_of,
    power_of_two,
)
from .arguments import check_decode, check_encode, check_encode_token
from .cuda_kernels import decode_kernel, encode_kernel, encode_token_kernel
from .reference import decode_reference, encode_reference, encode_token_reference

CODEC_CUDA = cuda_description("a pass over the values, with the append at `position` in it")
PARTS = {4: 1, 3: 4, 2: 2}
"""In how many parts kernels take half of the channels, by the bits of codes in uint8."""


def _strides_of_part(
    name: str, part: torch.Tensor | None, shape: tuple[int, ...], token_group: int
) -> tuple[int, ...] | None:
    """What kernels take of a scale or zero of codes `[B, G, S, D]` behind its pointer.

    Those are the strides of B, G, rows and groups, and the size of a group.

    Raises:
        ValueError: it does not belong to them.
    """
    if part is None:
        return None
    _, num_groups, strides = part_strides(name, part, shape, token_group)
    return (*strides, shape[3] // num_groups)


def _operand(part: torch.Tensor | None, strides: tuple[int, ...] | None) -> tuple | None:
    return None if part is None else (part, *strides)


def _do_nothing(*unused: object) -> None:
    """Of a call of no tokens."""


def _channel_constants(codes: torch.Tensor, head_dim: int, bits: int) -> dict[str, int]:
    """How a program takes half of `head_dim` channels: lanes, parts, and the bits of codes in uint8."""
    if codes.dtype != torch.uint8:
        bits = 4
    parts = PARTS[bits]
    return {"BLOCK_H": parts * power_of_two(-(-head_dim // (2 * parts))), "PARTS": parts, "BITS": bits}


def _rows_per_program(rows: int) -> tuple[int, int]:
    """Rows of head_dim and warps of a program: small ones where there are few rows, so that all start at once."""
    return (4, 1) if rows <= 4096 else (16, 4)


def _plan_encode(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    position: torch.Tensor | None,
    bits: int,
    levels: torch.Tensor | None,
) -> Callable[..., None]:
    check_encode(x, scale, zero, codes, position, bits, levels)
    batch, kv_heads, tokens, head_dim = x.shape
    numbers = batch * kv_heads * tokens, kv_heads, tokens, codes.shape[2]
    if x.numel() == 0:
        return _do_nothing
    block, warps = _rows_per_program(numbers[0])
    constants = {"HEAD_DIM": head_dim, "BLOCK_R": block, "KIND": CODE_KINDS[codes.dtype],
                 **_channel_constants(codes, head_dim, bits)}  # fmt: skip
    launch = Launch(encode_kernel, (-(-numbers[0] // block),), constants, num_warps=warps, enable_fp_fusion=False)
    strides, code_strides = x.stride(), codes.stride()
    scale_strides = _strides_of_part("scale", scale, x.shape, 1)
    zero_strides = _strides_of_part("zero", zero, x.shape, 1)

    def run(
        x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, codes: torch.Tensor,
        position: torch.Tensor | None, bits: int, levels: torch.Tensor | None,
    ) -> None:  # fmt: skip
        launch(
            (x, *strides), (scale, *scale_strides), _operand(zero, zero_strides), (codes, *code_strides),
            dense_part(levels), position, *numbers,
        )  # fmt: skip

    return run


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
    by_plan("encode", encode_reference, _plan_encode, (x, scale, zero, codes, position, bits, levels))


def _plan_encode_token(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    position: torch.Tensor | None,
    bits: int,
) -> Callable[..., None]:
    check_encode_token(x, codes, scale, zero, position, bits)
    batch, kv_heads, tokens, head_dim = x.shape
    numbers = batch * kv_heads * tokens, kv_heads, tokens, codes.shape[2]
    if x.numel() == 0:
        return _do_nothing
    low, high = code_range(codes.dtype, bits)
    block, warps = _rows_per_program(numbers[0])
    constants = {"HEAD_DIM": head_dim, "NUM_GROUPS": scale.shape[3], "LOW": low, "HIGH": high,
                 "SMALLEST": SMALLEST_SCALE, "LARGEST_ZERO": LARGEST_ZERO, "BLOCK_R": block,
                 "KIND": CODE_KINDS[codes.dtype], **_channel_constants(codes, head_dim, bits)}  # fmt: skip
    launch = Launch(encode_token_kernel, (-(-numbers[0] // block),), constants, num_warps=warps, enable_fp_fusion=False)
    strides, code_strides, scale_strides = x.stride(), codes.stride(), scale.stride()
    zero_strides = None if zero is None else zero.stride()

    def run(
        x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None,
        position: torch.Tensor | None, bits: int,
    ) -> None:  # fmt: skip
        launch(
            (x, *strides), (codes, *code_strides), (scale, *scale_strides), _operand(zero, zero_strides), position,
            *numbers,
        )  # fmt: skip

    return run


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
    by_plan("encode_token", encode_token_reference, _plan_encode_token, (x, codes, scale, zero, position, bits))


def _plan_decode(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_group: int,
    bits: int,
    levels: torch.Tensor | None,
) -> Callable[..., torch.Tensor]:
    shape = batch, kv_heads, tokens, head_dim = check_decode(codes, scale, zero, token_group, bits, levels)
    numbers = batch * kv_heads * tokens, kv_heads, tokens
    if 0 in shape:
        return lambda codes, *_: torch.empty(shape, dtype=torch.float32, device=codes.device)
    block, warps = _rows_per_program(numbers[0])
    constants = {"HEAD_DIM": head_dim, "TOKEN_GROUP": token_group, "BLOCK_R": block,
                 "KIND": CODE_KINDS.get(codes.dtype, "float"),
                 "NATIVE": gpu_of(codes.device).capability >= FP8_CAPABILITY,
                 **_channel_constants(codes, head_dim, bits)}  # fmt: skip
    launch = Launch(decode_kernel, (-(-numbers[0] // block),), constants, num_warps=warps, enable_fp_fusion=False)
    strides = codes.stride()
    scale_strides = _strides_of_part("scale", scale, shape, token_group)
    zero_strides = _strides_of_part("zero", zero, shape, token_group)

    def run(
        codes: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, token_group: int, bits: int,
        levels: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        output = torch.empty(shape, dtype=torch.float32, device=codes.device)
        launch(
            (codes, *strides), _operand(scale, scale_strides), _operand(zero, zero_strides),
            dense_part(levels), output, *numbers,
        )  # fmt: skip
        return output

    return run


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
    return by_plan("decode", decode_reference, _plan_decode, (codes, scale, zero, token_group, bits, levels))
