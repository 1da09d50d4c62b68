"""The codec on the CPU: `codec.c` behind the Python signatures of the references."""

import struct

import torch

from ..codes import CODE_RANGES, check_levels, code_width, stored_width
from ..compile import CKernel
from ..operands import FLOAT_KINDS, KINDS, broadcast_strides
from .reference import decode_reference, encode_reference, encode_token_reference

CODEC_KERNEL = CKernel(
    "codec",
    ("ops/vector.h", "ops/rounding.h", "ops/codec/packed.h", "ops/codec/codec.c"),
    ("encode", "encode_token", "decode"),
)
_pack_codec = struct.Struct("41q").pack
_NO_STRIDES = (0, 0, 0, 0)
_NO_ROPE = (0, 0, 0), (0, 0), (0, 0)
_Rope = tuple[tuple[int, int, int], tuple[int, ...], tuple[int, ...]]
_MaybeTensor = torch.Tensor | None


def _loadable(x: torch.Tensor) -> torch.Tensor:
    """`x` as the kernel reads it: a dtype that it loads, the last dimension contiguous."""
    if x.dtype not in FLOAT_KINDS:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_codes(x: torch.Tensor, codes: torch.Tensor, position: torch.Tensor | None, bits: int) -> None:
    if codes.dtype not in CODE_RANGES or x.dim() != 4 or codes.dim() != 4:
        raise ValueError(
            f"x {tuple(x.shape)} cannot become {codes.dtype} {tuple(codes.shape)}: not codes of 4 dimensions"
        )
    batch, heads, tokens, width = x.shape
    stored = stored_width(width, codes.dtype, bits)
    expected = (batch, heads, codes.shape[2] if position is not None else tokens, stored)
    if codes.shape != expected:
        raise ValueError(
            f"codes must be {str(codes.dtype)[6:]} {expected} for x {tuple(x.shape)}, not {tuple(codes.shape)}"
        )


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


def _rope(x: torch.Tensor, cos: _MaybeTensor, sin: _MaybeTensor) -> tuple[_MaybeTensor, _MaybeTensor, _Rope]:
    """cos and sin as the kernel reads them, and their addresses and kind, and their strides over batch and tokens."""
    if cos is None or sin is None:
        return None, None, _NO_ROPE
    batch, _, tokens, width = x.shape
    if cos.shape != sin.shape or cos.shape[1:] != (tokens, width) or cos.shape[0] not in (1, batch) or width < 2:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not belong to x {tuple(x.shape)}")
    if cos.dtype != sin.dtype:
        cos, sin = cos.float(), sin.float()
    cos, sin = _loadable(cos), _loadable(sin)
    strides = tuple((0 if part.shape[0] == 1 else part.stride(0), part.stride(1)) for part in (cos, sin))
    return cos, sin, ((cos.data_ptr(), sin.data_ptr(), FLOAT_KINDS[cos.dtype]), *strides)


