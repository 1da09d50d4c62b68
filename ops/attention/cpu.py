"""Attention on the CPU: `attention.c` behind the Python signature of the reference."""

from typing import Any

import torch

from ..shared.codes import FP8_DTYPES
from ..shared.compile import CKernel
from ..shared.operands import FLOAT_KINDS, KINDS
from ..shared.packed_call import Loadable, PackedCall
from .arguments import check_call
from .call import ATTENTION_CALL, AttentionCall
from .reference import quantized_query

_DENSE, _HALVES = torch.contiguous_format, (torch.bfloat16, torch.float16)
_ROWS = Loadable(tuple(KINDS), is_dense=True)
_FLOATS = Loadable((torch.float32,), is_dense=True)
_FLOAT_ROWS = Loadable(tuple(FLOAT_KINDS), is_dense=True)
_LEVELS = Loadable((torch.float32,), is_dense=True)
_PART = Loadable((torch.float32, torch.float16))
_LOADABLE = {
    "query": _FLOATS,
    "query_scale": Loadable((torch.float32,)),
    "key": _ROWS,
    "key_scale": _PART,
    "key_zero": _PART,
    "value": _ROWS,
    "value_scale": _PART,
    "value_zero": _PART,
    "key_levels": _LEVELS,
    "value_levels": _LEVELS,
    "key_front": _FLOAT_ROWS,
    "key_tail": _FLOAT_ROWS,
    "value_front": _FLOAT_ROWS,
    "value_tail": _FLOAT_ROWS,
    "mask": Loadable((torch.bool, torch.float32)),
    "length": Loadable((torch.int32, torch.int64)),
    "position_query": _FLOATS,
    "position_table": _FLOATS,
    "position_start": Loadable((torch.int64,)),
}
PACKED_ATTENTION = PackedCall(ATTENTION_CALL, ("output", "lse", "threads"), _LOADABLE)
ATTENTION_SOURCES = tuple([
    f"ops/attention/{name}"
    for name in (
        "checks.h", "arguments.h", "micro.h", "integer.h", "visible.h", "plan.h", "scratch.h", "parts.h", "unpack.h",
        "queries.h", "softmax.h", "tiles.h", "position.h", "groups.h", "products.h", "wide.h", "pieces.h",
        "attention.c",
    )
])  # fmt: skip
"""What each needs stands before it; vector.h and team.h before all."""
ATTENTION_KERNEL = CKernel(
    "attention",
    ("ops/shared/vector.h", "ops/shared/team.h", *ATTENTION_SOURCES),
    ("attention",),
    PACKED_ATTENTION.declarations,
)


def attention_cpu_description() -> str:
    """What serves on the CPU, for `ops.report()`."""
    return (
        f"{ATTENTION_KERNEL.description()}; queries in float64 by the reference (PyTorch); K and V with outliers, and "
        "K stored before RoPE, are decoded in blocks first"
    )


def attention_cpu_supports(call: AttentionCall) -> str | None:
    """None, or why the kernel does not serve a call."""
    if call.query.dtype == torch.float64:
        return "the C kernel computes in float32; give a query in float32, float16 or bfloat16"
    return ATTENTION_KERNEL.supports()


def _loaded(tensor: Any, loadable: Loadable | None) -> Any:
    """A tensor as the kernel loads it, in float32 or int64 instead of another element type; numbers as they are."""
    if tensor is None or loadable is None:
        return tensor
    if tensor.dtype not in loadable.dtypes:
        tensor = tensor.float() if torch.float32 in loadable.dtypes else tensor.long()
    return tensor.clone(memory_format=_DENSE) if loadable.is_dense and tensor.stride(-1) != 1 else tensor


def _loadable_call(call: AttentionCall) -> AttentionCall:
    """The call, its tensors as the kernel loads them."""
    flat = zip(ATTENTION_CALL.flat(call), ATTENTION_CALL.signature.parameters, strict=True)
    return ATTENTION_CALL.from_flat([_loaded(value, _LOADABLE.get(name)) for value, name in flat])


def _quantizes_to_fp8(call: AttentionCall) -> bool:
    return call.query_scale is not None and call.key.codes.dtype in FP8_DTYPES


def _attend(call: AttentionCall, wants_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_lse_reference` in C; the log-sum-exp only if it is wanted.

    What kernel and `check_call` both refuse is found by the kernel, which is quicker.

    Raises:
        ValueError: shapes that do not go together.
        MemoryError: no room for the scratch of the threads.
    """
    query = call.query
    if query.dtype in _HALVES:
        call = call._replace(query=query.float())
    fields = PACKED_ATTENTION.fields(call)
    if fields is None or query.dim() != 4 or _quantizes_to_fp8(call):
        check_call(call)
        if _quantizes_to_fp8(call):
            values = quantized_query(query.float(), call.query_scale.float(), call.key.codes.dtype)
            call = call._replace(query=values, query_scale=None)
        call = _loadable_call(call)
        fields = PACKED_ATTENTION.fields(call)
    batch, heads, queries, width = query.shape
    floats = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    output = torch.empty((batch, queries, heads, width), **floats)
    lse = torch.empty((batch, heads, queries), **floats) if wants_lse else None
    lse_at = 0 if lse is None else lse.data_ptr()
    packed = PACKED_ATTENTION.pack(fields, output.data_ptr(), lse_at, torch.get_num_threads())
    failed = ATTENTION_KERNEL.load()["attention"](packed)
    if failed == 1:
        raise MemoryError("attention on the CPU found no memory for its scratch")
    if failed:
        check_call(call)
        return output.zero_().to(query.dtype), None if lse is None else lse.fill_(float("-inf"))
    return output if query.dtype == torch.float32 else output.to(query.dtype), lse


def attention_cpu(call: AttentionCall) -> torch.Tensor:
    """`attention_reference` in C."""
    return _attend(call, False)[0]


def attention_lse_cpu(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_lse_reference` in C."""
    return _attend(call, True)
