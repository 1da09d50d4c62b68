"""Operations that have no gradient say so when one is asked for; otherwise what they hide would count as zero."""

from typing import Any

import torch

from ..errors import OctavoError


class _Refusal(torch.autograd.Function):
    """Passes a tensor on, and refuses the backward pass."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, anchor: torch.Tensor, what: str) -> torch.Tensor:
        ctx.what = what
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise OctavoError(
            f"{ctx.what} has no gradient: train the float model and convert it; for figures alone, "
            "run under torch.no_grad()"
        )


def refuse_gradient(output: torch.Tensor, anchor: torch.Tensor | None, what: str) -> torch.Tensor:
    """`output`, whose backward pass raises an `OctavoError` that names `what`.

    Args:
        anchor: a tensor that requires a gradient and that `output` was computed from; None if it is not at hand.
    """
    if anchor is None:
        anchor = torch.zeros((), requires_grad=True)
    return _Refusal.apply(output, anchor, what)
