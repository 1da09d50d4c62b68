"""Rows of a float embedding, or of the last linear, as the int8 codes and scales of the output.

V tokens of the vocabulary, E channels. A row depends on no other, so that parts of a matrix are done one by one.
"""

import torch

from ...runtime.schemes.linear_scheme import EMBEDDING_SCHEME
from .quantize import weight_parts


def embedding_parts(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """`weight`, int8 `[V, E]`, and `weight_scale`, float32 `[V, E / group]`, of rows of any float dtype, on the CPU."""
    parts = weight_parts(rows, None, EMBEDDING_SCHEME)
    return {name: parts[name] for name in ("weight", "weight_scale")}


def through_codes(rows: torch.Tensor) -> torch.Tensor:
    """What is left of float32 rows `[..., E]` that were quantized, on their device."""
    parts = embedding_parts(rows.flatten(0, -2))
    scale = parts["weight_scale"]
    found = parts["weight"].unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    return found.flatten(1).view(rows.shape).to(rows.device)
