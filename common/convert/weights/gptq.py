"""GPTQ (arXiv 2210.17323): codes of a weight chosen column by column, each making up for the errors of those before.

With H the mean of x x^T over inputs, and H = L D L^T where L is unit lower triangular, columns are rounded from the
last to the first, column k once `Σ_j L_jk e_j` over those behind it is added: e_j is the weight's column j less what
its codes stand for. These are the codes of the paper's updates, without the inverse of H (QuIP, arXiv 2307.13304, which
goes from the first to the last).

N output channels, K input channels, G groups of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...errors import OctavoError

BLOCK = 128
"""Columns that the errors of the columns behind them reach together, in one product of matrices."""
DAMPING = 0.01
"""Part of the mean of H's diagonal that is added to it; more where H has no Cholesky factor, as of too few tokens."""
MOST_DAMPING = 1.0


@dataclass(frozen=True)
class ErrorFeedback:
    """What the inputs of a layer say of how errors are passed on.

    Attributes:
        order: int64 `[K]`: columns in the reverse of the order in which they are rounded, those with the largest
            inputs last.
        factor: float32 `[K, K]` in that order, lower triangular: L with the square root of D in its columns.
    """

    order: torch.Tensor
    factor: torch.Tensor


def error_feedback(hessian: torch.Tensor) -> ErrorFeedback:
    """The error feedback for inputs whose mean of x x^T is `hessian`, float32 `[K, K]`, on their device.

    Channels that are always 0 pass on no error and take none.

    Raises:
        OctavoError: inputs are not finite.
    """
    squares = hessian.diagonal()
    if not bool(torch.isfinite(squares).all()):
        raise OctavoError("GPTQ: inputs of a linear layer hold NaN or Inf in calibration")
    mean = float(squares.mean()) or 1.0
    order = squares.argsort(stable=True)
    ordered = hessian[order[:, None], order]
    diagonal = ordered.diagonal()
    diagonal[diagonal == 0] = mean
    damping, added = DAMPING, 0.0
    while damping <= MOST_DAMPING:
        diagonal += (damping - added) * mean
        factor, failed = torch.linalg.cholesky_ex(ordered)
        if not int(failed):
            return ErrorFeedback(order, factor)
        del factor
        damping, added = damping * 10, damping
    raise OctavoError("GPTQ: inputs of a linear layer have no Cholesky factor; give more calibration texts")


def gptq_codes(
    weight: torch.Tensor,
    feedback: ErrorFeedback,
    scale: torch.Tensor,
    zero: torch.Tensor,
    to_code: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Codes of a weight by scales that are given, as floats `[N, K]`.

    Args:
        weight: float32 `[N, K]`.
        feedback: of the layer's inputs.
        scale, zero: float32 `[N, G]`, of consecutive channels; the weight is `(code - zero) * scale`.
        to_code: rounds values in units of codes.
    """
    in_features = weight.shape[1]
    group = feedback.order // (in_features // scale.shape[1])
    scales, zeros = scale.T[group], zero.T[group]  # [K, N], so that a column of the weight is contiguous
    errors = weight.T[feedback.order]  # those of columns that are rounded, and the others as they are
    codes = torch.empty_like(errors)
    factor = feedback.factor
    for stop in range(in_features, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        passed = factor[stop:, start:stop].T @ errors[stop:]
        for column in range(stop - 1, start - 1, -1):
            here = passed[column - start] + factor[column + 1 : stop, column] @ errors[column + 1 : stop]
            units = (errors[column] + here / factor[column, column]) / scales[column] + zeros[column]
            codes[column] = to_code(units)
            errors[column] -= (codes[column] - zeros[column]) * scales[column]
    result = torch.empty_like(weight)
    result[:, feedback.order] = codes.T
    return result
