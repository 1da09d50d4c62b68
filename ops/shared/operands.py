"""What the kernels have in common when they take tensors: which element types, how they broadcast, what is refused.

Every version of an op, the reference included, refuses the same arguments, by the functions here and by those in the
`arguments.py` of the op. They look at what tensors say of themselves, never at what they hold.
"""

import torch

KINDS = {
    torch.int8: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.float8_e4m3fn: 5,
    torch.float8_e5m2: 6,
}
"""Element types that the CPU kernels load, by their number in vector.h; uint8 is int4, two codes in a byte."""
FLOAT_KINDS = {dtype: KINDS[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)}
"""Those of values that are no codes."""
VALUE_DTYPES = frozenset((*FLOAT_KINDS, torch.float64))
"""Element types of values, scales and zeros."""
STORED_DTYPES = frozenset((*KINDS, torch.float64))
"""Those of what may be decoded: codes, or values as they are."""
INDEX_DTYPES = frozenset((torch.int32, torch.int64))
"""Those of positions and lengths."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name as people write it, `int8`."""
    return str(dtype)[6:]


def broadcast_strides(tensor: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides that read `tensor` as if it were expanded to `shape`: those of `expand`, which takes longer.

    Raises:
        ValueError: the tensor does not broadcast to the shape.
    """
    missing = len(shape) - tensor.dim()
    sizes, strides = tensor.shape, tensor.stride()
    for size, wanted in zip(sizes, shape[missing:] if missing > 0 else shape, strict=False):
        if size != wanted and size != 1:
            missing = -1
    if missing < 0:
        raise ValueError(f"{tuple(sizes)} does not broadcast to {tuple(shape)}")
    return (0,) * missing + tuple([0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)])


def part_strides(
    name: str, part: torch.Tensor, shape: tuple[int, int, int, int], token_group: int
) -> tuple[int, int, tuple[int, ...]]:
    """A scale or zero of codes of shape `[B, G, S, D]`: its rows, groups of channels, and strides over B, G and both.

    Args:
        part: `[..., T, W]`; T is 1 or `ceil(S / token_group)`, W divides D.

    Raises:
        ValueError: it does not belong to them.
    """
    batch, kv_heads, tokens, head_dim = shape
    sizes = part.shape
    rows, num_groups = (1, 1, *sizes)[-2:]
    if part.dtype not in VALUE_DTYPES:
        raise ValueError(f"{name} must be float32 or float16, not {dtype_name(part.dtype)}")
    if num_groups < 1 or head_dim % num_groups or (rows != 1 and rows != -(-tokens // token_group)):
        raise ValueError(
            f"{name} {tuple(sizes)} does not belong to {tokens} tokens in groups of {token_group} and {head_dim} "
            f"channels"
        )
    if rows == 1 and len(sizes) == 3 and sizes[0] == kv_heads:  # what is static, quickly
        return 1, num_groups, (0, part.stride(0), 0, part.stride(2) if num_groups > 1 else 0)
    return rows, num_groups, broadcast_strides(part, (batch, kv_heads, rows, num_groups))


def check_index(name: str, index: torch.Tensor, batch: int = 1) -> None:
    """Raise ValueError unless a position or length is int32 or int64, `[1]` or one number for each sequence."""
    if index.dtype not in INDEX_DTYPES:
        raise ValueError(f"{name} must be int64 or int32, not {dtype_name(index.dtype)}")
    if index.dim() != 1 or index.shape[0] not in (1, batch):
        raise ValueError(
            f"{name} {tuple(index.shape)} has neither one number nor one for each of {batch} sequences; it is a vector"
        )


def check_devices(tensor: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors are where the first is."""
    device = tensor.device
    for other in others:
        if other is not None and other.device != device:
            raise ValueError(f"all tensors must be on {device}, and one is on {other.device}")


def check_written(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError if several elements of a tensor that is to be written are one in memory, as after `expand`."""
    strides = tensor.stride()
    if 0 in strides and any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, strides, strict=True)):
        raise ValueError(f"{name} {tuple(tensor.shape)} is written, and elements of it share memory: strides {strides}")
