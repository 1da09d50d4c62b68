"""Sizes as people write them: GB of 10**9 bytes, GiB of 2**30."""

import os
import re
from dataclasses import dataclass

from ..common.errors import OctavoError

UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}
"""Bytes of a unit."""


@dataclass(frozen=True)
class Unit:
    """A unit of `UNITS`, in which sizes are printed."""

    name: str

    @property
    def bytes(self) -> int:
        """How many bytes it is."""
        return UNITS[self.name]

    def number(self, size: int) -> str:
        """A size in this unit, without it."""
        value = size / self.bytes
        if size % self.bytes == 0 or value >= 1000:
            return f"{value:,.0f}"
        return f"{value:.{2 if value >= 1 else 3}f}"

    def text(self, size: int) -> str:
        """A size in this unit."""
        return f"{self.number(size)} {self.name}"


def size_of(text: str) -> int:
    """Bytes that a text such as "24GB" or "24 GiB" says.

    Raises:
        OctavoError: it says none.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    known = {name.lower(): size for name, size in UNITS.items()}
    if found is None or found[2].lower() not in known or not float(found[1]):
        raise OctavoError(f"--memory {text}: is no size; give a number and {', '.join(UNITS)}, such as 24GB or 24GiB")
    return round(float(found[1]) * known[found[2].lower()])


def memory_of(device: str) -> int | None:
    """Bytes of memory of this machine, or of its first accelerator; None where nobody says."""
    if device == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
    import torch

    module = getattr(torch, device, None)
    if module is None or not module.is_available():
        return None
    return module.get_device_properties(0).total_memory
