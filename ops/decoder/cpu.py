"""Decoder layers on the CPU: `decoder.c`, which takes all layers of a pass in one region of threads."""

import ctypes
from typing import NamedTuple

import torch

from ..attention.cpu import ATTENTION_SOURCES, PACKED_ATTENTION
from ..codec.cpu import CODEC_KERNEL
from ..linear.cpu import PACKED_SOURCES
from ..shared.compile import CKernel
from ..shared.operands import FLOAT_KINDS, KINDS
from ..shared.packed_call import Loadable, PackedCall, joined_declarations
from .call import DECODER_LAYER, DECODER_PASS, DecoderLayer, DecoderPass

_STEP_FLOATS = Loadable((torch.float32,), is_dense=True)
_VALUES = Loadable(tuple(FLOAT_KINDS), is_dense=True)
_INDEX = Loadable((torch.int64,), is_dense=True)
_LINEAR = {
    "codes": Loadable((torch.uint8, *FLOAT_KINDS), is_dense=True),
    "scale": Loadable((torch.float32, torch.float16), is_dense=True),
    "zero": Loadable((torch.float32, torch.float16), is_dense=True),
    "bias": _STEP_FLOATS,
    "quant_bias": Loadable((torch.int32,), is_dense=True),
    "input_scale": _STEP_FLOATS,
    "input_offset": _STEP_FLOATS,
}
_SIDE = {
    "codes": Loadable(tuple(KINDS), is_dense=True),
    "levels": _STEP_FLOATS,
    "scale": Loadable((torch.float32, torch.float16)),
    "zero": Loadable((torch.float32, torch.float16)),
}
_LAYER_PARTS = {
    **{f"linears_{linear}_{name}": loadable
       for linear in ("query", "key", "value", "output", "gate", "up", "down") for name, loadable in _LINEAR.items()},
    **{f"{side}_codes_{name}": loadable for side in ("key", "value") for name, loadable in _SIDE.items()},
    **{f"norms_{name}": _VALUES
       for name in ("attention", "mlp", "attention_output", "mlp_output", "query", "key")},
    "query_scale": Loadable((torch.float32,)),
    "biases_key": _STEP_FLOATS,
    "biases_columns": _INDEX,
    "biases_table": _STEP_FLOATS,
    "biases_value": _STEP_FLOATS,
    "rotation": _STEP_FLOATS,
}  # fmt: skip
_PASS_PARTS = {
    "hidden": _STEP_FLOATS,
    "positions": _INDEX,
    "bias_start": _INDEX,
    "mask": Loadable((torch.bool,)),
    "windowed_mask": Loadable((torch.bool,)),
    "norm": _VALUES,
}
_RESULTS = ("layers", "count", "projected", "attended", "encode", "encode_token", "threads")
_PACKED_LAYER = PackedCall(DECODER_LAYER, ("first",), _LAYER_PARTS)
_PACKED_PASS = PackedCall(DECODER_PASS, _RESULTS, _PASS_PARTS)
DECODER_KERNEL = CKernel(
    "decoder",
    (
        "ops/shared/vector.h",
        "ops/shared/rounding.h",
        "ops/shared/team.h",
        *ATTENTION_SOURCES,
        "ops/codec/arguments.h",
        *PACKED_SOURCES,
        "ops/linear/packed_float.h",
        *[f"ops/decoder/{name}" for name in ("work.h", "rows.h", "linears.h", "cache.h", "decoder.c")],
    ),
    ("decoder_layers", "decoder_between"),
    joined_declarations(PACKED_ATTENTION, _PACKED_LAYER, _PACKED_PASS),
)


class PackedLayer(NamedTuple):
    """A layer as the kernel takes it, and what keeps its tensors alive."""

    fields: list[int | float]
    layer: DecoderLayer


def pack_layer(layer: DecoderLayer) -> PackedLayer | None:
    """A layer as the kernel takes it; None if a tensor is none that it loads."""
    fields = _PACKED_LAYER.fields(layer)
    return None if fields is None else PackedLayer(fields, layer)


def pack_layers(layers: list[PackedLayer], forgotten: list[int]) -> bytes:
    """All layers, of which so many tokens each are forgotten, in one."""
    return b"".join([_PACKED_LAYER.pack(layer.fields, first) for layer, first in zip(layers, forgotten, strict=True)])


def _run_step(
    name: str, call: DecoderPass, layers: bytes, count: int,
    projected: torch.Tensor | None = None, attended: torch.Tensor | None = None,
) -> None:  # fmt: skip
    codec = CODEC_KERNEL.load()
    encoders = [ctypes.cast(codec[entry], ctypes.c_void_p).value for entry in ("encode", "encode_token")]
    addresses = [0 if part is None else part.data_ptr() for part in (projected, attended)]
    at = ctypes.cast(ctypes.c_char_p(layers), ctypes.c_void_p).value
    packed = _PACKED_PASS.pack(_PACKED_PASS.fields(call), at, count, *addresses, *encoders, torch.get_num_threads())
    if DECODER_KERNEL.load()[name](packed):
        raise MemoryError("decoder layers on the CPU found no memory for their scratch")


def decoder_layers_cpu(call: DecoderPass, layers: bytes, count: int) -> None:
    """All layers in one: `call.hidden` becomes what the last leaves, and storage takes the codes of its tokens.

    Args:
        layers: what `pack_layers` made, whose layers must be alive; `count` of them.

    Raises:
        MemoryError: no room for the scratch.
    """
    _run_step("decoder_layers", call, layers, count)


def decoder_between_cpu(
    call: DecoderPass, layers: bytes, count: int, projected: torch.Tensor | None, attended: torch.Tensor | None
) -> None:
    """What comes between the attention of two layers, or before that of the first, or behind that of the last.

    Args:
        layers: the layer whose attention was and the one whose attention will be, or the one that there is.
        projected: float32 `[B, T, (H + 2 G) D]`: becomes q, k and v behind RoPE; None behind the last.
        attended: float32 `[B, T, H * D]`, what attention made; None before the first.

    Raises:
        MemoryError: no room for the scratch.
    """
    _run_step("decoder_between", call, layers, count, projected, attended)
