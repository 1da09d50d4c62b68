"""Linear layers of weights and inputs in fp8, e4m3: a scale for each token's input, or one for all."""

import torch

from ...ops import linear_fp8
from .quantized_linear import QuantizedLinear
from .schemes.linear_scheme import FP8, FP8_DYNAMIC


class FP8DynamicLinear(QuantizedLinear):
    """W8A8 in fp8, e4m3, with a scale for each token's input.

    Args:
        in_features, out_features: K and N.
        has_bias: whether there is one.
        per_tensor: whether one scale is for the whole weight.
    """

    LABEL = FP8_DYNAMIC
    PARTS = ("weight_scale",)

    def __init__(self, in_features: int, out_features: int, has_bias: bool, per_tensor: bool = False) -> None:
        super().__init__(in_features, out_features, has_bias)
        self._hold_weight(torch.float8_e4m3fn, (1, 1) if per_tensor else None)

    def _input_scale(self) -> torch.Tensor | None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return linear_fp8(x, self.weight, self.weight_scale.view(-1), self._input_scale(), self._added_bias())


class FP8Linear(FP8DynamicLinear):
    """As `FP8DynamicLinear`, with one scale for all inputs, from calibration."""

    LABEL = FP8
    PARTS = ("weight_scale", "input_scale")

    def __init__(self, in_features: int, out_features: int, has_bias: bool, per_tensor: bool = False) -> None:
        super().__init__(in_features, out_features, has_bias, per_tensor)
        self._hold("input_scale", (1,))

    def _input_scale(self) -> torch.Tensor | None:
        return self.input_scale
