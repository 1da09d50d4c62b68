"""Norms with a bias, which brings the inputs of quantized linears about 0 (Outlier Suppression+, arXiv 2304.09145)."""

from functools import cache

import torch
from torch import nn


class ShiftedNorm:
    """Mixin of a norm that adds a bias to what the norm makes.

    Attributes:
        bias: `[K]`, a parameter beside `weight`.
    """

    bias: torch.Tensor
    kernel_layer_name = "ShiftedNorm"  # a kernel by the norm's own name would leave the bias out

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., K]`, of the norm's dtype."""
        normed = super().forward(hidden_states)
        return normed + self.bias.to(normed.dtype)


@cache
def _shifted_class(norm: type[nn.Module]) -> type[nn.Module]:
    return type(f"Shifted{norm.__name__}", (ShiftedNorm, norm), {"__module__": norm.__module__})


def add_norm_bias(norm: nn.Module, bias: torch.Tensor) -> None:
    """Give a norm that has none a bias, in place; in the state dict it is `bias`, Ascend's name for it.

    Args:
        norm: a module whose forward takes one tensor, as transformers' RMSNorm. One that has a bias takes the new one.
        bias: `[K]`; an empty one, on meta too, for `load_state_dict` to fill.
    """
    if getattr(norm, "bias", None) is None:
        norm.__class__ = _shifted_class(type(norm))
    norm.bias = nn.Parameter(bias, requires_grad=False)
