"""Linear layers of weights and inputs in fp8, e4m3: a scale for each token's input, one for all, or one per block."""

import torch

from ...ops import linear_fp8, linear_fp8_block
from ...ops.linear.arguments import FP8_BLOCK_SIZE, block_counts
from ...ops.shared.registry import eagerly
from .quantized_linear import QuantizedLinear
from .schemes.linear_scheme import FP8, FP8_BLOCK, FP8_DYNAMIC


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
        parts = self.weight, self.weight_scale.view(-1), self._input_scale(), self._added_bias()
        return eagerly(linear_fp8, x, *parts)


class FP8Linear(FP8DynamicLinear):
    """As `FP8DynamicLinear`, with one scale for all inputs, from calibration."""

    LABEL = FP8
    PARTS = ("weight_scale", "input_scale")

    def __init__(self, in_features: int, out_features: int, has_bias: bool, per_tensor: bool = False) -> None:
        super().__init__(in_features, out_features, has_bias, per_tensor)
        self._hold("input_scale", (1,))

    def _input_scale(self) -> torch.Tensor | None:
        return self.input_scale


class FP8BlockLinear(QuantizedLinear):
    """W8A8 in fp8, e4m3, as DeepSeek's checkpoints have it: a scale for each block of 128 x 128 weights, and for each
    token's input one for 128 channels.

    Args:
        in_features, out_features: K and N; the former a multiple of 128.
        has_bias: whether there is one.
    """

    LABEL = FP8_BLOCK
    PARTS = ("weight_scale",)

    def __init__(self, in_features: int, out_features: int, has_bias: bool) -> None:
        super().__init__(in_features, out_features, has_bias)
        self._hold_weight(torch.float8_e4m3fn, block_counts(out_features, in_features))

    def float_weight(self) -> torch.Tensor:
        """What the codes of the weight stand for, float32 `[N, K]`."""
        rows = self.weight_scale.float().repeat_interleave(FP8_BLOCK_SIZE, dim=0)[: self.out_features]
        return self.weight.float() * rows.repeat_interleave(FP8_BLOCK_SIZE, dim=1)[:, : self.in_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return linear_fp8_block(x, self.weight, self.weight_scale, self._added_bias())
