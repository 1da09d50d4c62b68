"""What a case of `run.py` is, and the checks that gate its timing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case, and the bytes that it has to read and write."""

    what: str
    run: Callable[[], object]
    nbytes: int


Prepared = tuple[list[Variant], Callable[[], None]]


@dataclass(frozen=True)
class Case:
    """An op or a model on one shape.

    Attributes:
        op: what `--op` chooses.
        name: of the shape.
        prepare: makes, on a device, the variants, ours first, and a check that raises if one of ours is wrong.
        wall: time what somebody waits, not what the device computes.
    """

    op: str
    name: str
    prepare: Callable[[torch.device], Prepared]
    wall: bool = False


def relative_rmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of what was expected."""
    difference, expected = actual.float() - expected.float(), expected.float()
    return float(difference.square().mean().sqrt() / expected.square().mean().sqrt())


def check_close(what: str, actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Raise an AssertionError unless the relative error is at most `limit`; NaN fails."""
    error = relative_rmse(actual, expected)
    if not error <= limit:
        raise AssertionError(f"{what} is {error:.1e} off its reference, more than {limit:.0e}")


def check_equal(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise an AssertionError unless all elements are the same."""
    if not torch.equal(actual, expected):
        raise AssertionError(f"{what} does not equal its reference")
