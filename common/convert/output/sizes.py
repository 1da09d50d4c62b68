"""What weights in codes take on the disk."""

import math
from collections.abc import Mapping

from ...runtime.checkpoint.files import TensorHeader
from .shards import SAFETENSORS_DTYPES


def bits_per_weight(headers: Mapping[str, TensorHeader], weights: Mapping[str, int]) -> float | None:
    """Bits that a weight of some modules takes, scales and zero points counted and biases not; None of no module.

    Args:
        headers: dtype and shape by name of all tensors that are stored.
        weights: how many weights each of the modules has, by name.
    """
    stored = [
        math.prod(header.shape) * SAFETENSORS_DTYPES[header.dtype].itemsize
        for name, header in headers.items()
        if name.rpartition(".")[0] in weights and not name.endswith(".bias")
    ]
    return 8 * sum(stored) / sum(weights.values()) if weights else None
