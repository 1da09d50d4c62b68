"""From float weights, and what calibration saw of their inputs, to the tensors of quantized linear layers.

R rows of inputs, N output channels, K input channels.
"""

from dataclasses import replace

import torch
from torch import nn

from ....ops.linear.reference import WEIGHT_BLOCK, quantize_by_group
from ...errors import OctavoError
from ...runtime.schemes.linear_scheme import FP8_LABELS, INT4_LABELS, W8A8, WEIGHT_ONLY, LinearInputs, LinearScheme
from ...runtime.w8a8_linear import encode_deq_scale
from .input_range import coded_rows, input_range, static_input_scale
from .weight_quantizer import ROWS, WeightQuantizer


def _check_inputs(inputs: LinearInputs | None, scheme: LinearScheme) -> None:
    if inputs is None and scheme.needs_inputs:
        raise OctavoError(f"linear layers: {scheme.label} by {scheme.w_method} needs inputs from calibration")
    if scheme.w_method == "GPTQ" and inputs.hessian is None:
        raise OctavoError("linear layers: GPTQ needs the mean of x x^T; observe inputs with keeps_hessian")


def weight_parts(weight: torch.Tensor, inputs: LinearInputs | None, scheme: LinearScheme) -> dict[str, torch.Tensor]:
    """`weight` and its scales as on disk, on the CPU."""
    quantizer = WeightQuantizer(weight, inputs, scheme)
    out_features, in_features = weight.shape
    if scheme.label in INT4_LABELS and in_features % WEIGHT_BLOCK:
        raise OctavoError(
            f"linear layers: {scheme.label} takes a multiple of {WEIGHT_BLOCK} input channels, not {in_features}"
        )
    stored_features = in_features // 2 if quantizer.codes.dtype == torch.uint8 else in_features
    codes = torch.empty((out_features, stored_features), dtype=quantizer.codes.dtype)
    scales: list[dict[str, torch.Tensor]] = []
    for rows in quantizer.blocks():
        found, stored = quantizer(quantizer.block(rows))
        codes[rows] = quantizer.codes.stored(found).cpu()
        scales.append(stored)
    parts = {"weight": codes} | {part: torch.cat([stored[part] for stored in scales]).cpu() for part in scales[0]}
    if scheme.per_tensor:
        parts["weight_scale"] = parts["weight_scale"][:1].clone()
    if scheme.label in FP8_LABELS:
        del parts["weight_offset"]
    if quantizer.outliers is not None:
        parts["outlier_columns"] = quantizer.outliers.to(torch.int32)
        parts["outlier_weight"] = weight.detach()[:, quantizer.outliers]
    return parts


def deq_scale_dtype(engine_dtype: torch.dtype) -> torch.dtype:
    """How Ascend's format has `deq_scale` for engines that run a model in a dtype; see `W8A8Linear`."""
    return torch.int64 if engine_dtype == torch.float16 else torch.float32


def static_parts(
    parts: dict[str, torch.Tensor],
    bias: torch.Tensor | None,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    engine_dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """What W8A8 adds for inputs of a scale and zero point, float32 `[1]` (reference: msmodelslim's W8A8).

    Engines hold `input_scale` in the dtype of the model and `deq_scale` as it is stored, so that the former is a number
    of that dtype before the latter is worked out.
    """
    deq_scale = input_scale * parts["weight_scale"].squeeze(1)
    bias = torch.zeros_like(deq_scale) if bias is None else bias.float().cpu()
    sums = torch.cat([codes.sum(dim=1, dtype=torch.float64) for codes in parts["weight"].split(ROWS)])
    quant_bias = (bias.double() / deq_scale - input_offset * sums).round()
    int32 = torch.iinfo(torch.int32)  # out of reach but for a bias on a row of zeros, whose scale is the smallest
    return {
        "input_scale": input_scale,
        "input_offset": input_offset,
        "quant_bias": quant_bias.clamp(int32.min, int32.max).to(torch.int32),
        "deq_scale": encode_deq_scale(deq_scale, deq_scale_dtype(engine_dtype)),
    }


def quantize_linear(
    linear: nn.Linear,
    inputs: LinearInputs | None,
    scheme: LinearScheme,
    engine_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear layer of a scheme's label, on the CPU and contiguous.

    Args:
        linear: the float layer; the bias keeps its dtype.
        inputs: what calibration saw; None where `scheme.needs_inputs` does not say that they are needed.
        scheme: how.
        engine_dtype: of the model where engines run it, float16 or bfloat16, by which Ascend's format has its scales.

    Raises:
        OctavoError: inputs, or their Hessian for GPTQ, are missing, or the layer has no number of channels that the
            scheme serves.
    """
    _check_inputs(inputs, scheme)
    bias = None if linear.bias is None else linear.bias.detach()
    parts = weight_parts(linear.weight, inputs, scheme)
    if scheme.is_static:
        bounds = input_range(inputs, scheme.act_method, linear.weight.detach(), scheme.label)
        if scheme.label == W8A8:
            parts |= static_parts(parts, bias, *static_input_scale(bounds, W8A8, engine_dtype), engine_dtype)
        else:
            parts["input_scale"] = static_input_scale(bounds, scheme.label)[0]
    if bias is not None:
        parts["bias"] = bias
    return {name: tensor.cpu().contiguous() for name, tensor in parts.items()}


def output_error(
    weight: torch.Tensor,
    inputs: LinearInputs,
    scheme: LinearScheme,
    exact: torch.Tensor,
    quantizes_inputs: bool = False,
) -> torch.Tensor:
    """Squared error of a quantized layer's output over rows, `||X W^T - Q(X) Q(W)^T||^2`, of no dimension.

    Made for searches, so that weights have the scales of "MinMax" whatever their method, as in AWQ, and the range of
    static inputs by "mse" is that by "histogram".

    Args:
        weight: `[N, K]`, any float dtype.
        inputs: what calibration saw, on the device of the weight.
        scheme: how.
        exact: `X W^T`, float32 `[R, N]`.
        quantizes_inputs: whether inputs of W8A16 and W4A16 are quantized to int8 per row and group of the weight.
    """
    quantizer = WeightQuantizer(weight, inputs, replace(scheme, w_method="MinMax"))
    rows, bounds = inputs.rows, None
    if scheme.is_static:
        act_method = "histogram" if scheme.act_method == "mse" else scheme.act_method
        bounds = input_range(inputs, act_method, label=scheme.label)
    if quantizer.outliers is not None:
        exact = exact - rows[:, quantizer.outliers] @ weight[:, quantizer.outliers].float().T  # they stay in float
        rows = rows.index_fill(1, quantizer.outliers, 0)
    coded = coded_rows(rows, scheme.label, bounds)
    if quantizes_inputs and scheme.label in WEIGHT_ONLY:
        codes, scale = quantize_by_group(rows, rows.shape[1] // quantizer.num_groups)
        coded = (codes * scale).view(rows.shape)
    total = torch.zeros((), device=weight.device)
    for part in quantizer.blocks():
        decoded = quantizer.decoded(quantizer.block(part))
        total += torch.addmm(exact[:, part], coded, decoded.T, beta=-1).square().sum()
    return total
