"""The codec on the CPU: `codec.c` behind the Python signatures of the references."""

import struct

import torch

from ..shared.codes import check_levels
from ..shared.compile import CKernel
from ..shared.fallback import fell_back
from ..shared.operands import FLOAT_KINDS, KINDS, part_strides
from .arguments import check_stored, check_target, check_token_parts
from .reference import decode_reference, encode_reference, encode_token_reference

CODEC_KERNEL = CKernel(
    "codec",
    (
        "ops/shared/vector.h",
        "ops/shared/rounding.h",
        "ops/codec/packed.h",
        "ops/codec/arguments.h",
        "ops/codec/codec.c",
    ),
    ("encode", "encode_token", "decode"),
)
_pack_codec = struct.Struct("34q").pack
_NO_STRIDES = (0, 0, 0, 0)
_MaybeTensor = torch.Tensor | None


def _loadable(x: torch.Tensor) -> torch.Tensor:
    """`x` as the kernel reads it: a dtype that it loads, the last dimension contiguous."""
    if x.dtype not in FLOAT_KINDS:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _levels_at(dtype: torch.dtype, bits: int, levels: _MaybeTensor) -> tuple[_MaybeTensor, int]:
    """A codebook as the kernel reads it, and its address.

    Raises:
        ValueError: it is none for codes of `bits` in a tensor of `dtype`.
    """
    if levels is None:
        return None, 0
    check_levels(dtype, bits, levels)
    levels = levels.contiguous()
    return levels, levels.data_ptr()


def _packed_scale(
    name: str, part: torch.Tensor | None, shape: tuple[int, int, int, int], token_group: int = 1
) -> tuple[torch.Tensor | None, int, tuple[int, ...]]:
    """A scale or zero as the kernel reads it, its groups of channels, and strides over B, G, rows and groups.

    Raises:
        ValueError: it does not belong to codes of this shape.
    """
    if part is None:
        return None, 1, _NO_STRIDES
    _, num_groups, strides = part_strides(name, part, shape, token_group)
    if part.dtype not in (torch.float32, torch.float16) or (num_groups > 1 and strides[3] != 1):
        part = (part if part.dtype == torch.float16 else part.float()).contiguous()
        strides = part_strides(name, part, shape, token_group)[2]
    return part, num_groups, strides


def _raise_failure(failed: int, position: torch.Tensor | None, tokens: int, capacity: int) -> None:
    if failed == 1:
        raise MemoryError("the codec on the CPU found no memory for its scratch")
    if position is None:
        raise ValueError(f"{tokens} tokens do not fit into {capacity}")
    raise IndexError(f"{tokens} tokens from position {position.item()} on do not fit into storage of {capacity}")


def encode_cpu(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    position: torch.Tensor | None = None,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> None:
    """`encode_reference` in C.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        IndexError: `position` is such that the tokens do not fit into the storage.
        MemoryError: no room for the scratch of the threads.
    """
    run = CODEC_KERNEL.load().get("encode")
    if run is None:
        fell_back("encode", "CPU", CODEC_KERNEL.supports())
        return encode_reference(x, scale, zero, codes, position, bits, levels)
    check_target(x, codes, position, bits)
    levels, levels_at = _levels_at(codes.dtype, bits, levels)
    x, shape, capacity = _loadable(x), x.shape, codes.shape[2]
    scale, num_groups, scale_strides = _packed_scale("scale", scale, shape)
    zero, zero_groups, zero_strides = _packed_scale("zero", zero, shape)
    if position is not None and position.dtype != torch.int64:
        position = position.long()
    target = codes if codes.stride(3) == 1 else codes.contiguous()
    failed = run(
        _pack_codec(
            x.data_ptr(),
            target.data_ptr(),
            scale.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            0 if position is None else position.data_ptr(),
            levels_at,
            KINDS[x.dtype],
            KINDS[codes.dtype],
            bits,
            KINDS[scale.dtype],
            1 if zero is None else KINDS[zero.dtype],
            *shape,
            capacity,
            num_groups,
            zero_groups,
            1,
            torch.get_num_threads(),
            *x.stride()[:3],
            *target.stride()[:3],
            *scale_strides,
            *zero_strides,
        )
    )
    if failed:
        _raise_failure(failed, position, shape[2], capacity)
    if target is not codes:
        codes.copy_(target)
    return None


def encode_token_cpu(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    bits: int = 4,
) -> None:
    """`encode_token_reference` in C.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        IndexError: `position` is such that the tokens do not fit into the storage.
        MemoryError: no room for the scratch of the threads.
    """
    run = CODEC_KERNEL.load().get("encode_token")
    if run is None:
        fell_back("encode_token", "CPU", CODEC_KERNEL.supports())
        return encode_token_reference(x, codes, scale, zero, position, bits)
    check_target(x, codes, position, bits)
    num_groups = check_token_parts(x, codes, scale, zero)
    x, shape, capacity = _loadable(x), x.shape, codes.shape[2]
    if position is not None and position.dtype != torch.int64:
        position = position.long()
    target = codes if codes.stride(3) == 1 else codes.contiguous()
    failed = run(
        _pack_codec(
            x.data_ptr(),
            target.data_ptr(),
            scale.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            0 if position is None else position.data_ptr(),
            0,
            KINDS[x.dtype],
            KINDS[codes.dtype],
            bits,
            KINDS[scale.dtype],
            1 if zero is None else KINDS[zero.dtype],
            *shape,
            capacity,
            num_groups,
            num_groups,
            1,
            torch.get_num_threads(),
            *x.stride()[:3],
            *target.stride()[:3],
            *scale.stride(),
            *(_NO_STRIDES if zero is None else zero.stride()),
        )
    )
    if failed:
        _raise_failure(failed, position, shape[2], capacity)
    if target is not codes:
        codes.copy_(target)
    return None


def decode_cpu(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_group: int = 1,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode_reference` in C.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        MemoryError: no room for the scratch of the threads.
    """
    run = CODEC_KERNEL.load().get("decode")
    if run is None:
        fell_back("decode", "CPU", CODEC_KERNEL.supports())
        return decode_reference(codes, scale, zero, token_group, bits, levels)
    shape = check_stored(codes, token_group, bits)
    if codes.dtype not in KINDS:
        codes = codes.float()
    if codes.stride(3) != 1:
        codes = codes.contiguous()
    levels, levels_at = _levels_at(codes.dtype, bits, levels)
    scale, num_groups, scale_strides = _packed_scale("scale", scale, shape, token_group)
    zero, zero_groups, zero_strides = _packed_scale("zero", zero, shape, token_group)
    output = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are
    failed = run(
        _pack_codec(
            output.data_ptr(),
            codes.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            0,
            levels_at,
            1,
            KINDS[codes.dtype],
            bits,
            1 if scale is None else KINDS[scale.dtype],
            1 if zero is None else KINDS[zero.dtype],
            *shape,
            shape[2],
            num_groups,
            zero_groups,
            token_group,
            torch.get_num_threads(),
            *output.stride()[:3],
            *codes.stride()[:3],
            *scale_strides,
            *zero_strides,
        )
    )
    if failed:
        _raise_failure(failed, None, shape[2], shape[2])
    return output
