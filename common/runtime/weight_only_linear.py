"""Linear layers of float inputs and weights in int8 or int4."""

from collections.abc import Iterator

import torch

from ...ops import linear_grouped, linear_weight_only
from ...ops.linear.packed_ops import run_packed
from ...ops.linear.reference import WEIGHT_BLOCK, with_remainder
from ...ops.shared.codes import INT8_MAX, INT8_MIN, expand_scale, from_codes
from ...ops.shared.registry import eagerly
from ..errors import OctavoError
from .linear_values import are_offsets
from .packed_weight import PackedLinear
from .quantized_linear import QuantizedLinear
from .schemes.linear_scheme import CPU_ACTIVATIONS, W4A16, W8A16


class WeightOnlyLinear(QuantizedLinear):
    """Float inputs times a weight in codes, `(code - weight_offset) * weight_scale`, per output channel or in groups.

    Attributes:
        cpu_activations: "int8" if inputs on the CPU are quantized per token and group of input channels, as the weight
            has them, so that codes are multiplied; "float" if they never are.
        adds_remainder: whether what those codes leave of an input is quantized and multiplied as well, which makes 15
            bits of 8 at little cost for one token, as the weight is read once: for a last linear, whose errors nothing
            behind it evens out.

    Args:
        in_features, out_features: K and N.
        has_bias: whether there is one.
        num_groups: how many the K channels make; 1 is per output channel.
    """

    _cpu_activations = "float"
    adds_remainder = False
    CODES: tuple[int, int]
    """The smallest and largest code, between which the zero point of a range with 0 in it lies."""

    PACKED = ("weight", "weight_scale", "weight_offset")

    def __init__(self, in_features: int, out_features: int, has_bias: bool, num_groups: int = 1) -> None:
        super().__init__(in_features, out_features, has_bias)
        self._hold_weight(torch.int8, (out_features, num_groups))
        self._has_zero: bool | None = None if "weight_offset" in self.PARTS else False

    @property
    def cpu_activations(self) -> str:
        """See the attributes of the class; what is packed for the other is unpacked once it is set."""
        return self._cpu_activations

    @cpu_activations.setter
    def cpu_activations(self, choice: str) -> None:
        if choice not in CPU_ACTIVATIONS:
            raise OctavoError(f"cpu_activations is {choice!r}, which is none of {', '.join(CPU_ACTIVATIONS)}")
        if choice != self._cpu_activations:
            self.unpack()
        self._cpu_activations = choice

    def _forget(self) -> None:
        super()._forget()
        self._has_zero = None if "weight_offset" in self.PARTS else False

    def _scale(self) -> torch.Tensor:
        """`weight_scale` as kernels take it."""
        return self.weight_scale

    def _zero(self) -> torch.Tensor | None:
        """`weight_offset`, or None if it is 0 throughout, which is found out once, and not where that would break."""
        if self._has_zero is False:
            return None
        if self._has_zero is None and not (torch.compiler.is_compiling() or self.weight_offset.is_meta):
            self._has_zero = bool((self.weight_offset != 0).any())
        return None if self._has_zero is False else self.weight_offset

    def _unsound(self) -> Iterator[tuple[str, str]]:
        yield from super()._unsound()
        if "weight_offset" in self.PARTS and not are_offsets(self.weight_offset, self.CODES):
            yield "weight_offset", f"is no whole number from {self.CODES[0]} to {self.CODES[1]} throughout"

    def check(self, name: str) -> None:
        """As of `QuantizedLinear`; whether there is an offset at all is found out here, once."""
        super().check(name)
        self._zero()
        self.pack()

    @property
    def _groups(self) -> int:
        """How many groups the K channels make."""
        return self._buffers["weight_scale"].shape[1] if self._panels is None else self._panels.num_groups

    def _to_pack(self) -> tuple[int, torch.Tensor, torch.Tensor | None] | None:
        if self.cpu_activations != "int8" or (self._groups > 1 and self.in_features // self._groups % WEIGHT_BLOCK):
            return None
        return 4 if self.CODES[0] == -8 else 8, self._scale(), self._zero()

    def packed(self) -> PackedLinear | None:
        """See `PackedWeight`; None where inputs stay in float."""
        return self._packed(self.in_features // self._groups) if self.cpu_activations == "int8" else None

    def float_weight(self) -> torch.Tensor:
        """What the codes of the weight stand for, float32 `[N, K]`."""
        shape = self.out_features, self.in_features
        codes, zero = from_codes(self.weight, WEIGHT_BLOCK, torch.float32), self._zero()
        if zero is not None:
            codes -= expand_scale(zero, *shape)
        return codes * expand_scale(self._scale(), *shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        if self.cpu_activations != "int8" or x.device.type != "cpu":
            parts = self.weight, self._scale(), self._zero(), self._added_bias()
            return eagerly(linear_weight_only, x, *parts)
        bias, group = self._added_bias(), self.in_features // self._groups
        if not self.adds_remainder:
            return self._product_of_codes(x, bias, group)
        codes, remainder = self._product_of_codes(with_remainder(x, group), None, group)
        output = codes + remainder
        return (output if bias is None else output + bias).to(x.dtype)

    def _product_of_codes(self, x: torch.Tensor, bias: torch.Tensor | None, group: int) -> torch.Tensor:
        panels = self.pack()
        if panels is None:
            return linear_grouped(x, self.weight, self._scale(), self._zero(), bias, group)
        return run_packed(x, panels, bias, group)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cpu_activations={self.cpu_activations}"


class W8A16Linear(WeightOnlyLinear):
    """Weights in int8 `[N, K]`."""

    LABEL = W8A16
    CODES = (INT8_MIN, INT8_MAX)


class W4A16Linear(WeightOnlyLinear):
    """Weights in int4, packed as the ops want them in uint8 `[N, K / 2]`, or unpacked in int8 `[N, K]`.

    Args:
        in_features, out_features, has_bias, num_groups: as of `WeightOnlyLinear`.
        is_packed: False for checkpoints that hold a code per byte.
    """

    LABEL = W4A16
    CODES = (-8, 7)

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, num_groups: int = 1, is_packed: bool = True
    ) -> None:
        super().__init__(in_features, out_features, has_bias, num_groups)
        if is_packed:
            self._hold("weight", (out_features, in_features // 2), torch.uint8)

    def _unsound(self) -> Iterator[tuple[str, str]]:
        yield from super()._unsound()
        if self.weight.dtype == torch.int8 and not are_offsets(self.weight, self.CODES):
            yield "weight", f"holds codes beyond {self.CODES[0]} and {self.CODES[1]}, those of int4"
