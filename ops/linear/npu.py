"""The linear ops on an Ascend NPU: ops of torch_npu behind the signatures of the references."""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..shared.codes import unpack_int4
from ..shared.npu_helpers import npu_description, require_npu_float, torch_npu_module
from ..shared.operands import check_devices
from .arguments import WEIGHT_BLOCK, check_w8a8, check_w8a8_dynamic, check_weight_only

LINEAR_NPU = npu_description("npu_quantize and npu_quant_matmul")
LINEAR_DYNAMIC_NPU = npu_description("npu_dynamic_quant and npu_quant_matmul")
LINEAR_WEIGHT_ONLY_NPU = npu_description(
    "npu_weight_quant_batchmatmul; int4 weights are packed anew once and kept twice"
)
LINEAR_FP8_NPU = "none: raises, Atlas A2 and A3 do not compute in fp8"
LARGEST_FEATURES = 65535
"""Limit of the dimensions of the weights (ascend-op-plugin docs: npu_quant_matmul, npu_weight_quant_batchmatmul)."""
GROUP_STEP, INT4_PER_INT32 = 32, 8
"""Of npu_weight_quant_batchmatmul: sizes of groups are multiples of the one, int4 weights lie in int32."""
_INT4_PACKS = WeakTensorKeyDictionary()


def _check_matmul(name: str, x: torch.Tensor, out_features: int, in_features: int) -> None:
    """Raise ValueError where the dtype of x or the size of the weight is beyond the op."""
    require_npu_float("x", x)
    if max(out_features, in_features) > LARGEST_FEATURES:
        raise ValueError(
            f"{name} takes at most {LARGEST_FEATURES} input and output channels, and the weight is "
            f"{out_features} x {in_features}"
        )


