"""safetensors files as bytes, so that they can be written as no library would write them."""

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: dtype as spelled there, shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def is_float(self) -> bool:
        """Whether its values are floats, those of 8 bits included."""
        return self.dtype.startswith(("F", "BF"))

    def tensor(self) -> torch.Tensor:
        """A tensor of its own."""
        return torch.frombuffer(bytearray(self.data), dtype=DTYPES[self.dtype]).reshape(self.shape)

    def holding(self, tensor: torch.Tensor) -> "Stored":
        """The same with other values, dtype and shape."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return replace(self, dtype=names[tensor.dtype], shape=tuple(tensor.shape), data=data)


def parts_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and the bytes behind it."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes, data: bytes) -> bytes:
    """A file of a header, whatever it says, and the bytes behind it."""
    return struct.pack("<Q", len(header)) + header + data


def read_stored(file: Path) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a file, in their order, and its metadata."""
    header, data = parts_of(file)
    metadata = header.pop("__metadata__", {})
    tensors = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        tensors.append(Stored(name, entry["dtype"], tuple(entry["shape"]), data[first:last]))
    return tensors, metadata


def file_of(tensors: Iterable[Stored], metadata: dict[str, str]) -> bytes:
    """A valid file of tensors."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for tensor in tensors:
        place = [len(data), len(data) + len(tensor.data)]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        data += tensor.data
    return with_header(json.dumps(header).encode(), data)


def _other(rng: Random, entry: dict[str, Any]) -> dict[str, Any]:
    """A header's entry with one thing wrong in it."""
    dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [-1, 0, 1, 2**31, 2**63, 2**64, 1.5, "8", None]
    ways: list[Callable[[], dict[str, Any]]] = [
        lambda: {"dtype": rng.choice([name for name in (*DTYPES, "BOOL", "F4", "U16", "", 7, None) if name != dtype])},
        lambda: {"shape": shape[::-1] if shape[::-1] != shape else [*shape, 2]},
        lambda: {"shape": rng.choice([[], [0], [1, *shape], [*shape, 1], None, {}, [shape], shape[:-1]])},
        lambda: {"shape": [*shape[:-1], rng.choice(numbers)]},
        lambda: {"shape": [2**32, 2**32, *shape]},
        lambda: {"data_offsets": [first + rng.choice([-4, -1, 1, 4]), last]},
        lambda: {"data_offsets": [first, last + rng.choice([-4, -1, 1, 4])]},
        lambda: {"data_offsets": [last, first]},
        lambda: {"data_offsets": rng.choice([[0, last - first], [first], [], None, [first, last, last]])},
        lambda: {"data_offsets": [rng.choice(numbers), rng.choice(numbers)]},
    ]
    return {**entry, **rng.choice(ways)()}


def damage_header(rng: Random, file: Path) -> tuple[bytes, str, str]:
    """Damage what a file says of itself.

    Returns:
        the file, what was done, and the dtype that floats of 16 bits are read as if that is what was done.
    """
    header, data = parts_of(file)
    whole = file.read_bytes()
    end = len(whole) - len(data)
    names = [name for name in header if name != "__metadata__"]
    way = rng.choice(
        ("bits", "bytes", "length", "cut", "longer", "entry", "entry", "entry", "name", "text", "metadata")
    )
    if way == "bits":
        place, bit = rng.randrange(end), rng.randrange(8)
        return _put(whole, place, whole[place] ^ 1 << bit), f"bit {bit} of byte {place} of the header is flipped", ""
    if way == "bytes":
        place, byte = rng.randrange(end), rng.randrange(256)
        return _put(whole, place, byte), f"byte {place} of the header is {byte}", ""
    if way == "length":
        length = rng.choice([0, 1, 2, end - 9, end - 7, 2**20, 2**32, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + whole[8:], f"the header is said to have {length} bytes", ""
    if way == "cut":
        place = rng.randrange(len(whole))
        return whole[:place], f"the file ends at byte {place} of {len(whole)}", ""
    if way == "longer":
        return whole + rng.randbytes(rng.choice([1, 8, 4096])), "the file goes on behind its end", ""
    if way == "text":
        text = rng.choice([b"", b"{}", b"[]", b"null", b"{" * 1000, b'{"a":' * 5000, rng.randbytes(64)])
        return with_header(text, data), f"the header is {text[:12]!r}...", ""
    name = rng.choice(names)
    if way == "name":
        fresh = rng.choice([f"{name}.", "", name.upper(), f"model.{name}", "x" * 10_000, "__metadata__", "\u2028"])
        header = {fresh if key == name else key: value for key, value in header.items()}
        return with_header(json.dumps(header).encode(), data), f"{name} is called {fresh[:30]!r}", ""
    if way == "metadata":
        header["__metadata__"] = rng.choice([{"format": "tf"}, {"format": 7}, {}, None, [], {"x": "y" * 10_000}])
        return with_header(json.dumps(header).encode(), data), f"metadata {str(header['__metadata__'])[:30]}", ""
    before, header[name] = header[name], _other(rng, header[name])
    key = next((key for key in before if before[key] != header[name][key]), "dtype")
    what = f"{name}: {key} {before[key]} -> {header[name][key]}"
    halves = {"F16", "BF16"}
    swapped = str(header[name]["dtype"]) if key == "dtype" and {before[key], header[name][key]} == halves else ""
    return with_header(json.dumps(header).encode(), data), what, swapped


def _put(data: bytes, place: int, byte: int) -> bytes:
    return data[:place] + bytes([byte]) + data[place + 1 :]
