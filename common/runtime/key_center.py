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
        self._mean = mean
        self._table: SlotTable = slot_table(tuple(frequencies.tolist()))
        self._turned = 2 * len(frequencies)

    def _mean_on(self, device: torch.device) -> torch.Tensor:
        """The mean on a device, where it stays."""
        if self._mean.device != device:
            with torch.inference_mode(False):  # it outlives this pass
                self._mean = self._mean.to(device)
        return self._mean

    def rows(self, tokens: int, device: torch.device) -> torch.Tensor:
        """cos and sin of so many slots or more, `[P, R]`."""
        return self._table.rows(tokens, device)

    def left_out(self, key: torch.Tensor, first: int) -> torch.Tensor:
        """`[B, G, S, D]` of slots from `first` on without the mean, in float32 or float64."""
        last = first + key.shape[2]
        return at_least_float32(key) - turned(self._mean_on(key.device), self.rows(last, key.device)[first:last])

    def terms(self, query: torch.Tensor, slots: torch.Tensor, bias: torch.Tensor | None = None) -> PositionScores:
        """What the mean adds to the scores; the channels that nothing turns add nothing.

        Args:
            query: `[B, H, Q, D]` after RoPE.
            slots: what `rows` gives of all stored tokens.
            bias: `[B or 1, G, D]` that is left out too, as of slot 0.
        """
        if not self._turned:
            return PositionScores()
        vector = self._mean_on(query.device)[None, :, 0]
        vector = (vector if bias is None else vector + bias)[..., : self._turned]
        vector = vector.repeat_interleave(query.shape[1] // vector.shape[1], dim=1)[:, :, None]
        both = pair_products(query[..., : self._turned].float(), vector)
        return PositionScores(both, slots, torch.zeros(1, dtype=torch.int64, device=query.device))
