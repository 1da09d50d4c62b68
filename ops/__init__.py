"""One folder per op, each with a reference that is its semantics; see the README of each folder."""

from .attention import attention
from .codec import encode, encode_token
from .library import report
from .linear import linear_w8a8

__all__ = ["attention", "encode", "encode_token", "linear_w8a8", "report"]
