"""Weight-only linear layers whose groups of input channels are no neighbours, as GPTQ's act-order leaves them."""

from collections.abc import Iterator

import torch

from .quantized_linear import QuantizedLinear
from .schemes.linear_scheme import W4A16_ORDERED, W8A16_ORDERED
from .weight_only_linear import W4A16Linear, W8A16Linear, WeightOnlyLinear


class OrderedLinear(WeightOnlyLinear):
    """Mixin before a weight-only linear layer: the codes lie group by group, and inputs are put in that order.

    `input_order`, int32 `[K]`, says which channel of the input each column of `weight` is for.
    """

    PARTS = (*QuantizedLinear.PARTS, "input_order")

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, num_groups: int = 1, **others: bool
    ) -> None:
        super().__init__(in_features, out_features, has_bias, num_groups, **others)
        self._hold("input_order", (in_features,), torch.int32)

    def _unsound(self) -> Iterator[tuple[str, str]]:
        yield from super()._unsound()
        columns = torch.arange(self.in_features, dtype=torch.int32, device=self.input_order.device)
        if not torch.equal(self.input_order.sort().values, columns):
            yield "input_order", f"does not name each of {self.in_features} input channels once"

    def packed(self) -> None:
        """None: kernels of whole layers read inputs as they come."""
        return None

    def float_weight(self) -> torch.Tensor:
        """What the codes of the weight stand for, float32 `[N, K]`, in the order of the input."""
        found = super().float_weight()
        return torch.empty_like(found).index_copy_(1, self.input_order.long(), found)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return super().forward(x.index_select(-1, self.input_order))


class W8A16OrderedLinear(OrderedLinear, W8A16Linear):
    """`W8A16Linear` of an input in another order."""

    LABEL = W8A16_ORDERED


class W4A16OrderedLinear(OrderedLinear, W4A16Linear):
    """`W4A16Linear` of an input in another order."""

    LABEL = W4A16_ORDERED
