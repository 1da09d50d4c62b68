"""How linear layers are quantized, and what calibration knows of their inputs."""

from dataclasses import dataclass, replace

import torch

from ...errors import OctavoError

W8A8, W8A8_DYNAMIC, W8A16, W4A16 = "W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16"
FP8, FP8_DYNAMIC, W8A8_MIXED = "WFP8AFP8", "WFP8AFP8_DYNAMIC", "W8A8_MIXED"
W4A16_DOUBLE = "W4A16_DOUBLE"
LINEAR_LABELS = (W8A8, W8A8_DYNAMIC, W8A16, W4A16, W4A16_DOUBLE, FP8, FP8_DYNAMIC, W8A8_MIXED)
"""Kinds of quantized linear layers, named as Ascend's descriptions label them. Two are Octavo's own: W8A8_MIXED, int8
by token, and in float the input channels with the largest outliers, in the manner of LLM.int8() (arXiv 2208.07339); and
W4A16_DOUBLE, in groups whose scales and zero points are in 8 bits themselves, as Q4_K of llama.cpp has them in 6, and
QLoRA (arXiv 2305.14314) scales in 8."""
W4A16_ORDERED, W8A16_ORDERED, FP8_BLOCK = "W4A16_ORDERED", "W8A16_ORDERED", "WFP8AFP8_BLOCK"
HELD_LABELS = (W4A16_ORDERED, W8A16_ORDERED, FP8_BLOCK)
"""Kinds of Octavo's own that hold the codes of other checkpoints, and that nothing is quantized to: groups of input
channels that act-order (GPTQ) mixed up, and fp8 with a scale for each block of 128 x 128 weights (DeepSeek)."""
EMBEDDING = "W8A16_EMBEDDING"
"""Label of an embedding in int8, and of the last linear that is tied to it; Octavo's own."""
WEIGHT_ONLY = (W8A16, W4A16, W4A16_DOUBLE, W8A16_ORDERED, W4A16_ORDERED)
INT4_LABELS = (W4A16, W4A16_DOUBLE, W4A16_ORDERED)
STATIC = (W8A8, FP8)
"""Those whose inputs are quantized by scales from calibration."""
FP8_LABELS = (FP8, FP8_DYNAMIC)
"""Those of e4m3 weights and inputs."""
CPU_ACTIVATIONS = ("int8", "float")
"""What weight-only linears multiply with on the CPU: inputs quantized to int8 per token and group of input channels, as
the weight has them, or inputs as they are, which is what they do on other devices."""
EMBEDDINGS = ("float", "int8")
"""What the embedding and the last linear may be in."""
GROUP_SIZES = (0, 32, 64, 128, 256)
SMALLEST_GROUP = 32
WEIGHT_METHODS = ("MinMax", "MSE", "GPTQ")
ACT_METHODS = ("minmax", "histogram", "auto", "percentile", "mse")


