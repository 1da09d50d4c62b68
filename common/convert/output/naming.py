"""Where an output goes unless that is said."""

import os
from pathlib import Path


def beside(directory: Path, suffix: str) -> Path:
    """The place beside a directory, of its name and a suffix; "." and ".." count as the directories they are."""
    named = directory if directory.name not in ("", "..") else Path(os.path.abspath(directory))
    return named.with_name(named.name + suffix)
