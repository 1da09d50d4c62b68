"""Codes of 2 to 8 bits in int32 words, one behind the other from the low bits up, as GPTQ and compressed-tensors pack.

A code may lie across the border of two words; 32 codes fill as many words as they have bits.
"""

import sys

import torch

WORD_BITS = 32
_BYTE_BITS = 8


def words_of(count: int, bits: int) -> int:
    """How many words a row of codes takes."""
    return -(-count * bits // WORD_BITS)


def _as_bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 `[..., W]` as uint8 `[..., 4 W]`, low bytes first on every machine."""
    parts = words.contiguous().view(torch.uint8)
    return parts if sys.byteorder == "little" else parts.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)


def _as_words(parts: torch.Tensor) -> torch.Tensor:
    """The inverse of `_as_bytes`."""
    parts = parts if sys.byteorder == "little" else parts.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    return parts.contiguous().view(torch.int32)


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values `[..., n]` from 0 to `2 ** bits - 1`, of any dtype of integers, as int32 `[..., words_of(n, bits)]`."""
    values = values.to(torch.uint8)
    missing = -values.shape[-1] % WORD_BITS
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    if _BYTE_BITS % bits == 0:
        packed, *others = padded.unflatten(-1, (-1, _BYTE_BITS // bits)).unbind(-1)
        for number, part in enumerate(others, 1):
            packed = packed | part << number * bits
    else:
        stream = torch.stack([padded >> bit & 1 for bit in range(bits)], dim=-1).flatten(-2)
        fields = stream.unflatten(-1, (-1, _BYTE_BITS))
        packed = sum(fields[..., bit] << bit for bit in range(_BYTE_BITS))
    return _as_words(packed)[..., : words_of(values.shape[-1], bits)].contiguous()


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_words`, as uint8 `[..., count]`."""
    parts = _as_bytes(words)
    if _BYTE_BITS % bits == 0:
        fields = [parts >> shift & 2**bits - 1 for shift in range(0, _BYTE_BITS, bits)]
        return torch.stack(fields, dim=-1).flatten(-2)[..., :count]
    stream = torch.stack([parts >> bit & 1 for bit in range(_BYTE_BITS)], dim=-1).flatten(-2)
    fields = stream[..., : count * bits].unflatten(-1, (count, bits))
    return sum(fields[..., bit] << bit for bit in range(bits))
