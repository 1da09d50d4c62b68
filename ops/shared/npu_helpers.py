"""What the kernels for Ascend NPUs share: torch_npu, tensors as its ops take them, and how to speak of both.

These kernels are contract-tested: no NPU has run them. Every call is checked against the schemas inside torch_npu
2.13's libraries and against a model of what its documents say (`tests/ops/npu_double.py`). The documents named below
are the pages of `docs/zh/custom_APIs/torch_npu` in github.com/Ascend/op-plugin, and those named aclnn the pages of
github.com/hicann/ops-nn and ops-transformer, for Atlas A2 and A3.
"""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import torch

from .codes import FP8_DTYPES

NPU_FLOATS = (torch.float16, torch.bfloat16)
"""Float dtypes of activations that the quantizing ops of the NPU take."""


def torch_npu_module() -> ModuleType:
    """torch_npu, imported on the first call.

    Raises:
        RuntimeError: it cannot be imported; one line that says why.
    """
    try:
        import torch_npu
    except Exception as error:  # no CANN: ImportError or OSError; a CUDA build of torch: RuntimeError
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise RuntimeError(
            f"this device's kernels need torch_npu, which cannot be imported ({type(error).__name__}: {reason})"
        ) from error
    return torch_npu


def npu_description(text: str) -> Callable[[], str]:
    """What `report` says of a kernel for NPUs; looks for torch_npu and does not import it."""

    def text_now() -> str:
        installed = "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None
        return f"torch_npu{'' if installed else ' (not installed)'}, contract-tested: {text}"

    return text_now


def require_npu_float(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless a tensor is float16 or bfloat16, which is what the ops of the NPU compute in."""
    if tensor.dtype not in NPU_FLOATS:
        raise ValueError(
            f"the NPU kernels take {name} in float16 or bfloat16, not {tensor.dtype}; load the model in one"
        )


def refuse_fp8(*tensors: torch.Tensor) -> None:
    """Raise NotImplementedError if a tensor is in fp8, which Atlas A2 and A3 do not compute in.

    No op that is used here takes or gives it there; aclnnQuantize gives int8, uint8 and int32, FIA takes int8 and int4.
    """
    for tensor in tensors:
        if tensor.dtype in FP8_DTYPES:
            raise NotImplementedError(f"Atlas A2 and A3 have no {tensor.dtype}; take a scheme in int8 or int4")


def whole_storage(view: torch.Tensor) -> torch.Tensor | None:
    """The contiguous `[B, G, capacity, D]` storage whose first S tokens a cache's view `[B, G, S, D]` shows.

    The ops of the NPU take no strided K and V, but the number of valid tokens: the storage goes to them whole, nothing
    is copied. None if the tensor is no such view and not contiguous itself.
    """
    batch, kv_heads, tokens, head_dim = view.shape
    capacity = view.stride(1) // head_dim
    strides = (kv_heads * capacity * head_dim, capacity * head_dim, head_dim, 1)
    room = view.untyped_storage().nbytes() // view.element_size() - view.storage_offset()
    if capacity >= tokens and view.stride() == strides and batch * strides[0] <= room:
        return view.as_strided((batch, kv_heads, capacity, head_dim), strides)
    return view if view.is_contiguous() else None


def is_static(scale: torch.Tensor, tokens: int) -> bool:
    """Whether a scale `[..., T, W]` is one for all tokens."""
    return scale.dim() < 2 or tokens == 1 or scale.shape[-2] == 1


def _per_channel(part: torch.Tensor, batch: int, heads: int, head_dim: int) -> torch.Tensor:
    """A static scale or zero `[..., N, 1, W]` for each channel, as float32 `[batch * N * D]`."""
    part = part.float().reshape((1,) * (4 - part.dim()) + part.shape)
    channels = part.repeat_interleave(head_dim // part.shape[-1], dim=-1)
    return channels.expand(batch, heads, 1, head_dim).reshape(-1)


def quantize_static(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Codes `clamp(round(x / scale + zero), -128, 127)` by npu_quantize.

    Args:
        x: `[B, N, S, D]`, float32, float16 or bfloat16.
        scale, zero: any float dtype, `[B or 1, N or 1, 1, W]` where W divides D, or without leading dimensions; zero
            None if symmetric.

    Returns:
        int8 `[B, N, S, D]`, usually not contiguous.

    npu_quantize with `div_mode=True` divides by a scale along one axis; its other mode would multiply by the
    reciprocal. A float32 scale wants a float32 x (aclnnQuantize). Its zero points are integers, so ours, which need not
    be, are added to x first.
    """
    batch, heads, _, head_dim = x.shape
    parts = [scale] if zero is None else [scale, zero]
    by_sequence = any(part.dim() > 3 and part.shape[-4] > 1 for part in parts)
    order, inverse = ((2, 0, 1, 3), (1, 2, 0, 3)) if by_sequence else ((0, 2, 1, 3), (0, 2, 1, 3))
    channels = [_per_channel(part, batch if by_sequence else 1, heads, head_dim) for part in parts]
    moved = x.permute(order).float()
    rows = moved.reshape(-1, channels[0].numel())
    if zero is not None:
        rows = rows + channels[0] * channels[1]
    codes = torch_npu_module().npu_quantize(rows, channels[0], None, torch.qint8, 1, True)
    return codes.view(moved.shape).permute(inverse)


def position_in_storage(position: torch.Tensor | None, tokens: int, storage: torch.Tensor) -> torch.Tensor | None:
    """A position from which so many tokens fit: itself, if it is one, and otherwise the nearest.

    No document says what scatter_update_ makes of others, and to refuse them would wait for the device.
    """
    return None if position is None else position.clamp(0, storage.shape[2] - tokens)


def write_tokens(storage: torch.Tensor, part: torch.Tensor, position: torch.Tensor | None) -> None:
    """Copy `[B, G, S, *]` over `storage`: over all of it, or by scatter_update_ from the token `position` on.

    Args:
        position: int64 `[1]`, which stays on the device, or None.

    scatter_update_ (aclnnInplaceScatterUpdate): `data[b][g][indices[b] + s] = updates[b][g][s]` with axis -2.
    """
    part = part.to(storage.dtype)
    if position is None:
        storage.copy_(part)
        return
    if storage.dtype == torch.uint8:  # torch_npu's document names int8 only
        storage, part = storage.view(torch.int8), part.contiguous().view(torch.int8)
    torch_npu_module().scatter_update_(storage, position.repeat(part.shape[0]), part.contiguous(), -2)
