"""What every version of the codec ops refuses."""

import torch

from ..shared.codes import CODE_RANGES, check_levels, code_width, stored_width
from ..shared.operands import (
    STORED_DTYPES,
    VALUE_DTYPES,
    check_devices,
    check_index,
    check_written,
    dtype_name,
    part_strides,
)


def check_target(x: torch.Tensor, codes: torch.Tensor, position: torch.Tensor | None, bits: int) -> None:
    """Raise unless `codes` has room for the codes of x.

    Raises:
        ValueError: dtypes or shapes that do not go together, or a position that is not one number.
        IndexError: more tokens than the storage has, from whatever position on.
    """
    if codes.dtype not in CODE_RANGES or x.dtype not in VALUE_DTYPES or x.dim() != 4 or codes.dim() != 4:
        raise ValueError(
            f"x {dtype_name(x.dtype)} {tuple(x.shape)} cannot become {dtype_name(codes.dtype)} {tuple(codes.shape)}: "
            f"not float values and codes of 4 dimensions"
        )
    batch, kv_heads, tokens, head_dim = x.shape
    if not head_dim:
        raise ValueError(f"x {tuple(x.shape)} has no channels")
    capacity = tokens
    if position is not None:
        check_index("position", position)
        capacity = codes.shape[2]
    expected = (batch, kv_heads, capacity, stored_width(head_dim, codes.dtype, bits))
    if codes.shape != expected:
        raise ValueError(
            f"codes must be {dtype_name(codes.dtype)} {expected} for x {tuple(x.shape)}, not {tuple(codes.shape)}"
        )
    if tokens > capacity:
        raise IndexError(f"{tokens} tokens do not fit into storage of {capacity}")
    check_written("codes", codes)


def check_position(position: torch.Tensor, tokens: int, capacity: int) -> None:
    """Raise IndexError unless so many tokens fit into the storage; reads `position`, which is on the CPU."""
    if not 0 <= position.item() <= capacity - tokens:
        raise IndexError(f"{tokens} tokens from position {position.item()} on do not fit into storage of {capacity}")


def check_token_parts(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> int:
    """The number of groups of channels of a scale and zero that are to be written.

    Raises:
        ValueError: they do not belong to the codes.
    """
    shape, head_dim = scale.shape, x.shape[3]
    num_groups = shape[3] if len(shape) == 4 else 0
    if not num_groups or shape[:3] != codes.shape[:3] or head_dim % num_groups:
        raise ValueError(f"scale {tuple(shape)} does not belong to codes {tuple(codes.shape)} of x {tuple(x.shape)}")
    if zero is not None and zero.shape != shape:
        raise ValueError(f"zero {tuple(zero.shape)} must be of the shape of scale, {tuple(shape)}")
    for name, part in (("scale", scale), ("zero", zero)):
        if part is not None:
            if part.dtype not in (torch.float32, torch.float16):
                raise ValueError(f"scale and zero are written as float32 or float16, not {part.dtype}")
            check_written(name, part)
    return num_groups


def check_stored(codes: torch.Tensor, token_group: int, bits: int) -> tuple[int, int, int, int]:
    """The shape `[B, G, S, D]` of what is decoded.

    Raises:
        ValueError: it has not 4 dimensions, is of no dtype of codes or values, or `token_group` is not positive.
    """
    if codes.dim() != 4 or token_group < 1:
        raise ValueError(f"codes must have 4 dimensions and token_group be positive, not {codes.dim()}, {token_group}")
    if codes.dtype not in STORED_DTYPES:
        raise ValueError(f"codes are int8, uint8, fp8 or float values, not {dtype_name(codes.dtype)}")
    if not codes.shape[3]:
        raise ValueError(f"codes {tuple(codes.shape)} have no channels")
    return (*codes.shape[:3], code_width(codes, bits))


def check_encode(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    position: torch.Tensor | None,
    bits: int,
    levels: torch.Tensor | None,
) -> None:
    """Raise ValueError or IndexError as `encode` does, but for what stands in `position`."""
    check_devices(x, scale, zero, codes, position, levels)
    check_target(x, codes, position, bits)
    check_levels(codes.dtype, bits, levels)
    for name, part in (("scale", scale), ("zero", zero)):
        if part is not None:
            part_strides(name, part, x.shape, 1)


def check_encode_token(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    position: torch.Tensor | None,
    bits: int,
) -> None:
    """Raise ValueError or IndexError as `encode_token` does, but for what stands in `position`."""
    check_devices(x, codes, scale, zero, position)
    check_target(x, codes, position, bits)
    check_token_parts(x, codes, scale, zero)


def check_decode(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_group: int,
    bits: int,
    levels: torch.Tensor | None,
) -> tuple[int, int, int, int]:
    """The shape `[B, G, S, D]` of what is decoded; raises ValueError as `decode` does."""
    shape = check_stored(codes, token_group, bits)
    check_devices(codes, scale, zero, levels)
    check_levels(codes.dtype, bits, levels)
    for name, part in (("scale", scale), ("zero", zero)):
        if part is not None:
            part_strides(name, part, shape, token_group)
    return shape
