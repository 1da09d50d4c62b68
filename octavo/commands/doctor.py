"""`octavo doctor MODEL`: which layers of a model break which schemes, and why."""

from ..common.doctor.report import add_flags, run

__all__ = ["add_flags", "run"]
