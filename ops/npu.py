"""What the kernels for Ascend NPUs share: torch_npu, tensors as its ops take them, and how to speak of both.

These kernels are contract-tested: no NPU has run them. Every call is checked against the schemas inside torch_npu
2.13's libraries and against a model of what its documents say (`tests/ops/npu_double.py`). The documents named below
are the pages of `docs/zh/custom_APIs/torch_npu` in github.com/Ascend/op-plugin, for Atlas A2 and A3.
"""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import torch

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


def whole_storage(view: torch.Tensor) -> torch.Tensor | None:
    """The contiguous `[B, G, capacity, D]` storage whose first S tokens a cache's view `[B, G, S, D]` shows.

    The ops of the NPU take no strided K and V, but the number of valid tokens: the storage goes to them whole, nothing
    is copied. None if the tensor is no such view and not contiguous itself.
    """
    batch, groups, tokens, width = view.shape
    capacity = view.stride(1) // width
    strides = (groups * capacity * width, capacity * width, width, 1)
    room = view.untyped_storage().nbytes() // view.element_size() - view.storage_offset()
    if capacity >= tokens and view.stride() == strides and batch * strides[0] <= room:
        return view.as_strided((batch, groups, capacity, width), strides)
    return view if view.is_contiguous() else None


def _static_columns(part: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """A static scale or zero, `[N, 1, D]` or `[N, 1, 1]`, as float32 `[N * D]`."""
    if (part.dim() > 1 and part.shape[-2] != 1) or (part.dim() > 3 and part.shape[0] != 1):
        raise ValueError(f"npu_quantize takes scales per head or channel, [N, 1, 1 or D], not {tuple(part.shape)}")
    return part.float().expand(1, heads, 1, width).reshape(heads * width)


def quantize_static(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Codes `clamp(round(x / scale + zero), -128, 127)` by npu_quantize.

    Args:
        x: `[B, N, S, D]`, float32, float16 or bfloat16.
        scale, zero: float32, `[N, 1, D]` or `[N, 1, 1]`; zero None if symmetric.

    Returns:
        int8 `[B, S, N, D]`, contiguous.

    npu_quantize with `div_mode=True` divides by a float32 scale of one axis; its other mode would round scale and zero
    to the dtype of x. Its zero points are integers, so ours, which need not be, are added to x first, in float32.
    """
    batch, heads, tokens, width = x.shape
    columns = _static_columns(scale, heads, width)
    rows = x.transpose(1, 2).reshape(batch * tokens, heads * width)
    if zero is not None:
        rows = rows.float() + columns * _static_columns(zero, heads, width)
    codes = torch_npu_module().npu_quantize(rows, columns, None, torch.qint8, 1, True)
    return codes.view(batch, tokens, heads, width)
