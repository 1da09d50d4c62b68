"""What attention does about the form in which K and V are stored: rotated or in a basis, and less a bias or a mean.

B batch, Q query tokens, H query heads, D head_dim.
"""

from typing import Any

import torch

from ...ops.attention.call import PositionScores
from .cache.views import Codes, Segments
from .rotary import by_kv_head, hadamard


def as_stored_keys(query: torch.Tensor, keys: Codes | Segments) -> torch.Tensor:
    """The query `[B, H, Q, D]` for K as it is stored: rotated, or in the dual of K's basis."""
    if keys.dual is not None:
        return by_kv_head(query, keys.dual.transpose(1, 2))
    return hadamard(query) if keys.rotated else query


def as_values(output: torch.Tensor, values: Codes | Segments) -> torch.Tensor:
    """The output `[B, Q, H, D]` over V as it is stored, turned back."""
    if values.dual is not None:
        return by_kv_head(output.transpose(1, 2), values.dual).transpose(1, 2)
    return hadamard(output) if values.rotated else output


def left_out_scores(
    query: torch.Tensor, keys: Codes | Segments, tokens: int, fold: Any, position_ids: torch.Tensor | None
) -> PositionScores:
    """What is left out of K adds to the scores: a folded bias, and the mean of the cache's scheme.

    Args:
        query: `[B, H, Q, D]` after RoPE.
        tokens: stored, or room for as many.
        fold: the `BiasFold` of the attention module, or None.
        position_ids: int64 `[B or 1, Q]`, which folded biases need.

    Raises:
        OctavoError: as `BiasFold.terms` and `BiasFold.key_bias_by_slot`.
    """
    if keys.center is None:
        length = getattr(keys, "length", None)
        return PositionScores() if fold is None else fold.terms(query, position_ids, tokens, length)
    slots = keys.center.rows(tokens, query.device)
    bias = None if fold is None else fold.key_bias_by_slot(position_ids, tokens, slots)
    return keys.center.terms(query, slots, bias)
