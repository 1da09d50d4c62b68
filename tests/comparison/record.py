"""A record of what a tree makes of the tiny sources."""

import hashlib
import json
import platform
import tempfile
from collections.abc import Collection
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .conversions import all_conversions, presets_of
from .logits import DIGITS
from .tree import import_root, run_module

Record = dict[str, Any]

WHOLE = ("config.json", "generation_config.json", "quant_model_description.json")
"""Files that a record holds word by word, so that a difference can be named; of others it holds a digest."""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def _tensors(file: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file, read by its bytes, in which every dtype is alike."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "bytes": _digest(data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]),
            "file": file.name,
        }
        for name, entry in header.items()
    }


def _files(directory: Path) -> dict[str, Any]:
    """What a record holds of each file but the code; the digest of a JSON file is that of its meaning."""
    found: dict[str, Any] = {}
    for file in sorted(directory.rglob("*")):
        if not file.is_file() or file.suffix == ".py":
            continue
        content = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else None
        canonical = json.dumps(content, sort_keys=True).encode()
        found[file.relative_to(directory).as_posix()] = (
            content if file.name in WHOLE else _digest(file.read_bytes() if content is None else canonical)
        )
    return found


def _output(directory: Path) -> dict[str, Any]:
    """What a record holds of the files that a conversion wrote."""
    statistics = directory.with_name(f"{directory.name}.statistics.safetensors")
    tensors = {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in _tensors(file).items()}
    calibrated = _tensors(statistics) if statistics.is_file() else {}
    return {"files": _files(directory), "tensors": tensors, "statistics": calibrated}


def make_record(tree: Path, only: Collection[str] = ("*",)) -> Record:
    """Convert everything with the scripts of a tree, load it, and describe what came of it.

    Args:
        tree: root of a checkout.
        only: globs of the names of conversions.

    Raises:
        ValueError: no conversion has such a name.
    """
    tree = tree.resolve()
    wanted = [c.to_dict() for c in all_conversions(presets_of(tree)) if any(fnmatchcase(c.name, glob) for glob in only)]
    if not wanted:
        raise ValueError(f"--only {' '.join(only)}: no conversion has such a name")
    with tempfile.TemporaryDirectory(prefix="comparison-") as place:
        folder = Path(place).resolve()
        task = {"tree": str(tree), "folder": str(folder), "conversions": wanted}
        found = run_module("converts", task, folder, import_root(tree, folder))
        outputs = folder / "outputs"
        made = {name: str(outputs / name) for name in found["conversions"] if (outputs / name).is_dir()}
        logits = run_module("loads", made, folder)
        for name, path in made.items():
            found["conversions"][name] |= {**_output(Path(path)), "logits": logits[name]}
    return {"made with": _versions(), **found}


def _versions() -> dict[str, str]:
    """On what the bytes depend."""
    return {"torch": version("torch"), "transformers": version("transformers"), "machine": platform.machine()}
