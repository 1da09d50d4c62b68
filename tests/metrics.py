"""How far results are from what is expected, for all tests."""

import torch


def relative_rmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference as a share of that of what is expected."""
    wide = expected.double()
    return float((found.double() - wide).square().mean().sqrt() / wide.square().mean().sqrt().clamp_min(1e-30))


def rmse_in_std(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference in units of the standard deviation of what is expected, as of logits."""
    wide = expected.double()
    return float((found.double() - wide).square().mean().sqrt() / wide.std())
