"""What the CPU kernels have in common when they describe tensors to C: element types and broadcast strides."""

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
"""Element types that the kernels load, by their number in vector.h; uint8 is int4, two codes in a byte."""
FLOAT_KINDS = {dtype: KINDS[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)}
"""Those of values that are no codes."""


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
