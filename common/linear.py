"""The W8A8 linear layers: int8 weights per output channel times int8 activations, static or dynamic, on the codes."""

from collections.abc import Callable

import torch
from torch import nn

from ..ops import linear_w8a8, linear_w8a8_dynamic
from .errors import OctavoError


class QuantizedLinear(nn.Module):
    """What the quantized linear layers share: int8 weights `[N, K]`, symmetric per output channel.

    Tensors have the names of Ascend's format on disk. Subclasses say in `LABEL` how that format calls them.
    """

    LABEL: str
    PARTS: tuple[str, ...] = ("weight_scale", "weight_offset")
    """Tensors beside `weight` and `bias`, which keep their dtype whatever the model's is."""

    def __init__(self, in_features: int, out_features: int, has_bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty((out_features, in_features), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty((out_features, 1), dtype=torch.float32))
        self.register_buffer("weight_offset", torch.empty((out_features, 1), dtype=torch.float32))
        self.register_buffer("bias", torch.empty(out_features) if has_bias else None)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Scales follow the layer to another device and keep their dtype, which `model.half()` would round."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name in self.PARTS:
            if getattr(self, name).dtype != before[name].dtype:
                setattr(self, name, before[name].to(getattr(self, name).device))
        return self

    def _positive(self) -> tuple[torch.Tensor, ...]:
        """What has to be positive in a sound checkpoint."""
        return (self.weight_scale,)

    def check(self, name: str) -> None:
        """Raise an `OctavoError` if a scale is no positive number, as in a damaged file."""
        for part in self._positive():
            if not part.is_meta and not bool((torch.isfinite(part) & (part > 0)).all()):
                raise OctavoError(f"{name} holds a scale that is no positive number; copy it again or convert again")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class W8A8Linear(QuantizedLinear):
    """Ascend's static W8A8: inputs in int8 by a scale and zero point from calibration.

    Args:
        in_features, out_features: K and N.
        has_bias: the float bias is kept too, as the format does; `quant_bias` is what computes.
        deq_scale_dtype: float32, or int64 whose low 32 bits are the float32 (Ascend's form for models not in bf16).
    """

    LABEL = "W8A8"
    PARTS = (*QuantizedLinear.PARTS, "input_scale", "input_offset", "quant_bias", "deq_scale")

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, deq_scale_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(in_features, out_features, has_bias)
        self.register_buffer("input_scale", torch.empty(1, dtype=torch.float32))
        self.register_buffer("input_offset", torch.empty(1, dtype=torch.float32))
        self.register_buffer("quant_bias", torch.empty(out_features, dtype=torch.int32))
        self.register_buffer("deq_scale", torch.empty(out_features, dtype=deq_scale_dtype))
        self._deq_scale: torch.Tensor | None = None

    def _positive(self) -> tuple[torch.Tensor, ...]:
        return (self.input_scale, self.weight_scale, self._decoded_deq_scale())

    def _decoded_deq_scale(self) -> torch.Tensor:
        """`deq_scale` as float32, decoded once per device."""
        if self._deq_scale is None or self._deq_scale.device != self.deq_scale.device:
            self._deq_scale = decode_deq_scale(self.deq_scale)
        return self._deq_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return linear_w8a8(
            x, self.weight, self.input_scale, self.input_offset, self.quant_bias, self._decoded_deq_scale()
        )


class W8A8DynamicLinear(QuantizedLinear):
    """Ascend's W8A8_DYNAMIC: each token's input in int8 by a scale of its own, with no calibration."""

    LABEL = "W8A8_DYNAMIC"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return linear_w8a8_dynamic(x, self.weight, self.weight_scale.view(-1), self.bias)


class BiasFree:
    """Mixin of a linear layer that leaves its bias, or the large part of it, for somebody else to add: see `folds.py`.

    Attributes:
        left_out: what was left out when the layer last ran, `[N]`; the rest is added as ever.
        choose: from the layer, the part to leave out; None leaves out all.
    """

    left_out: torch.Tensor | None = None
    choose: Callable[[nn.Module], torch.Tensor] | None = None

    def _split(self) -> torch.Tensor | None:
        """Work out what is left out, once; return the rest of the bias, or None if there is none."""
        bias = self.bias.detach()
        left = self.left_out
        if left is None or (left.device, left.dtype) != (bias.device, bias.dtype):
            with torch.inference_mode(False):  # it outlives this pass, which may be one without gradients
                self.left_out = bias if self.choose is None else self.choose(self)
        return None if self.choose is None else bias - self.left_out


class BiasFreeLinear(BiasFree, nn.Linear):
    """A float linear layer without (part of) its bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return nn.functional.linear(x, self.weight, self._split())


class BiasFreeW8A8Linear(BiasFree, W8A8Linear):
    """Likewise; `quant_bias` holds the bias too, in steps of `deq_scale`, so that it is taken off again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        self._split()
        return super().forward(x) - self.left_out.to(x.dtype)


class BiasFreeW8A8DynamicLinear(BiasFree, W8A8DynamicLinear):
    """Likewise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return linear_w8a8_dynamic(x, self.weight, self.weight_scale.view(-1), self._split())


BIAS_FREE_LINEARS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: BiasFreeLinear,
    W8A8Linear: BiasFreeW8A8Linear,
    W8A8DynamicLinear: BiasFreeW8A8DynamicLinear,
}
"""What a linear layer becomes when its bias is folded."""
QUANTIZED_LINEARS: dict[str, type[QuantizedLinear]] = {part.LABEL: part for part in (W8A8Linear, W8A8DynamicLinear)}
"""The class of a linear layer by its label in a description."""


def encode_deq_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 `[N]` to the form on disk: itself, or its bit pattern in int64 as msmodelslim writes it."""
    return scale if dtype == torch.float32 else scale.view(torch.int32).to(torch.int64)


def decode_deq_scale(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_deq_scale`."""
    return stored if stored.dtype == torch.float32 else stored.to(torch.int32).view(torch.float32)
