"""Copies of directories whose files can be damaged without touching those that they were copied from."""

import os
import shutil
from pathlib import Path


def linked_copy(source: Path, target: Path) -> Path:
    """A copy of a directory by hard links, so that it costs nothing; change its files by `rewrite` alone."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def rewrite(file: Path, data: bytes) -> None:
    """Put a new file in the place of one, which keeps what else is linked to that as it is."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)