def _static_part(
    part: torch.Tensor, batch: int, heads: int, tokens: int, width: int
) -> tuple[torch.Tensor, int, tuple[int, ...]]:
    """A static scale or zero in float32 or float16, its groups of channels, and its strides over batch, heads, tokens
    and groups.

    Raises:
        ValueError: it does not broadcast to the rows, or its groups do not divide the channels.
    """
    if part.dtype not in (torch.float32, torch.float16):
        part = part.float()
    groups = part.shape[-1] if part.dim() else 1
    if groups > 1 and part.stride(-1) != 1:
        part = part.contiguous()
    if not groups or width % groups:
        raise ValueError(f"{groups} groups of a scale or zero {tuple(part.shape)} do not divide {width} channels")
    if part.dim() == 3 and part.shape[1] == 1 and part.shape[0] == heads:  # what a cache has, without the loop
        return part, groups, (0, part.stride(0), 0, groups > 1)
    return part, groups, broadcast_strides(part, (batch, heads, tokens, groups))


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
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
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
        return encode_reference(x, scale, zero, codes, cos, sin, position, bits, levels)
    _check_codes(x, codes, position, bits)
    levels, levels_at = _levels_at(codes.dtype, bits, levels)
    x, shape, capacity = _loadable(x), x.shape, codes.shape[2]
    scale, groups, scale_strides = _static_part(scale, *shape)
    zero_groups, zero_strides = 1, _NO_STRIDES
    if zero is not None:
        zero, zero_groups, zero_strides = _static_part(zero, *shape)
    cos, sin, ((cos_at, sin_at, rope_kind), cos_strides, sin_strides) = _rope(x, cos, sin)
    if position is not None and position.dtype != torch.int64:
        position = position.long()
    target = codes if codes.stride(3) == 1 else codes.contiguous()
    failed = run(
        _pack_codec(
            x.data_ptr(),
            target.data_ptr(),
            scale.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            cos_at,
            sin_at,
            0 if position is None else position.data_ptr(),
            levels_at,
            KINDS[x.dtype],
            KINDS[codes.dtype],
            bits,
            KINDS[scale.dtype],
            1 if zero is None else KINDS[zero.dtype],
            rope_kind,
            *shape,
            capacity,
            groups,
            zero_groups,
            1,
            torch.get_num_threads(),
            *x.stride()[:3],
            *target.stride()[:3],
            *scale_strides,
            *zero_strides,
            *cos_strides,
            *sin_strides,
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
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
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
        return encode_token_reference(x, codes, scale, zero, cos, sin, position, bits)
    _check_codes(x, codes, position, bits)
    x, shape, capacity = _loadable(x), x.shape, codes.shape[2]
    groups = scale.shape[-1]
    if scale.shape != (*codes.shape[:3], groups) or not groups or shape[3] % groups:
        raise ValueError(
            f"scale {tuple(scale.shape)} does not belong to codes {tuple(codes.shape)} of x {tuple(shape)}"
        )
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero {tuple(zero.shape)} must be of the shape of scale, {tuple(scale.shape)}")
    for part in (scale, zero):
        if part is not None and part.dtype not in (torch.float32, torch.float16):
            raise ValueError(f"scale and zero are written as float32 or float16, not {part.dtype}")
    cos, sin, ((cos_at, sin_at, rope_kind), cos_strides, sin_strides) = _rope(x, cos, sin)
    if position is not None and position.dtype != torch.int64:
        position = position.long()
    target = codes if codes.stride(3) == 1 else codes.contiguous()
    failed = run(
        _pack_codec(
            x.data_ptr(),
            target.data_ptr(),
            scale.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            cos_at,
            sin_at,
            0 if position is None else position.data_ptr(),
            0,
            KINDS[x.dtype],
            KINDS[codes.dtype],
            bits,
            KINDS[scale.dtype],
            1 if zero is None else KINDS[zero.dtype],
            rope_kind,
            *shape,
            capacity,
            groups,
            groups,
            1,
            torch.get_num_threads(),
            *x.stride()[:3],
            *target.stride()[:3],
            *scale.stride(),
            *(_NO_STRIDES if zero is None else zero.stride()),
            *cos_strides,
            *sin_strides,
        )
    )
    if failed:
        _raise_failure(failed, position, shape[2], capacity)
    if target is not codes:
        codes.copy_(target)
    return None


def _grouped_part(
    part: torch.Tensor | None, shape: tuple[int, ...], token_group: int
) -> tuple[torch.Tensor | None, int, tuple[int, ...]]:
    """As `_static_part`, for rows of which each serves `token_group` tokens."""
    if part is None:
        return None, 1, _NO_STRIDES
    batch, heads, tokens, width = shape
    return _static_part(part, batch, heads, -(-tokens // token_group), width)


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
        return decode_reference(codes, scale, zero, token_group, bits, levels)
    if codes.dim() != 4 or token_group < 1:
        raise ValueError(f"codes must have 4 dimensions and token_group be positive, not {codes.dim()}, {token_group}")
    if codes.dtype not in KINDS:
        codes = codes.float()
    if codes.stride(3) != 1:
        codes = codes.contiguous()
    shape = (*codes.shape[:3], code_width(codes, bits))
    levels, levels_at = _levels_at(codes.dtype, bits, levels)
    scale, groups, scale_strides = _grouped_part(scale, shape, token_group)
    zero, zero_groups, zero_strides = _grouped_part(zero, shape, token_group)
    output = torch.empty(shape)
    failed = run(
        _pack_codec(
            output.data_ptr(),
            codes.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            0,
            0,
            0,
            levels_at,
            1,
            KINDS[codes.dtype],
            bits,
            1 if scale is None else KINDS[scale.dtype],
            1 if zero is None else KINDS[zero.dtype],
            0,
            *shape,
            shape[2],
            groups,
            zero_groups,
            token_group,
            torch.get_num_threads(),
            *output.stride()[:3],
            *codes.stride()[:3],
            *scale_strides,
            *zero_strides,
            *_NO_STRIDES,
        )
    )
    if failed:
        _raise_failure(failed, None, shape[2], shape[2])
    return output
