"""Linear layers that may leave their bias to somebody else."""

from collections.abc import Callable

import torch
from torch import nn


def changes_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place, as far as PyTorch counts it."""
    return 0 if tensor.is_inference() else tensor._version


class FoldableBias:
    """Mixin of a linear layer that may leave its bias, or the large part of it, for somebody else: see `bias_fold.py`.

    Attributes:
        folds_bias: whether it does.
        left_out: what was left out when the layer last ran, `[N]`; the rest is added as ever.
    """

    folds_bias = False
    left_out: torch.Tensor | None = None
    _choose: Callable[[nn.Module], torch.Tensor] | None = None

    def fold_bias(self, choose: Callable[[nn.Module], torch.Tensor] | None = None) -> None:
        """Leave out of the bias from now on what `choose` makes of the layer; None leaves out all of it."""
        self.folds_bias, self.left_out, self._choose = True, None, choose

    def _added_bias(self) -> torch.Tensor | None:
        """The bias that the layer adds, or None. What is left out is worked out once."""
        if not self.folds_bias:
            return self.bias
        bias = self.bias.detach()
        left = self.left_out
        if left is None or (left.device, left.dtype) != (bias.device, bias.dtype):
            with torch.inference_mode(False):  # it outlives this pass, which may be one without gradients
                self.left_out = bias if self._choose is None else self._choose(self)
        return None if self._choose is None else bias - self.left_out


class FoldableLinear(FoldableBias, nn.Linear):
    """A float linear layer that may leave out (part of) its bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., N]`."""
        return nn.functional.linear(x, self.weight, self._added_bias())
