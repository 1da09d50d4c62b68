"""`octavo plan MODEL`: what weights and cache take, and what fits into memory."""

from ..planning.report import add_flags, run

__all__ = ["add_flags", "run"]
