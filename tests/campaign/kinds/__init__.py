"""The kinds of damage: how often each is tried, and what prepares a try of it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..trial import Attempt, Room

Prepare = Callable[[Random, "Room"], "Attempt"]


@dataclass(frozen=True)
class Kind:
    """A kind of tries.

    Attributes:
        module, function: what prepares a try; imported when first used, so that calls of ops import no models.
        weight: how often it is drawn, relative to the others.
        sanitized: whether it runs apart, with kernels under address and undefined-behaviour sanitizers.
    """

    module: str
    function: str
    weight: int
    sanitized: bool = False

    def prepare(self) -> Prepare:
        """The function that prepares a try."""
        return getattr(import_module(f"{__package__}.{self.module}"), self.function)


KINDS = {
    "config": Kind("outputs", "config", 14),
    "octavo entry": Kind("outputs", "octavo_entry", 7),
    "description": Kind("outputs", "description", 8),
    "header": Kind("outputs", "header", 8),
    "tensors": Kind("outputs", "tensors", 10),
    "index": Kind("outputs", "index", 6),
    "statistics": Kind("statistics_files", "statistics", 6),
    "scheme": Kind("scheme_files", "scheme", 7),
    "calibration": Kind("calibration_files", "calibration", 7),
    "flags": Kind("flags", "flags", 7),
    "source config": Kind("sources", "config", 6),
    "source tensors": Kind("sources", "tensors", 6),
    "source files": Kind("sources", "files", 6),
    "ops": Kind("op_calls", "op_call", 10),
    "ops sanitized": Kind("op_calls", "op_call", 22, sanitized=True),
}


def kind_of(rng: Random) -> str:
    """The kind of the next try."""
    return rng.choices(list(KINDS), [kind.weight for kind in KINDS.values()])[0]
