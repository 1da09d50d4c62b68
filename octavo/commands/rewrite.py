"""`octavo rewrite DIR --format NAME`: a converted directory as an engine reads it."""

from ..common.convert.dialects.rewriting import add_flags, run

__all__ = ["add_flags", "run"]
