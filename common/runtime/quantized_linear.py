"""The quantized linear layers: weights in int8, int4 or fp8, and inputs in int8, fp8 or float, computed on codes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...ops import linear_fp8, linear_w8a8, linear_w8a8_dynamic, linear_weight_only
from ...ops.linear.reference import WEIGHT_BLOCK
from ...ops.shared.codes import INT8_MAX, INT8_MIN, expand_scale, from_codes
from ..errors import OctavoError
from .gradients import refuse_gradient
from .linear_values import are_deq_scales, are_offsets, are_scales, is_zero
from .schemes.linear_scheme import (
    FP8,
    FP8_DYNAMIC,
    FP8_LABELS,
    W4A16,
    W8A8,
    W8A8_DYNAMIC,
    W8A8_MIXED,
    W8A16,
    WEIGHT_ONLY,
)

CHANNELS_PER_OUTLIER = 64
OUTLIER_STEP = 16
_DEQ_SCALE_ERROR = 0.05
"""By how much `deq_scale` may differ from the product it stands for, whose factors may be kept in half precision."""


class FoldableBias:
    """Mixin of a linear layer that may leave its bias, or the large part of it, for somebody else: see `folds.py`.

    Attributes:
        folds_bias: whether it does.
        left_out: what was left out when the layer last ran, `[N]`; the rest is added as ever.
    """

    folds_bias = False
    left_out: torch.Tensor | None = None
    _choose: Callable[[nn.Module], torch.Tensor] | None = None

    def fold_bias(self, choose: Callable[[nn.Module], torch.Tensor] | None = None) -> None:
        """Leave out of the bias from now on what `choose` makes of the layer; None leaves out all of it."""
        self.folds_bias, self.left_out, self._choose = True, None, choose

    def _added_bias(self) -> torch.Tensor | None:
        """The bias that the layer adds, or None. What is left out is worked out once."""
        if not self.folds_bias:
            return self.bias
        bias = self.bias.detach()
        left = self.left_out
        if left is None or (left.device, left.dtype) != (bias.device, bias.dtype):
            with torch.inference_mode(False):  # it outlives this pass, which may be one without gradients
                self.left_out = bias if self._choose is None else self._choose(self)
        return None if self._choose is None else bias - self.left_out


class FoldableLinear(FoldableBias, nn.Linear):
    """A float linear layer that may leave out (part of) its bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return nn.functional.linear(x, self.weight, self._added_bias())


