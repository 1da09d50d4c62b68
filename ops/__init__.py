"""One folder per op, each with a reference that is its semantics; see the README of each folder."""

from .attention import attend, attention, attention_lse
from .codec import decode, encode, encode_token
from .linear import linear_fp8, linear_fp8_block, linear_grouped, linear_w8a8, linear_w8a8_dynamic, linear_weight_only
from .shared.fallback import strict
from .shared.registry import report

__all__ = [
    "attend",
    "attention",
    "attention_lse",
    "decode",
    "encode",
    "encode_token",
    "linear_fp8",
    "linear_fp8_block",
    "linear_grouped",
    "linear_w8a8",
    "linear_w8a8_dynamic",
    "linear_weight_only",
    "report",
    "strict",
]
