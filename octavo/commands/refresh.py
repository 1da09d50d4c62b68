"""`octavo refresh DIR`: code of today for a directory that an older version converted."""

from ..common.convert.refresh import add_flags, run

__all__ = ["add_flags", "run"]
