"""Tensors that lie in a mapped file: their memory is given back where they were read once and may not be used again."""

import ctypes
import mmap
from functools import cache
from pathlib import Path

import torch

_PAGEMAP = Path("/proc/self/pagemap")
_SWAPPED, _OF_FILE = 1 << 62, 1 << 61
"""Bits of an entry of 64; the highest is set where a page is in memory."""
_ENTRY = 8
_DONTNEED = 4
"""MADV_DONTNEED of Linux."""
_ENTRIES_READ = 1 << 16
"""Pages whose entries are read at once."""


@cache
def _libc() -> ctypes.CDLL:
    found = ctypes.CDLL(None, use_errno=True)
    found.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


def _is_unchanged(first: int, pages: int) -> bool:
    """Whether all of some pages that are in memory are those of a file, and none has been written to."""
    try:
        with _PAGEMAP.open("rb", buffering=0) as stream:
            stream.seek(first * _ENTRY)
            while pages > 0:
                found = stream.read(min(pages, _ENTRIES_READ) * _ENTRY)
                if not found:
                    return False
                entries = torch.frombuffer(bytearray(found), dtype=torch.int64)
                is_kept = (entries < 0) | (entries & _SWAPPED != 0)
                if bool((is_kept & (entries & _OF_FILE == 0)).any()):
                    return False
                pages -= len(entries)
    except OSError:  # another system, or one that shows no process its pages
        return False
    return True


def release_pages(tensor: torch.Tensor) -> int:
    """Give back the memory of a tensor of the CPU that lies in a mapped file, which is read there again when used.

    A tensor that lies elsewhere, or was written to, is left alone. Nothing may write to it meanwhile.

    Returns:
        bytes of the pages that were given back, or were not in memory; 0 where that is not known to be safe.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return 0
    size = mmap.PAGESIZE
    first, last = -(-tensor.data_ptr() // size), (tensor.data_ptr() + tensor.nbytes) // size
    if last <= first or not _is_unchanged(first, last - first):
        return 0
    done = _libc().madvise(first * size, (last - first) * size, _DONTNEED)
    return (last - first) * size if done == 0 else 0
