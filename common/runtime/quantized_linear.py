"""What the quantized linear layers share: tensors in codes, their dtypes, and whether they are sound."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import OctavoError
from .foldable_linear import FoldableBias
from .gradients import refuse_gradient
from .linear_values import are_scales
from .packed_weight import PackedLinear, PackedWeight


class QuantizedLinear(FoldableBias, PackedWeight):
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
        self.unpack()
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name in ("weight", *self.PARTS):
            if name not in self.OF_MODEL and getattr(self, name).dtype != before[name].dtype:
                setattr(self, name, before[name].to(getattr(self, name).device))
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """As of any module; a backward pass is refused, since codes pass no gradient on."""
        return self.refusing_gradient(super().__call__(x), x)

    def refusing_gradient(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`output`, made of `x`, whose backward pass raises an `OctavoError`."""
        if torch.is_grad_enabled() and x.requires_grad:
            output = refuse_gradient(output, x, f"a {self.LABEL} linear")
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        """A tensor that is set by hand takes the place of all that was made of the one before."""
        if name in ("weight", "bias", *self.PARTS):
            self.unpack()
            self._forget()
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As of any module; a weight that is none of codes is refused, which would be cut to whole numbers."""
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype.itemsize > 1:
            raise OctavoError(f"{prefix}weight is given in {given.dtype}, and this layer holds codes: convert it anew")
        self._forget()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

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

    def _packed(self, x_group: int, **others: torch.Tensor) -> PackedLinear | None:
        """See `packed`."""
        panels, bias = self.pack(), self._added_bias()
        if panels is None:
            return None
        bias = None if bias is None else bias.float()
        sizes = panels.bits, panels.in_features, panels.out_features, panels.num_groups
        return PackedLinear(panels.codes, panels.scale, panels.zero, bias, *sizes, x_group, **others)

    def float_weight(self) -> torch.Tensor:
        """What the codes of the weight stand for, float32 `[N, K]`."""
        return self.weight.float() * self.weight_scale.float()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
