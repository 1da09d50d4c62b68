"""Safetensors files tensor by tensor: read without mapping whole files into memory, written as tensors come.

The library for the format writes a file from tensors that are all in memory, and maps files that it reads, whose pages
then count as the process's memory. A conversion of a model larger than memory can afford neither.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...runtime.checkpoint.files import TensorHeader
from .stage import READ_BYTES, new_digest
from .writer import write_json

SAFETENSORS_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""By their names in the files, in the order in which the library lays tensors out."""
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies.

    Attributes:
        file, offset: its first byte.
        header: dtype and shape.
    """

    file: Path
    offset: int
    header: TensorHeader

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of what one index of the first dimension names."""
        return math.prod(self.header.shape[1:]) * SAFETENSORS_DTYPES[self.header.dtype].itemsize


def header_of(tensor: torch.Tensor) -> TensorHeader:
    """What a safetensors file says of a tensor."""
    return TensorHeader(_NAMES[tensor.dtype], tuple(tensor.shape))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """A digest of the names and bytes of some tensors."""
    digest = new_digest()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes_of(tensors[name].detach().cpu().contiguous()))
    return digest.hexdigest()


class TensorFiles:
    """The tensors of some safetensors files, each read when it is asked for.

    Args:
        files: sound ones, as `read_headers` makes sure.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.placed: dict[str, Placed] = {}
        for file in files:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                entries = json.loads(opened.read(length))
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                header = TensorHeader(entry["dtype"], tuple(entry["shape"]))
                self.placed[name] = Placed(file, 8 + length + entry["data_offsets"][0], header)

    def cut(self, name: str, parts: list[str]) -> None:
        """Know a tensor `[E, N, K]` as matrices `[N E / P, K]` of P names, which lie in it one behind the other.

        One that is not there, or is of another shape, stays as it is.
        """
        shape = self.placed[name].header.shape if name in self.placed else ()
        if len(shape) != 3 or 0 in shape or len(parts) % shape[0] or shape[0] * shape[1] % len(parts):
            return
        merged = self.placed.pop(name)
        rows = shape[0] * shape[1] // len(parts)
        header = TensorHeader(merged.header.dtype, (rows, shape[2]))
        for part in parts:
            self.placed[part] = Placed(merged.file, merged.offset, header)
            merged = replace(merged, offset=merged.offset + rows * self.placed[part].row_bytes)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (not included) of a tensor of at least one dimension, in its own dtype."""
        return read_rows(self.placed[name], first, last)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, in its own dtype."""
        shape = self.placed[name].header.shape
        return self.rows(name, 0, shape[0])

    def gathered(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix: `[N]` indices to `[N, K]`."""
        found, inverse = rows.unique(return_inverse=True)
        return torch.cat([self.rows(name, row, row + 1) for row in found.tolist()])[inverse]


def read_rows(placed: Placed, first: int, last: int) -> torch.Tensor:
    """Rows `first` to `last` (not included) of what lies there, of at least one dimension."""
    result = torch.empty((last - first, *placed.header.shape[1:]), dtype=SAFETENSORS_DTYPES[placed.header.dtype])
    if result.numel():
        with placed.file.open("rb", buffering=0) as opened:
            opened.seek(placed.offset + first * placed.row_bytes)
            _read_into(opened, _bytes_of(result))
    return result


