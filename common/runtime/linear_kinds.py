"""The kinds of quantized linear layers by the labels that descriptions give them."""

from typing import Any

import torch

from .double_linear import W4A16DoubleLinear
from .fp8_linear import FP8BlockLinear, FP8DynamicLinear, FP8Linear
from .ordered_linear import W4A16OrderedLinear, W8A16OrderedLinear
from .quantized_embedding import QuantizedEmbedding
from .quantized_linear import QuantizedLinear
from .schemes.linear_scheme import FP8_LABELS, INT4_LABELS, W8A8, WEIGHT_ONLY
from .w8a8_linear import MixedLinear, W8A8DynamicLinear, W8A8Linear
from .weight_only_linear import W4A16Linear, W8A16Linear

QUANTIZED_LINEARS: dict[str, type[QuantizedLinear]] = {
    part.LABEL: part
    for part in (
        W8A8Linear, W8A8DynamicLinear, W8A16Linear, W4A16Linear, W4A16DoubleLinear, FP8Linear, FP8DynamicLinear,
        MixedLinear, W8A16OrderedLinear, W4A16OrderedLinear, FP8BlockLinear, QuantizedEmbedding,
    )
}  # fmt: skip
"""The class of a linear layer, or embedding, by its label in a description."""


def empty_linear(
    label: str,
    in_features: int,
    out_features: int,
    has_bias: bool,
    *,
    num_groups: int = 1,
    per_tensor: bool = False,
    is_packed: bool = True,
    deq_scale_dtype: torch.dtype = torch.float32,
    cpu_activations: str = "float",
) -> QuantizedLinear:
    """A quantized linear layer whose tensors are still to be filled.

    Args:
        label: one of `LINEAR_LABELS` or `HELD_LABELS`.
        in_features, out_features: K and N.
        has_bias: whether there is one.
        num_groups: of input channels, for W8A16 and W4A16.
        per_tensor: one scale for the whole weight, for fp8.
        is_packed: two codes to a byte, for W4A16.
        deq_scale_dtype: for W8A8, see `W8A8Linear`.
        cpu_activations: for W8A16 and W4A16, see `WeightOnlyLinear`.
    """
    options: dict[str, Any] = {}
    if label == W8A8:
        options["deq_scale_dtype"] = deq_scale_dtype
    elif label in WEIGHT_ONLY:
        options["num_groups"] = num_groups
    elif label in FP8_LABELS:
        options["per_tensor"] = per_tensor
    if label in INT4_LABELS:
        options["is_packed"] = is_packed
    layer = QUANTIZED_LINEARS[label](in_features, out_features, has_bias, **options)
    if label in WEIGHT_ONLY:
        layer.cpu_activations = cpu_activations
    return layer
