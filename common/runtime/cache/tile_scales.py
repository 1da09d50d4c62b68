"""Second scales: what the tokens and channels of a tile are divided by before they are coded, `Codec.tile`.

`x = (code - zero) * scale * second`. Of a tile, one scale per token and one per channel are sought by which all tokens
and all channels come to the same standard deviation. One of the two goes into the scale that each of its values has
anyway, and which the codes follow from; the other one is stored as the second scale.

Source: KVarN (arXiv 2606.03458), variance normalization, with its constants.

B batch, G KV heads, S tokens, D head_dim, T tiles.
"""

import torch

from ..schemes.tensor_codec import Codec

BALANCE_ROUNDS = 16
SPREAD_LIMITS = (1e-3, 1e3)
"""Between these a standard deviation is taken to be, by which a round divides."""
LOG_LIMITS = (-0.3, 10.0)
"""Between these stay the logarithms of the scales."""
SMALLEST_SPREAD = 1e-8


def _imbalance(values: torch.Tensor) -> torch.Tensor:
    """How far standard deviations are apart, `[..., 1, 1]`: the largest by the smallest of columns, and of rows."""
    ratios = []
    for dim in (-2, -1):
        spread = values.std(dim=dim, keepdim=True)
        smallest = spread.amin(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_SPREAD)
        ratios.append(spread.amax(dim=(-2, -1), keepdim=True) / smallest)
    return ratios[0] + ratios[1]


def column_scales(values: torch.Tensor) -> torch.Tensor:
    """The scales of columns that balance float32 values `[..., R, C]` together with scales of rows: `[..., 1, C]`.

    In turns, columns and then rows are divided by their standard deviation; of all rounds the one counts after which
    standard deviations are least apart, the latest of equals, or none where the values are balanced best as they are.
    """
    logs = [values.new_zeros((*values.shape[:-2], 1, values.shape[-1])), values.new_zeros((*values.shape[:-1], 1))]
    best, least = logs[0].exp(), _imbalance(values)
    balanced = values
    for _ in range(BALANCE_ROUNDS):
        for index, dim in enumerate((-2, -1)):
            spread = balanced.std(dim=dim, keepdim=True).clamp(*SPREAD_LIMITS)
            logs[index] = (logs[index] + spread.log()).clamp(*LOG_LIMITS)
            balanced = values / logs[0].exp() / logs[1].exp()
        imbalance = _imbalance(balanced)
        is_better = imbalance <= least
        best, least = torch.where(is_better, logs[0].exp(), best), torch.where(is_better, imbalance, least)
    return best


def second_scales(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    """The second scales of float32 values `[B, G, S, D]`, whole tiles, in the dtype they are stored in.

    Returns:
        `[B, G, S, 1]` beside scales per channel, `[B, G, T, D]` beside scales per token.
    """
    tiles = values.unflatten(2, (-1, codec.tile))  # [B, G, T, tile, D]
    if codec.granularity == "channel":
        scales = column_scales(tiles.mT).mT.flatten(2, 3)
    else:
        scales = column_scales(tiles)[..., 0, :]
    return scales.to(codec.stored_scale_dtype)
