"""From a weight that a checkpoint holds in codes to the tensors of a quantized linear layer: the codes as they are.

N output channels, K input channels.
"""

import torch

from ....ops.linear.reference import WEIGHT_BLOCK
from ....ops.shared.codes import pack_int4
from ...errors import OctavoError
from ...runtime.linear_kinds import QUANTIZED_LINEARS
from ...runtime.schemes.linear_scheme import FP8, INT4_LABELS, W8A8
from ..source.quantized.weight import CodedWeight
from .quantize import static_parts


def coded_parts(
    name: str,
    weight: CodedWeight,
    label: str,
    bias: torch.Tensor | None = None,
    engine_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear layer, on the CPU and contiguous.

    Args:
        name: of the linear, for messages.
        weight: its codes.
        label: the kind of linear that holds them.
        bias: `[N]`, which keeps its dtype; None if there is none.
        engine_dtype: as of `quantize_linear`. The scale of static inputs is the number of that dtype nearest to the
            checkpoint's, which engines on Ascend make of it, before what follows from it is worked out.

    Raises:
        OctavoError: groups are mixed up, although the checkpoint does not say so.
    """
    has = QUANTIZED_LINEARS[label].PARTS
    if weight.order is not None and "input_order" not in has:
        raise OctavoError(f"{name}: g_idx mixes groups up, and config.json says desc_act false; set it to true")
    codes, parts = weight.codes, {"weight_scale": weight.scale}
    if "input_order" in has:
        columns = weight.order.argsort(stable=True)
        codes, parts["input_order"] = codes[:, columns], columns.to(torch.int32)
    parts["weight"] = pack_int4(codes, WEIGHT_BLOCK) if label in INT4_LABELS else codes
    if "weight_offset" in has:
        parts["weight_offset"] = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    if label == W8A8:
        zero = torch.zeros(1) if weight.input_zero is None else weight.input_zero
        scale = weight.input_scale.to(engine_dtype).float()
        parts |= static_parts(parts, bias, scale, zero, engine_dtype)
    elif label == FP8:
        parts["input_scale"] = weight.input_scale
    if bias is not None:
        parts["bias"] = bias
    return {part: tensor.cpu().contiguous() for part, tensor in parts.items()}
