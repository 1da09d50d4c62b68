"""GPTQ (arXiv 2210.17323): codes of a weight chosen column by column, each making up for the errors of those before.

With H the mean of x x^T over inputs, rounding column i with the error e adds to the error of the output what the
columns not yet rounded can take back: they are given `-e U_ij / U_ii`, where `H^-1 = U^T U` and U is upper triangular.

R rows of inputs, N output channels, K input channels, G groups of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import OctavoError

BLOCK = 128
"""Columns whose errors reach the columns behind them together, in one product of matrices."""
DAMPING = 0.01
"""Part of the mean of H's diagonal that is added to it; more where rows are too few for a Cholesky factor."""
MOST_DAMPING = 1.0


@dataclass(frozen=True)
class ErrorFeedback:
    """What the inputs of a layer say of how errors are passed on.

    Attributes:
        order: int64 `[K]`: columns in the order in which they are rounded, those with the largest inputs first.
        factor: float32 `[K, K]`, upper triangular, in that order: U.
    """

    order: torch.Tensor
    factor: torch.Tensor


def error_feedback(rows: torch.Tensor) -> ErrorFeedback:
    """The error feedback for inputs like `rows`, float32 `[R, K]`, on their device.

    Channels that are 0 in all rows pass on no error and take none.

    Raises:
        OctavoError: inputs are not finite.
    """
    hessian = rows.T @ rows / max(1, rows.shape[0])
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise OctavoError("GPTQ: inputs of a linear layer hold NaN or Inf in calibration")
    mean = float(diagonal.mean()) or 1.0
    order = diagonal.argsort(descending=True, stable=True)
    diagonal[diagonal == 0] = mean
    hessian = hessian[order][:, order]
    damping = DAMPING
    while damping <= MOST_DAMPING:
        # H = R R^T with R upper triangular, from the Cholesky factor of H read backwards; then U is the inverse of R.
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            identity = torch.eye(len(order), device=rows.device)
            return ErrorFeedback(order, torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True))
        damping *= 10
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
    depth = weight.shape[1]
    group = feedback.order // (depth // scale.shape[1])
    scales, zeros = scale.T[group], zero.T[group]  # [K, N], so that a column of the weight is contiguous
    left = weight.T[feedback.order]
    codes = torch.empty_like(left)
    factor = feedback.factor
    for start in range(0, depth, BLOCK):
        stop = min(start + BLOCK, depth)
        errors = torch.empty_like(left[start:stop])
        for column in range(start, stop):
            units = left[column] / scales[column] + zeros[column]
            codes[column] = to_code(units)
            error = (units - codes[column]) * scales[column] / factor[column, column]
            errors[column - start] = error
            left[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    result = torch.empty_like(weight)
    result[:, feedback.order] = codes.T
    return result
