"""Embeddings in int8, and last linears that are their embedding.

V tokens of the vocabulary, E channels.
"""

import torch
from torch import nn

from ...ops.linear.packed import PANEL_CHANNELS, Packed
from ...ops.shared.codes import INT8_MAX, INT8_MIN
from .packed_weight import PackedLinear
from .schemes.linear_scheme import EMBEDDING
from .weight_only_linear import WeightOnlyLinear


class QuantizedEmbedding(WeightOnlyLinear):
    """Rows of codes `[V, E]` times their scales, `[V, E / group]`; symmetric, so that there are no zero points.

    It is the weight of a linear layer as well: `product` multiplies with all of its rows.

    Args:
        num_embeddings, embedding_dim: V and E.
        num_groups: how many the E channels of a row make.
        factor: that rows are multiplied by, rounded to their dtype.
    """

    LABEL = EMBEDDING
    PACKED = ("weight", "weight_scale")
    CODES = (INT8_MIN, INT8_MAX)
    PARTS = ("weight_scale",)
    adds_remainder = True

    def __init__(
        self, num_embeddings: int, embedding_dim: int, num_groups: int = 1, factor: float | None = None
    ) -> None:
        super().__init__(embedding_dim, num_embeddings, has_bias=False, num_groups=num_groups)
        self.num_embeddings, self.embedding_dim, self.factor = num_embeddings, embedding_dim, factor
        self.register_buffer("like", torch.empty(0), persistent=False)  # of the model's dtype, that of the rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape to `[..., E]`, of the model's dtype."""
        if self._panels is not None:
            codes, scale = rows_of_panels(self._panels, ids)
        else:
            codes, scale = (nn.functional.embedding(ids, part) for part in (self.weight, self.weight_scale))
        rows = (codes.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2).to(self.like.dtype)
        return rows if self.factor is None else rows * rows.new_full((), self.factor)

    @property
    def device(self) -> torch.device:
        """Where its codes lie."""
        return (self._buffers["weight"] if self._panels is None else self._panels.codes).device

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., E] -> [..., V]`, as a linear layer of this weight; a backward pass is refused."""
        return self.refusing_gradient(super().forward(x), x)


def rows_of_panels(panels: Packed, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 `[..., E]`, and scales, `[..., E / group]`, of some rows of a packed weight of 8 bits.

    Raises:
        IndexError: there is no such row.
    """
    is_known = ids.numel() > 0 and not torch.compiler.is_compiling()
    if is_known and not (int(ids.min()) >= 0 and int(ids.max()) < panels.out_features):
        raise IndexError(f"index out of range: ids from {int(ids.min())} to {int(ids.max())}, of {panels.out_features}")
    panel, row = ids // PANEL_CHANNELS, ids % PANEL_CHANNELS
    codes = panels.codes.view(len(panels.codes), -1, PANEL_CHANNELS, 4)[panel, :, row].flatten(-2)
    return (codes[..., : panels.in_features] ^ 128).view(torch.int8), panels.scale[panel, :, row].float()


class TiedLinear(nn.Module):
    """The last linear of a model whose weight is its embedding, which holds it: once, in codes.

    Args:
        embedding: whose weight it is.
    """

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # within a tuple, as it is not a module of this one

    @property
    def embedding(self) -> QuantizedEmbedding:
        """What holds the weight."""
        return self._embedding[0]

    @property
    def weight(self) -> torch.Tensor:
        """Codes, int8 `[V, E]`."""
        return self.embedding.weight

    @property
    def weight_scale(self) -> torch.Tensor:
        """`[V, E / group]`."""
        return self.embedding.weight_scale

    def float_weight(self) -> torch.Tensor:
        """What the codes stand for, float32 `[V, E]`."""
        return self.embedding.float_weight()

    def packed(self) -> PackedLinear | None:
        """See `PackedWeight`."""
        return self.embedding.packed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., E] -> [..., V]`, where the embedding lies."""
        return self.embedding.product(x.to(self.embedding.device))

    def extra_repr(self) -> str:
        return f"in_features={self.embedding.embedding_dim}, out_features={self.embedding.num_embeddings}"
