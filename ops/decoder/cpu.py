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
from ..shared.registry import describe
from .call import DECODER_LAYER, DECODER_PASS, DecoderLayer, DecoderPass

_FLOAT_PARTS = Loadable((torch.float32,), is_dense=True)
_VALUE_PARTS = Loadable(tuple(FLOAT_KINDS), is_dense=True)
_INDEX_PARTS = Loadable((torch.int64,), is_dense=True)
_LINEAR_PARTS = {
    "codes": Loadable((torch.uint8, *FLOAT_KINDS), is_dense=True),
    "scale": Loadable((torch.float32, torch.float16), is_dense=True),
    "zero": Loadable((torch.float32, torch.float16), is_dense=True),
    "bias": _FLOAT_PARTS,
    "quant_bias": Loadable((torch.int32,), is_dense=True),
    "input_scale": _FLOAT_PARTS,
    "input_offset": _FLOAT_PARTS,
}
_CODED_PARTS = {
    "codes": Loadable(tuple(KINDS), is_dense=True),
    "levels": _FLOAT_PARTS,
    "scale": Loadable((torch.float32, torch.float16)),
    "zero": Loadable((torch.float32, torch.float16)),
}
_LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = ("attention", "mlp", "attention_output", "mlp_output", "query", "key")
_LAYER_PARTS = {
    **{f"linears_{linear}_{name}": part for linear in _LINEARS for name, part in _LINEAR_PARTS.items()},
    **{f"{side}_codes_{name}": part for side in ("key", "value") for name, part in _CODED_PARTS.items()},
    **{f"norms_{name}": _VALUE_PARTS for name in _NORMS},
    "query_scale": Loadable((torch.float32,)),
    "biases_key": _FLOAT_PARTS,
    "biases_columns": _INDEX_PARTS,
    "biases_table": _FLOAT_PARTS,
    "biases_value": _FLOAT_PARTS,
    "rotation": _FLOAT_PARTS,
}  # fmt: skip
_PASS_PARTS = {
    "hidden": _FLOAT_PARTS,
    "positions": _INDEX_PARTS,
    "bias_start": _INDEX_PARTS,
    "mask": Loadable((torch.bool,)),
    "windowed_mask": Loadable((torch.bool,)),
    "norm": _VALUE_PARTS,
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


describe("decoder_layers", "CPU", DECODER_KERNEL.description)


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


def _run_layers(
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
    _run_layers("decoder_layers", call, layers, count)


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
    _run_layers("decoder_between", call, layers, count, projected, attended)
