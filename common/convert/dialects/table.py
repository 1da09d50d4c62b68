"""Every dialect that there is a writer for, by its name."""

from ...errors import OctavoError
from .compressed_tensors import COMPRESSED_TENSORS
from .dialect import Dialect

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (COMPRESSED_TENSORS,)}

OWN = "ascend"
"""The format of a conversion itself, which Octavo's own classes load."""
FORMATS = (OWN, *DIALECTS)
"""What `--format` may be."""


def dialect_of(name: str) -> Dialect:
    """The dialect of a name.

    Raises:
        OctavoError: there is none; the message lists those there are.
    """
    if name not in DIALECTS:
        raise OctavoError(f"--format {name}: is none of {', '.join(DIALECTS)}")
    return DIALECTS[name]