def _read_into(opened: BinaryIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = opened.readinto(target[done:])
        if not count:
            raise OSError(f"{opened.name}: ends too early")
        done += count


class PlannedFiles:
    """Safetensors files that are laid out before the first tensor is there, and filled in any order.

    Args:
        directory, name: one file `name` in that directory; or, with `most_bytes`, files of at most that size (a larger
            tensor has one of its own), `...-00001-of-0000N.safetensors`, and an index.
        planned: dtype and shape of every tensor, in order.
    """

    def __init__(self, directory: Path, name: str, planned: dict[str, TensorHeader], most_bytes: int | None) -> None:
        parts = _split(planned, most_bytes)
        stem = name.removesuffix(".safetensors")
        names = [name]
        if most_bytes is not None:
            names = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
        self._texts: dict[Path, bytes] = {}
        self._sizes: dict[Path, int] = {}
        placed: dict[str, Placed] = {}
        for file, part in zip([directory / name for name in names], parts, strict=True):
            placed |= self._lay_out(file, part)
        self.placed = {name: placed[name] for name in planned}
        self.total_bytes = sum(_byte_count(header) for header in planned.values())
        self.index_file = None if most_bytes is None else directory / f"{name}.index.json"

    def _lay_out(self, file: Path, part: dict[str, TensorHeader]) -> dict[str, Placed]:
        """Where the tensors of a file go: as the library has it, wide dtypes first, so that all are aligned."""
        ordered = sorted(part, key=lambda name: (list(SAFETENSORS_DTYPES).index(part[name].dtype), name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position, starts = 0, {}
        for name in ordered:
            starts[name], end = position, position + _byte_count(part[name])
            entries[name] = {
                "dtype": part[name].dtype,
                "shape": list(part[name].shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        first = 8 + len(text)
        self._texts[file] = len(text).to_bytes(8, "little") + text
        self._sizes[file] = first + position
        return {name: Placed(file, first + starts[name], part[name]) for name in ordered}

    def create(self) -> None:
        """Make the files, with room for everything, so that a full disk shows at once.

        Of files that are there only what does not say or hold what was planned is changed.

        Raises:
            OSError: they cannot be made.
        """
        for file, text in self._texts.items():
            with file.open("r+b" if file.is_file() else "wb") as opened:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(opened.fileno(), 0, self._sizes[file])
                opened.write(text)
                opened.truncate(self._sizes[file])
        if self.index_file is not None:
            weight_map = {name: placed.file.name for name, placed in self.placed.items()}
            write_json(self.index_file, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})

    def write(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
        """Write a tensor, or the rows of it that begin with `first_row`.

        Raises:
            ValueError: it is not what was planned.
        """
        placed = self.placed[name]
        header = header_of(tensor)
        rows, room = (found.shape[0] if found.shape else 1 for found in (header, placed.header))
        fits = header.shape[1:] == placed.header.shape[1:] and first_row + rows <= room
        if header.dtype != placed.header.dtype or not fits:
            raise ValueError(f"{name} was planned as {placed.header} and is {header}")
        with placed.file.open("r+b", buffering=0) as opened:
            opened.seek(placed.offset + first_row * placed.row_bytes)
            data = _bytes_of(tensor.detach().cpu().contiguous())
            while data:
                data = data[opened.write(data) :]

    def digest(self, names: Iterable[str]) -> str:
        """What `digest_of` makes of some tensors as they lie in the files.

        Raises:
            OSError: a file cannot be read.
        """
        digest, buffer = new_digest(), bytearray(READ_BYTES)
        for name in sorted(names):
            placed = self.placed[name]
            digest.update(name.encode())
            left = _byte_count(placed.header)
            with placed.file.open("rb", buffering=0) as opened:
                opened.seek(placed.offset)
                while left:
                    part = memoryview(buffer)[: min(left, len(buffer))]
                    _read_into(opened, part)
                    digest.update(part)
                    left -= len(part)
        return digest.hexdigest()

    def sync(self) -> None:
        """Return once everything written so far is on the disk."""
        for file in self._texts:
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())


def _byte_count(header: TensorHeader) -> int:
    return math.prod(header.shape) * SAFETENSORS_DTYPES[header.dtype].itemsize


def _split(planned: dict[str, TensorHeader], most_bytes: int | None) -> list[dict[str, TensorHeader]]:
    """Tensors in order, in parts of at most `most_bytes` (a larger tensor has a part of its own)."""
    parts: list[dict[str, TensorHeader]] = [{}]
    size = 0
    for name, header in planned.items():
        if parts[-1] and most_bytes is not None and size + _byte_count(header) > most_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = header
        size += _byte_count(header)
    return parts
