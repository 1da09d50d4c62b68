"""Weights of linear layers on the CPU in the order in which its kernel reads them, and no other copy of them.

N output channels, K input channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ...ops.linear.cpu import LINEAR_KERNEL
from ...ops.linear.packed import Packed, pack_weight, unpack
from ...ops.linear.reference import WEIGHT_BLOCK
from ...ops.shared.codes import unpack_int4
from .offload import is_offloaded

_OF_PACKED = ("codes", "scale", "zero")


class PackedLinear(NamedTuple):
    """A linear layer as kernels take it that multiply int8 codes of x with a packed weight; see `Packed`.

    Attributes:
        codes, scale, zero: of the weight, in panels of 16 output channels. Where `input_scale` is given, the scale is
            that of the products, `input_scale * weight_scale`.
        bias: float32 `[N]`, added at the end; None if there is none.
        bits: 8 or 4.
        in_features, out_features: K and N.
        groups: of the K channels of the weight.
        x_group: channels of x that share a scale, which each row finds of its own: `max|x| / 127`.
        input_scale, input_offset: float32 `[1]`, those of all rows of static W8A8; None of other kinds.
        quant_bias: int32 `[N]` of static W8A8, added to the sums of codes; None of other kinds.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    in_features: int
    out_features: int
    groups: int
    x_group: int
    input_scale: torch.Tensor | None = None
    input_offset: torch.Tensor | None = None
    quant_bias: torch.Tensor | None = None


def _halves(scale: torch.Tensor, zero: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero of groups in float16 if all of them are numbers of it, as a conversion makes them."""
    parts = [scale] if zero is None else [scale, zero]
    halves = [part.to(torch.float16) for part in parts]
    has_groups = scale.dim() == 2 and scale.shape[1] > 1
    if has_groups and all(torch.equal(half.to(part.dtype), part) for half, part in zip(halves, parts, strict=True)):
        parts = halves
    return parts[0], None if zero is None else parts[1]


class PackedWeight(nn.Module):
    """Mixin of a quantized linear layer whose weight is packed on the CPU, once, in the place of what was loaded.

    The tensors that are packed can still be read by their names, and `state_dict`, copies, pickles and moves to other
    devices and dtypes have them as they were loaded, bit for bit; each of these unpacks them.
    """

    PACKED: tuple[str, ...] = ("weight",)
    """Names of the tensors whose values are in the panels alone: `weight`, and scale and zero where they are large."""

    _panels: Packed | None = None
    _unpacked_dtype: torch.dtype
    _scale_dtype: torch.dtype

    def _to_pack(self) -> tuple[int, torch.Tensor, torch.Tensor | None] | None:
        """Bits, scale and zero of a weight that is to be packed; None of one that is not."""
        return None

    def pack(self) -> Packed | None:
        """The packed weight, which is made the first time.

        None on other devices, of kinds that are not packed, without the C kernel, for which panels are, and of a weight
        that is somewhere else between two uses, of which no copy is to stay.
        """
        is_free = self._panels is None and not torch.compiler.is_compiling() and not is_offloaded(self)
        if is_free and self._buffers["weight"].device.type == "cpu":
            parts = self._to_pack() if LINEAR_KERNEL.supports() is None else None
            if parts is not None:
                self._hold_panels(*parts)
        return self._panels

    def _hold_panels(self, bits: int, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        weight = self._buffers["weight"]
        with torch.inference_mode(False), torch.no_grad():
            panels = pack_weight(weight, *_halves(scale, zero), bits)
        self._unpacked_dtype, self._scale_dtype = weight.dtype, scale.dtype
        for name in _OF_PACKED:
            self.register_buffer(f"panels_{name}", getattr(panels, name), persistent=False)
        self._panels = panels
        for name in self.PACKED:
            self._buffers[name] = None

    def _unpacked(self) -> dict[str, torch.Tensor]:
        """The tensors that are packed, as they were loaded."""
        codes, scale, zero = unpack(self._panels)
        if codes.dtype != self._unpacked_dtype:
            codes = unpack_int4(codes, WEIGHT_BLOCK)
        scale = scale.to(self._scale_dtype)
        zero = torch.zeros_like(scale) if zero is None else zero.to(self._scale_dtype)
        found = {"weight": codes, "weight_scale": scale, "weight_offset": zero}
        return {name: found[name] for name in self.PACKED}

    def unpack(self) -> None:
        """Hold the tensors as they were loaded, until a layer packs them again."""
        if self._panels is not None:
            self._buffers.update(self._unpacked())
            self._panels = None
            for name in _OF_PACKED:
                delattr(self, f"panels_{name}")

    def __getattr__(self, name: str) -> Any:
        if name in self.PACKED and self._panels is not None:
            return self._unpacked()[name]
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which share nothing with this layer but tensors that are not packed."""
        panels = {f"panels_{name}" for name in _OF_PACKED}
        buffers = self._buffers if self._panels is None else {**self._buffers, **self._unpacked()}
        state = {name: part for name, part in self.__dict__.items() if name != "_panels"}
        state["_buffers"] = {name: part for name, part in buffers.items() if name not in panels}
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - panels
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._panels is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        packed = self._buffers
        self._buffers = {**packed, **self._unpacked()}
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._buffers = packed

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedWeight":
        self.unpack()
        return super()._apply(fn, recurse)

    def packed(self) -> PackedLinear | None:
        """The layer as kernels take it that multiply codes of its input; None where it cannot be packed."""
        return None
