"""Rotations of q, k and v that attention does not notice: Hadamard matrices, and RoPE by the slot of a token."""

from functools import lru_cache
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@lru_cache(maxsize=16)
def _hadamard(width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    block = width & -width
    with torch.inference_mode(False):  # it outlives this pass, which may be one without gradients
        matrix = torch.ones((1, 1), device=device, dtype=dtype)
        while matrix.shape[0] < block:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
        return torch.block_diag(*[matrix / block**0.5] * (width // block))


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """`[..., D]` times the orthonormal Hadamard matrix of D, which is its own inverse.

    Where D is no power of two, blocks of the largest power of two that divides it are rotated on their own.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(dtype) @ _hadamard(x.shape[-1], x.device, dtype)).to(x.dtype)


def rope_constants(config: Any, width: int) -> tuple[torch.Tensor, float]:
    """Angles per token of the rotary pairs of a model, float32 `[D / 2]`, and the factor of its cos and sin.

    A model may use other angles at some positions (dynamic scaling): what is rotated back by the slot is rotated forth
    by it, so that they need only be near.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind in ROPE_INIT_FUNCTIONS:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies.float(), float(factor)
    base = parameters.get("rope_theta", 10000.0)
    return base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width), 1.0


def rotated_by_slot(x: torch.Tensor, frequencies: torch.Tensor, start: int, backwards: bool = False) -> torch.Tensor:
    """`[B, G, S, D]` float32 rotated by RoPE as if its tokens stood at the positions from `start` on, or back."""
    slots = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float32)
    angles = slots[:, None] * frequencies
    cos, sin = angles.cos(), -angles.sin() if backwards else angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
