"""Writing an output directory: whole, or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from ..errors import OctavoError


def check_output(directory: Path, flag: str) -> None:
    """Raise an `OctavoError` if `directory` holds something already or could not be made."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OctavoError(f"{flag} {directory}: exists already; choose another directory or remove it")
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OctavoError(f"{flag} {directory}: {parent} cannot be written; choose another directory")


@contextmanager
def whole_directory(directory: Path, flag: str) -> Iterator[Path]:
    """A new directory to write into, which becomes `directory` at the end, or vanishes if anything fails.

    Raises:
        OctavoError: the directory cannot be written, or the disk is full.
    """
    check_output(directory, flag)
    directory = directory.absolute()
    stage = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
        stage.chmod(0o777 & ~_umask())
        yield stage
        os.replace(stage, directory)
    except (OSError, SafetensorError) as error:
        raise OctavoError(f"{flag} {directory}: cannot be written ({error}); nothing was kept") from None
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _split(tensors: dict[str, torch.Tensor], most_bytes: int | None) -> list[dict[str, torch.Tensor]]:
    """Tensors in order, in parts of at most `most_bytes` (a larger tensor has a part of its own)."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and most_bytes is not None and size + tensor.nbytes > most_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def write_weights(directory: Path, name: str, tensors: dict[str, torch.Tensor], most_bytes: int | None) -> None:
    """Write `name`; or, given `most_bytes`, files of that size, `...-00001-of-0000N.safetensors`, and an index."""
    parts = _split(tensors, most_bytes)
    stem = name.removesuffix(".safetensors")
    names = [name]
    if most_bytes is not None:
        names = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(names, tqdm(parts, desc="writing", unit="file"), strict=True):
        save_file(part, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o666 & ~_umask())
    if most_bytes is not None:
        weight_map = {tensor: file for file, part in zip(names, parts, strict=True) for tensor in part}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(directory / f"{name}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
