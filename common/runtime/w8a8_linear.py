"""Linear layers of int8 weights and int8 inputs: static, by token, and by token beside outliers in float."""

from collections.abc import Iterator

import torch
from torch import nn

from ...ops import linear_w8a8, linear_w8a8_dynamic
from ...ops.linear.packed_ops import run_packed, run_packed_w8a8
from ...ops.shared.registry import eagerly
from .linear_values import are_deq_scales, are_offsets, is_zero
from .packed_weight import PackedLinear
from .quantized_linear import QuantizedLinear
from .schemes.linear_scheme import W8A8, W8A8_DYNAMIC, W8A8_MIXED

CHANNELS_PER_OUTLIER = 64
OUTLIER_STEP = 16
_DEQ_SCALE_ERROR = 0.05
"""By how much `deq_scale` may differ from the product it stands for, whose factors may be kept in half precision."""


class W8A8Linear(QuantizedLinear):
    """Ascend's static W8A8: inputs in int8 by a scale and zero point from calibration.

    Args:
        in_features, out_features: K and N.
        has_bias: the float bias is kept too, as the format does; `quant_bias` is what computes.
        deq_scale_dtype: float32, or int64 whose low 32 bits are the float32 (Ascend's form for models in float16).
    """

    LABEL = W8A8
    PARTS = (*QuantizedLinear.PARTS, "input_scale", "input_offset", "quant_bias", "deq_scale")

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, deq_scale_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(in_features, out_features, has_bias)
        self._hold_weight(torch.int8)
        self._hold("input_scale", (1,))
        self._hold("input_offset", (1,))
        self._hold("quant_bias", (out_features,), torch.int32)
        self._hold("deq_scale", (out_features,), deq_scale_dtype)
        self._deq_scale: torch.Tensor | None = None

    def _forget(self) -> None:
        super()._forget()
        self._deq_scale = None

    def _unsound(self) -> Iterator[tuple[str, str]]:
        yield from super()._unsound()
        if not is_zero(self.weight_offset):
            yield "weight_offset", "is not 0 throughout, as of weights that int8 linears compute with"
        if not are_offsets(self.input_offset):
            yield "input_offset", "is no whole number from -128 to 127"
        if not are_deq_scales(self.deq_scale):
            yield "deq_scale", "is no positive float32 throughout"
        product = self.input_scale.float() * self.weight_scale.float().view(-1)
        if not torch.allclose(self._decoded_deq_scale(), product, rtol=_DEQ_SCALE_ERROR, atol=0.0):
            yield "deq_scale", "is not the product of input_scale and weight_scale"

    def _decoded_deq_scale(self) -> torch.Tensor:
        """`deq_scale` as float32, decoded once per device."""
        if self._deq_scale is None or self._deq_scale.device != self.deq_scale.device:
            self._deq_scale = decode_deq_scale(self.deq_scale)
        return self._deq_scale

    def check(self, name: str) -> None:
        """As of `QuantizedLinear`; the weight is packed here, once."""
        super().check(name)
        self.pack()

    def _to_pack(self) -> tuple[int, torch.Tensor, None]:
        return 8, self._decoded_deq_scale(), None

    def packed(self) -> PackedLinear | None:
        """See `PackedWeight`."""
        parts = {name: getattr(self, name) for name in ("input_scale", "input_offset", "quant_bias")}
        found = self._packed(self.in_features, **parts)
        if found is None:
            return None
        return found._replace(bias=-self.left_out.float() if self.folds_bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        parts = self.input_scale, self.input_offset, self.quant_bias
        panels = self.pack() if x.device.type == "cpu" else None
        if panels is None:
            output = eagerly(linear_w8a8, x, self.weight, *parts, self._decoded_deq_scale())
        else:
            output = run_packed_w8a8(x, panels, *parts)
        if not self.folds_bias:
            return output
        self._added_bias()
        return output - self.left_out.to(x.dtype)  # quant_bias holds it, in steps of deq_scale


class W8A8DynamicLinear(QuantizedLinear):
    """Ascend's W8A8_DYNAMIC: each token's input in int8 by a scale of its own, with no calibration."""

    LABEL = W8A8_DYNAMIC

    def __init__(self, in_features: int, out_features: int, has_bias: bool) -> None:
        super().__init__(in_features, out_features, has_bias)
        self._hold_weight(torch.int8)

    def _unsound(self) -> Iterator[tuple[str, str]]:
        yield from super()._unsound()
        if not is_zero(self.weight_offset):
            yield "weight_offset", "is not 0 throughout, as of weights that int8 linears compute with"

    def check(self, name: str) -> None:
        """As of `QuantizedLinear`; the weight is packed here, once."""
        super().check(name)
        self.pack()

    def _to_pack(self) -> tuple[int, torch.Tensor, None] | None:
        return 8, self.weight_scale, None

    def packed(self) -> PackedLinear | None:
        """See `PackedWeight`."""
        return self._packed(self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        panels = self.pack() if x.device.type == "cpu" else None
        if panels is not None:
            return run_packed(x, panels, self._added_bias(), self.in_features)
        return eagerly(linear_w8a8_dynamic, x, self.weight, self.weight_scale.view(-1), self._added_bias())


class MixedLinear(W8A8DynamicLinear):
    """W8A8_DYNAMIC but for the input channels with the largest outliers, `outlier_columns`, which stay in float.

    The int8 weight is 0 in those columns; theirs are in `outlier_weight` `[N, M]`, M by `outlier_count`.
    """

    LABEL = W8A8_MIXED
    PARTS = (*QuantizedLinear.PARTS, "outlier_columns", "outlier_weight")
    OF_MODEL = ("bias", "outlier_weight")

    def __init__(self, in_features: int, out_features: int, has_bias: bool) -> None:
        super().__init__(in_features, out_features, has_bias)
        count = outlier_count(in_features)
        self._hold("outlier_columns", (count,), torch.int32)
        self.register_buffer("outlier_weight", torch.empty(out_features, count))

    def _unsound(self) -> Iterator[tuple[str, str]]:
        yield from super()._unsound()
        outliers = self.outlier_columns
        if not bool(((outliers >= 0) & (outliers < self.in_features)).all()) or bool((outliers.diff() <= 0).any()):
            yield "outlier_columns", f"are no columns from 0 to {self.in_features - 1} that ascend"

    def _to_pack(self) -> None:
        return None  # its products are not all there is

    def float_weight(self) -> torch.Tensor:
        """What the weight stands for, float32 `[N, K]`."""
        return super().float_weight().index_copy(1, self.outlier_columns.long(), self.outlier_weight.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        outliers = self.outlier_columns.long()
        others = linear_w8a8_dynamic(
            x.index_fill(-1, outliers, 0), self.weight, self.weight_scale.view(-1), self._added_bias()
        )
        return others + nn.functional.linear(x.index_select(-1, outliers), self.outlier_weight)


def outlier_count(in_features: int) -> int:
    """How many of K input channels W8A8_MIXED keeps in float: one of 64, as a multiple of 16."""
    wanted = -(-in_features // (CHANNELS_PER_OUTLIER * OUTLIER_STEP)) * OUTLIER_STEP
    return min(in_features, wanted)


def encode_deq_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 `[N]` to the form on disk: itself, or its bit pattern in int64 as msmodelslim writes it."""
    return scale if dtype == torch.float32 else scale.view(torch.int32).to(torch.int64)


def decode_deq_scale(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_deq_scale`."""
    return stored if stored.dtype == torch.float32 else stored.to(torch.int32).view(torch.float32)
