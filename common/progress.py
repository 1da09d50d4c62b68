"""A bar for work of which nobody knows beforehand whether it is done at once."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

PROGRESS_AFTER = 2.0
"""Seconds that work takes before there is a bar of it."""


def progress(items: Iterable, unit: str, count: int | None = None, about: str | None = None) -> Iterable:
    """Items that are gone through, with a bar on stderr from the third second on until the last of them is done.

    Args:
        unit: what an item is.
        count: of items; None: as `len` tells.
        about: what is done with them; None says nothing.
    """
    return tqdm(items, desc=about, unit=unit, total=count, delay=PROGRESS_AFTER, leave=False, file=sys.stderr)