class QuantizedLinear(FoldableBias, nn.Module):
    """What the quantized linear layers share: a weight in codes, its scales and a bias.

    Tensors have the names of Ascend's format on disk. Subclasses say in `LABEL` how that format calls them.
    """

    LABEL: str
    PARTS: tuple[str, ...] = ("weight_scale", "weight_offset")
    """Tensors beside `weight` and `bias`."""
    OF_MODEL: tuple[str, ...] = ("bias",)
    """Tensors that take the dtype of the model; all others keep theirs whatever it is."""

    def __init__(self, in_features: int, out_features: int, has_bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", torch.empty(out_features) if has_bias else None)

    def _hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def _hold_weight(self, dtype: torch.dtype, scale_shape: tuple[int, int] | None = None) -> None:
        """`weight` `[N, K]`, and the parts in `PARTS` that are shaped as its scale, `[N, 1]` unless told."""
        self._hold("weight", (self.out_features, self.in_features), dtype)
        for name in ("weight_scale", "weight_offset"):
            if name in self.PARTS:
                self._hold(name, scale_shape or (self.out_features, 1))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Codes and scales follow the layer to another device and keep their dtype, which `half()` would round."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name in ("weight", *self.PARTS):
            if name not in self.OF_MODEL and getattr(self, name).dtype != before[name].dtype:
                setattr(self, name, before[name].to(getattr(self, name).device))
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """As of any module; a backward pass is refused, since codes pass no gradient on."""
        output = super().__call__(x)
        if torch.is_grad_enabled() and x.requires_grad:
            output = refuse_gradient(output, x, f"a {self.LABEL} linear")
        return output

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        """Drop what was derived from tensors that are about to change."""
        self.left_out = None

    def _unsound(self) -> Iterator[tuple[str, str]]:
        """Names of parts that no sound checkpoint has, and what is wrong with each."""
        for part in ("weight_scale", "input_scale"):
            scale = getattr(self, part, None)
            if scale is not None and not are_scales(scale):
                yield part, "is no positive number throughout"

    def check(self, name: str) -> None:
        """Raise an `OctavoError` that names a part no sound checkpoint has, as in a damaged file.

        Args:
            name: the layer's, for the message.
        """
        if any(part.is_meta for part in self.buffers()):
            return
        for part, fault in self._unsound():
            raise OctavoError(f"{name}.{part} {fault}; copy it again or convert again")

    def float_weight(self) -> torch.Tensor:
        """What the codes of the weight stand for, float32 `[N, K]`."""
        return self.weight.float() * self.weight_scale.float()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class W8A8Linear(QuantizedLinear):
    """Ascend's static W8A8: inputs in int8 by a scale and zero point from calibration.

    Args:
        in_features, out_features: K and N.
        has_bias: the float bias is kept too, as the format does; `quant_bias` is what computes.
        deq_scale_dtype: float32, or int64 whose low 32 bits are the float32 (Ascend's form for models not in bf16).
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        output = linear_w8a8(
            x, self.weight, self.input_scale, self.input_offset, self.quant_bias, self._decoded_deq_scale()
        )
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return linear_w8a8_dynamic(x, self.weight, self.weight_scale.view(-1), self._added_bias())


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
        columns = self.outlier_columns
        if not bool(((columns >= 0) & (columns < self.in_features)).all()) or bool((columns.diff() <= 0).any()):
            yield "outlier_columns", f"are no columns from 0 to {self.in_features - 1} that ascend"

    def float_weight(self) -> torch.Tensor:
        """What the weight stands for, float32 `[N, K]`."""
        return super().float_weight().index_copy(1, self.outlier_columns.long(), self.outlier_weight.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        columns = self.outlier_columns.long()
        others = linear_w8a8_dynamic(
            x.index_fill(-1, columns, 0), self.weight, self.weight_scale.view(-1), self._added_bias()
        )
        return others + nn.functional.linear(x.index_select(-1, columns), self.outlier_weight)


class WeightOnlyLinear(QuantizedLinear):
    """Float inputs times a weight in codes, `(code - weight_offset) * weight_scale`, per output channel or in groups.

    Args:
        in_features, out_features: K and N.
        has_bias: whether there is one.
        groups: how many the K channels make; 1 is per output channel.
    """

    CODES: tuple[int, int]
    """The smallest and largest code, between which the zero point of a range with 0 in it lies."""

    def __init__(self, in_features: int, out_features: int, has_bias: bool, groups: int = 1) -> None:
        super().__init__(in_features, out_features, has_bias)
        self._hold_weight(torch.int8, (out_features, groups))
        self._has_zero: bool | None = None

    def _forget(self) -> None:
        super()._forget()
        self._has_zero = None

    def _zero(self) -> torch.Tensor | None:
        """`weight_offset`, or None if it is 0 throughout, which is found out once, and not where that would break."""
        if self._has_zero is None and not (torch.compiler.is_compiling() or self.weight_offset.is_meta):
            self._has_zero = bool((self.weight_offset != 0).any())
        return None if self._has_zero is False else self.weight_offset

    def _unsound(self) -> Iterator[tuple[str, str]]:
        yield from super()._unsound()
        if not are_offsets(self.weight_offset, self.CODES):
            yield "weight_offset", f"is no whole number from {self.CODES[0]} to {self.CODES[1]} throughout"

    def check(self, name: str) -> None:
        """As of `QuantizedLinear`; whether there is an offset at all is found out here, once."""
        super().check(name)
        self._zero()

    def float_weight(self) -> torch.Tensor:
        """What the codes of the weight stand for, float32 `[N, K]`."""
        shape = self.out_features, self.in_features
        codes = from_codes(self.weight, WEIGHT_BLOCK, torch.float32)
        return (codes - expand_scale(self.weight_offset, *shape)) * expand_scale(self.weight_scale, *shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return linear_weight_only(x, self.weight, self.weight_scale, self._zero(), self._added_bias())


class W8A16Linear(WeightOnlyLinear):
    """Weights in int8 `[N, K]`."""

    LABEL = W8A16
    CODES = (INT8_MIN, INT8_MAX)


class W4A16Linear(WeightOnlyLinear):
    """Weights in int4, packed as the ops want them in uint8 `[N, K / 2]`, or unpacked in int8 `[N, K]`.

    Args:
        in_features, out_features, has_bias, groups: as of `WeightOnlyLinear`.
        is_packed: False for checkpoints that hold a code per byte.
    """

    LABEL = W4A16
    CODES = (-8, 7)

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, groups: int = 1, is_packed: bool = True
    ) -> None:
        super().__init__(in_features, out_features, has_bias, groups)
        if is_packed:
            self._hold("weight", (out_features, in_features // 2), torch.uint8)

    def _unsound(self) -> Iterator[tuple[str, str]]:
        yield from super()._unsound()
        if self.weight.dtype == torch.int8 and not are_offsets(self.weight, self.CODES):
            yield "weight", f"holds codes beyond {self.CODES[0]} and {self.CODES[1]}, those of int4"


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
    """Likewise, with one scale for all inputs, from calibration."""

    LABEL = FP8
    PARTS = ("weight_scale", "input_scale")

    def __init__(self, in_features: int, out_features: int, has_bias: bool, per_tensor: bool = False) -> None:
        super().__init__(in_features, out_features, has_bias, per_tensor)
        self._hold("input_scale", (1,))

    def _input_scale(self) -> torch.Tensor | None:
        return self.input_scale


QUANTIZED_LINEARS: dict[str, type[QuantizedLinear]] = {
    part.LABEL: part
    for part in (
        W8A8Linear, W8A8DynamicLinear, W8A16Linear, W4A16Linear, FP8Linear, FP8DynamicLinear, MixedLinear,
    )
}  # fmt: skip
"""The class of a linear layer by its label in a description."""


def empty_linear(
    label: str,
    in_features: int,
    out_features: int,
    has_bias: bool,
    *,
    groups: int = 1,
    per_tensor: bool = False,
    is_packed: bool = True,
    deq_scale_dtype: torch.dtype = torch.float32,
) -> QuantizedLinear:
    """A quantized linear layer whose tensors are still to be filled.

    Args:
        label: one of `LINEAR_LABELS`.
        in_features, out_features: K and N.
        has_bias: whether there is one.
        groups: of input channels, for W8A16 and W4A16.
        per_tensor: one scale for the whole weight, for fp8.
        is_packed: two codes to a byte, for W4A16.
        deq_scale_dtype: for W8A8, see `W8A8Linear`.
    """
    options: dict[str, Any] = {}
    if label == W8A8:
        options["deq_scale_dtype"] = deq_scale_dtype
    elif label in WEIGHT_ONLY:
        options["groups"] = groups
    elif label in FP8_LABELS:
        options["per_tensor"] = per_tensor
    if label == W4A16:
        options["is_packed"] = is_packed
    return QUANTIZED_LINEARS[label](in_features, out_features, has_bias, **options)


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
