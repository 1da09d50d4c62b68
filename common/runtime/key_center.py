"""The mean of K, which is left out of the cache and comes back exactly in attention.

Before RoPE, K has a large mean in most heads, which calibration finds, and which a scale per token or channel has to
take in. With R_n the rotation of slot n, `q . R_n k = q . R_n (k - m) + q . R_n m`: the cache holds `R_n (k - m)`, and
the second term enters the scores by slot, as that of a folded bias does by position (`bias_fold.py`). It is exact
whatever m is, and wherever padding moves the positions of a sequence: that only makes m less of a mean.

B batch, Q query tokens, H query heads, G KV heads, D head_dim, R channels that RoPE turns.
"""

import torch

from ...ops.attention.call import PositionScores
from .rotary import SlotTable, at_least_float32, slot_table, turned


def pair_products(query: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """What `query . R vector` is of cos and of sin of the angles of R: `[..., D]`, D / 2 pairs each.

    Args:
        query, vector: `[..., D]`, all of whose channels are turned, d with d + D / 2.
    """
    (q1, q2), (v1, v2) = query.chunk(2, dim=-1), vector.chunk(2, dim=-1)
    return torch.cat((q1 * v1 + q2 * v2, q2 * v1 - q1 * v2), dim=-1)


class KeyCenter:
    """The mean of K of a layer.

    Args:
        mean: before RoPE, float32 `[G, 1, D]`.
        frequencies: angles per slot of the rotary pairs `[R / 2]`.
    """

    def __init__(self, mean: torch.Tensor, frequencies: torch.Tensor) -> None:
        self.mean = mean
        self._table: SlotTable = slot_table(tuple(frequencies.tolist()))
        self._turned = 2 * len(frequencies)

    def left_out(self, key: torch.Tensor, first: int) -> torch.Tensor:
        """`[B, G, S, D]` of slots from `first` on without the mean, in float32 or float64."""
        rows = self._table.rows(first + key.shape[2], key.device)[first : first + key.shape[2]]
        return at_least_float32(key) - turned(self.mean.to(key.device), rows)

    def terms(self, query: torch.Tensor, tokens: int, bias: torch.Tensor | None = None) -> PositionScores:
        """What the mean adds to the scores of so many stored tokens; the channels that nothing turns add nothing.

        Args:
            query: `[B, H, Q, D]` after RoPE.
            bias: `[B or 1, G, D]` that is left out too, as of slot 0.
        """
        if not self._turned:
            return PositionScores()
        vector = self.mean[:, 0].to(query.device)[None]
        vector = (vector if bias is None else vector + bias)[..., : self._turned]
        vector = vector.repeat_interleave(query.shape[1] // vector.shape[1], dim=1)[:, :, None]
        both = pair_products(query[..., : self._turned].float(), vector)
        start = torch.zeros(1, dtype=torch.int64, device=query.device)
        return PositionScores(both, self._table.rows(tokens, query.device), start)
