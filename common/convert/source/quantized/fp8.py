"""fp8 checkpoints: a scale per block, as DeepSeek's and Qwen's, or per tensor or output channel, as vLLM's own."""

from typing import Any

from .....ops.linear.arguments import FP8_BLOCK_SIZE
from ....errors import OctavoError
from ....runtime.checkpoint.files import TensorHeader
from ....runtime.schemes.linear_scheme import FP8, FP8_BLOCK, FP8_DYNAMIC
from .weight import CodedLinear, CodedWeight, Read, sound_scale

_SCALES = ("weight_scale_inv", "weight_scale")
_INPUT_SCALES = ("input_scale", "activation_scale")


def read_fp8(
    where: str, config: dict[str, Any], headers: dict[str, TensorHeader], read: Read
) -> dict[str, CodedLinear]:
    """The linears in codes, by name; as of `read_awq`."""
    names = [name.removesuffix(".weight") for name, header in headers.items() if header.dtype == "F8_E4M3"]
    return {name: _linear(where, name, config.get("weight_block_size"), headers) for name in names}


def _linear(where: str, name: str, block: Any, headers: dict[str, TensorHeader]) -> CodedLinear:
    weight_name, shape = f"{name}.weight", headers[f"{name}.weight"].shape
    scale_name = next((f"{name}.{part}" for part in _SCALES if f"{name}.{part}" in headers), None)
    input_name = next((f"{name}.{part}" for part in _INPUT_SCALES if f"{name}.{part}" in headers), None)
    if scale_name is None or len(shape) != 2:
        raise OctavoError(f"{where}: {name} has no {' and no '.join(_SCALES)}, or is no matrix; copy it again")
    if block is None:
        fault = ""
        scales = fp8_scales(where, scale_name, headers, shape[0])
    else:
        fault, scales = block_fault(block, shape[1]), headers[scale_name].shape
        if not _is_block(block) or scales != tuple(-(-size // step) for size, step in zip(shape, block, strict=True)):
            raise OctavoError(f"{where}: {scale_name} is {list(scales)}, which blocks of {block} do not make")
    parts = tuple(part for part in (weight_name, scale_name, input_name) if part is not None)

    def weight(read: Read) -> CodedWeight:
        scale = sound_scale(scale_name, read(scale_name)).view(scales)
        codes, of_input = read(weight_name), None if input_name is None else read(input_name).float().view(1)
        return CodedWeight(codes, scale, block=None if block is None else tuple(block), input_scale=of_input)

    if block is not None and not fault and input_name is not None:
        fault = "is fp8 in blocks with static inputs"
    dynamic = FP8_DYNAMIC if block is None else FP8_BLOCK
    label = None if fault else (dynamic if input_name is None else FP8)
    return CodedLinear(label, fault, shape, scales, parts, weight)


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(isinstance(step, int) and step > 0 for step in block)


def block_fault(block: Any, in_features: int) -> str:
    """Why no kind of linear holds weights with a scale per block; nothing if one does."""
    if list(block) != [FP8_BLOCK_SIZE] * 2:
        size = " x ".join(map(str, block))
        held = f"{FP8_BLOCK_SIZE} x {FP8_BLOCK_SIZE}"
        return f"is fp8 with a scale for each block of {size} weights, and blocks here are of {held}"
    if in_features % FP8_BLOCK_SIZE:
        return f"has {in_features} input channels, which blocks of {FP8_BLOCK_SIZE} do not fill"
    return ""


def fp8_scales(where: str, name: str, headers: dict[str, TensorHeader], out_features: int) -> tuple[int, int]:
    """The shape of scales per tensor or per output channel, as a matrix.

    Raises:
        OctavoError: they are neither.
    """
    shape = headers[name].shape
    if shape in ((), (1,), (1, 1)):
        return 1, 1
    if shape in ((out_features,), (out_features, 1)):
        return out_features, 1
    raise OctavoError(f"{where}: {name} is {list(shape)}, neither one scale nor one for each of {out_features} rows")
