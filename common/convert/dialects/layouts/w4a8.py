"""W4A8_DYNAMIC as msmodelslim 1.0.0 lays it out: int4 codes, two output channels to a byte, and scales of two levels.

N output channels, K input channels, G groups of them.
"""

import torch

PER_BYTE = 2
SHARES = 16
"""Parts of the input channels that `scale_bias` is told for, of linears whose inputs ranks share."""
_LOW = 0x0F


def pack_channels(codes: torch.Tensor) -> torch.Tensor:
    """int4 codes `[N, K]` as int8 `[N / 2, K]`: the first of two output channels in the low bits."""
    first, second = codes[0::2], codes[1::2]
    return (first & _LOW) | (second << 4)


def w4a8_parts(codes: torch.Tensor, scale: torch.Tensor, shares_inputs: bool) -> dict[str, torch.Tensor]:
    """The tensors of a linear by the ends of their names, from int4 codes `[N, K]` and float32 scales `[N, G]`.

    The first level of scales is 1, so that the second, of groups, is rounded once by what holds it in the dtype of the
    model. `scale_bias` is what operators with inputs in int8 add for the halves of a byte: 8 times the sum of the
    weights over all input channels, or over each of `SHARES` parts of them (msmodelslim's `process_scale`).
    """
    weights = codes.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    sums = weights.flatten(1).unflatten(1, (SHARES if shares_inputs else 1, -1)).sum(dim=2)
    return {
        "weight": pack_channels(codes),
        "weight_scale": torch.ones(len(codes), 1),
        "weight_offset": torch.zeros(len(codes), 1),
        "weight_scale_second": scale,
        "weight_offset_second": torch.zeros_like(scale),
        "scale_bias": 8 * sums,
    }