@dataclass(frozen=True)
class LinearScheme:
    """How linear layers are quantized.

    Attributes:
        label: one of `LINEAR_LABELS` or `HELD_LABELS`.
        group_size: input channels that share a scale of the weight, for weight-only labels; 0 is per output channel.
        symmetric: whether weights have no zero point; only W8A16 and W4A16 may have one, and W4A16_DOUBLE always has.
        per_tensor: one scale for a whole weight, for fp8.
        w_method: how codes of a weight are chosen: "MinMax" rounds to nearest over its range, "MSE" over the range of
            least squared error, "GPTQ" feeds the error of each column to those that follow (arXiv 2210.17323).
        act_method: range of static inputs: "minmax" all that was seen; "histogram" the least squared error of the
            inputs; "auto" the latter, unless outliers are so large that clipping them costs more; "percentile" all but
            the outermost values; "mse" the least squared error of the layer's output.
    """

    label: str = W8A8
    group_size: int = 0
    symmetric: bool = True
    per_tensor: bool = False
    w_method: str = "MinMax"
    act_method: str = "minmax"

    def __post_init__(self) -> None:
        if self.label not in LINEAR_LABELS + HELD_LABELS:
            raise OctavoError(f"linear layers: {self.label!r} is none of {', '.join(LINEAR_LABELS)}")
        if self.group_size not in GROUP_SIZES:
            raise OctavoError(f"linear layers: group_size {self.group_size} is none of {GROUP_SIZES}")
        if (self.group_size or not self.symmetric) and self.label not in WEIGHT_ONLY:
            raise OctavoError(f"linear layers: {self.label} has symmetric weights with a scale per output channel")
        if self.label == W4A16_DOUBLE:
            object.__setattr__(self, "symmetric", False)
        if self.per_tensor and self.label not in FP8_LABELS:
            raise OctavoError(f"linear layers: a scale per tensor is for fp8, not {self.label}")
        if self.w_method not in WEIGHT_METHODS:
            raise OctavoError(f"linear layers: w_method {self.w_method!r} is none of {', '.join(WEIGHT_METHODS)}")
        if self.act_method not in ACT_METHODS:
            raise OctavoError(f"linear layers: act_method {self.act_method!r} is none of {', '.join(ACT_METHODS)}")

    @property
    def is_static(self) -> bool:
        """Whether inputs are quantized by scales from calibration."""
        return self.label in STATIC

    @property
    def needs_inputs(self) -> bool:
        """Whether the layers cannot be quantized without knowing their inputs."""
        return self.is_static or self.label == W8A8_MIXED or self.w_method == "GPTQ"

    def num_groups(self, in_features: int) -> int:
        """How many groups the K input channels of a layer make.

        The group is the largest of a multiple of 32 channels that divides K and is no larger than `group_size`.
        """
        if not self.group_size:
            return 1
        fitting = [
            size for size in range(SMALLEST_GROUP, self.group_size + 1, SMALLEST_GROUP) if in_features % size == 0
        ]
        if not fitting:
            raise OctavoError(
                f"linear layers: {in_features} input channels make no groups of a multiple of {SMALLEST_GROUP}"
            )
        return in_features // fitting[-1]


EMBEDDING_SCHEME = LinearScheme(W8A16, group_size=SMALLEST_GROUP)
"""Of embeddings and last linears in int8."""


@dataclass(frozen=True)
class LinearInputs:
    """What calibration saw of the inputs of a linear layer, K channels.

    Attributes:
        low, high: smallest and largest value of each channel over all tokens, float32 `[K]`.
        mean_abs, mean_square: means of |x| and x^2 of each channel over all tokens, float32 `[K]`.
        rows: inputs of some of the tokens, or all where they are few, float32 `[R, K]`.
        hessian: mean of x x^T over all tokens, which is the Hessian of the squared error of an output but for a factor
            of 2, float32 `[K, K]`, for "GPTQ"; None where it is not asked for.
    """

    low: torch.Tensor
    high: torch.Tensor
    mean_abs: torch.Tensor
    mean_square: torch.Tensor
    rows: torch.Tensor
    hessian: torch.Tensor | None = None

    @property
    def largest(self) -> torch.Tensor:
        """Largest |x| of each channel, `[K]`."""
        return torch.maximum(-self.low, self.high)

    def thinned(self, count: int) -> "LinearInputs":
        """The same with evenly chosen rows, `count` at most."""
        step = max(1, -(-len(self.rows) // count))
        return replace(self, rows=self.rows[::step].clone())

    def transformed(self, scale: torch.Tensor, shift: torch.Tensor | None = None) -> "LinearInputs":
        """What is seen once inputs are `(x - shift) / scale`, `[K]` each; means of the rows alone, and no Hessian."""
        shift = torch.zeros_like(scale) if shift is None else shift
        rows = (self.rows - shift) / scale
        mean_abs, mean_square = rows.abs().mean(dim=0), rows.square().mean(dim=0)
        return LinearInputs((self.low - shift) / scale, (self.high - shift) / scale, mean_abs, mean_square, rows)