def linear_w8a8_npu(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> torch.Tensor:
    """`linear_w8a8_reference` by npu_quant_matmul (ascend-op-plugin docs: npu_quantize, npu_quant_matmul).

    With float16 the op itself drops the 13 lowest bits of `deq_scale` (npu_trans_quant_param); with bfloat16 not.

    Args:
        x: `[..., K]`, float16 or bfloat16.
        weight: int8 `[N, K]`; the op gets the transposed view.
        input_scale: float32 `[1]`.
        input_offset: float32 `[1]`, an integer, as the format stores it: npu_quantize takes it as int32.
        quant_bias: int32 `[N]`, added to the int32 sums.
        deq_scale: float32 `[N]`.

    Returns:
        `[..., N]`, of the dtype of `x`.

    Raises:
        ValueError: x in another dtype, what does not go together, or a matrix wider than the op takes.
        RuntimeError: torch_npu cannot be imported.
    """
    check_devices(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    out_features, in_features = check_w8a8(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    _check_matmul("npu_quant_matmul", x, out_features, in_features)
    shape = (*x.shape[:-1], out_features)
    if x.numel() == 0:
        return x.new_empty(shape)
    npu = torch_npu_module()
    rows = x.reshape(-1, in_features).float()  # a float32 scale wants a float32 x (aclnnQuantize)
    codes = npu.npu_quantize(rows, input_scale, input_offset.to(torch.int32), torch.qint8, 1, True)
    return npu.npu_quant_matmul(codes, weight.t(), deq_scale, bias=quant_bias, output_dtype=x.dtype).view(shape)


def linear_w8a8_dynamic_npu(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`linear_w8a8_dynamic_reference` by npu_dynamic_quant and npu_quant_matmul (documents of these names).

    `(codes @ weight.T) * weight_scale * pertoken_scale + bias` (aclnnQuantMatmulV4). A row of x that is zero gets the
    scale 0 and so the bias, whatever its codes.

    Args:
        x: `[..., K]`, float16 or bfloat16.
        weight: int8 `[N, K]`; the op gets the transposed view.
        weight_scale: float32 `[N]`.
        bias: `[N]`, any float dtype, or None.

    Returns:
        `[..., N]`, of the dtype of `x`.

    Raises:
        ValueError: x in another dtype, what does not go together, or a matrix wider than the op takes.
        RuntimeError: torch_npu cannot be imported.
    """
    check_devices(x, weight, weight_scale, bias)
    out_features, in_features = check_w8a8_dynamic(x, weight, weight_scale, bias)
    _check_matmul("npu_quant_matmul", x, out_features, in_features)
    shape = (*x.shape[:-1], out_features)
    if x.numel() == 0:
        return x.new_empty(shape)
    npu = torch_npu_module()
    codes, scale = npu.npu_dynamic_quant(x.reshape(-1, in_features))
    output = npu.npu_quant_matmul(
        codes,
        weight.t(),
        weight_scale.float(),
        pertoken_scale=scale,
        bias=None if bias is None else bias.float(),
        output_dtype=x.dtype,
    )
    return output.view(shape)


def linear_weight_only_npu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_weight_only_reference` by npu_weight_quant_batchmatmul (document of this name).

    The op decodes weights as `(code + offset) * scale`: its offset is our zero negated. Scales and zeros are rounded to
    the dtype of x; in bfloat16 whole zeros stay exact, others not.

    Args:
        x: `[..., K]`, float16 or bfloat16.
        weight: int8 `[N, K]`, given to the op as the transposed view; or uint8 `[N, K / 2]`, which is converted by
            npu_convert_weight_to_int4pack on its first use and kept as int32 for as long as the weight lives.
        weight_scale, weight_zero: `[N, K / group]`, groups of a multiple of 32; `[N, 1]` is per output channel.
        bias: `[N]`, any float dtype, or None.

    Returns:
        `[..., N]`, of the dtype of `x`.

    Raises:
        ValueError: x in another dtype, what does not go together, a matrix wider or groups smaller than the op takes.
        RuntimeError: torch_npu cannot be imported.
    """
    check_devices(x, weight, weight_scale, weight_zero, bias)
    out_features, in_features, num_groups = check_weight_only(x, weight, weight_scale, weight_zero, bias)
    _check_matmul("npu_weight_quant_batchmatmul", x, out_features, in_features)
    if num_groups > 1 and in_features // num_groups % GROUP_STEP:
        raise ValueError(
            f"npu_weight_quant_batchmatmul takes groups of a multiple of {GROUP_STEP} channels, not "
            f"{in_features // num_groups}"
        )
    shape = (*x.shape[:-1], out_features)
    if x.numel() == 0:
        return x.new_empty(shape)
    parts = [weight_scale] if weight_zero is None else [weight_scale, -weight_zero]
    parts = [part.to(x.dtype).t() for part in parts]
    matrix = weight.t()
    if weight.dtype == torch.uint8:
        is_transposed = num_groups == 1 or out_features % INT4_PER_INT32 != 0  # what the document recommends
        matrix = _int4_pack(weight, is_transposed)
        parts = parts if is_transposed else [part.contiguous() for part in parts]
    output = torch_npu_module().npu_weight_quant_batchmatmul(
        x.reshape(-1, in_features).contiguous(),
        matrix,
        *parts,
        bias=None if bias is None else bias.to(torch.float16 if x.dtype == torch.float16 else torch.float32),
        antiquant_group_size=0 if num_groups == 1 else in_features // num_groups,
    )
    return output.view(shape)


def _int4_pack(weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """An int4 weight `[N, K / 2]` as npu_weight_quant_batchmatmul takes it, kept from the first call on.

    Returns:
        int32 `[K, N / 8]`, or where `is_transposed` a transposed view `[K / 8, N]`.
    """
    version = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, is_transposed)
    kept = _INT4_PACKS.get(weight)
    if kept is None or kept[0] != version:
        codes = unpack_int4(weight, WEIGHT_BLOCK).to(torch.int32)
        codes = codes if is_transposed else codes.t().contiguous()
        packed = torch_npu_module().npu_convert_weight_to_int4pack(codes)
        kept = (version, packed.t() if is_transposed else packed)
        _INT4_PACKS[weight] = kept
    return kept[1]


def linear_fp8_npu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Not there: Atlas A2 and A3 do not compute in fp8 (npu_quant_matmul takes int8 and int4 there).

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("Atlas A2 and A3 have no fp8; write the checkpoint with linears in int8 or int4")


def linear_fp8_block_npu(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Not there, as `linear_fp8_npu`.

    Raises:
        NotImplementedError: always.
    """
    return linear_fp8_npu(x, weight, weight_scale, None, bias)
