"""Safetensors files written in any order and read piece by piece, against the library for the format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.common.convert.output.shards import PlannedFiles, TensorFiles, header_of

from ....support import files_below

TENSORS = {name: torch.full((size,), float(size)) for name, size in (("a", 100), ("b", 60), ("c", 300), ("d", 10))}


def write(directory: Path, tensors: dict[str, torch.Tensor], most_bytes: int | None) -> PlannedFiles:
    """Write tensors, the last one first."""
    headers = {name: header_of(tensor) for name, tensor in tensors.items()}
    files = PlannedFiles(directory, "weight.safetensors", headers, most_bytes)
    files.create()
    for name in reversed(tensors):
        files.write(name, tensors[name])
    files.sync()
    return files


@pytest.mark.parametrize(
    ("most_bytes", "files"),
    [(10_000, 1), (1640, 2), (1200, 3), (640, 3), (400, 4), (1, 4)],
)
def test_files_of_a_size(most_bytes: int, files: int, tmp_path: Path) -> None:
    write(tmp_path, TENSORS, most_bytes)
    names = [f"weight-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)]
    assert files_below(tmp_path) == [*names, "weight.safetensors.index.json"]
    index = json.loads((tmp_path / "weight.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == list(TENSORS) and index["metadata"] == {"total_size": 470 * 4}
    for name in names:
        part = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in part.values()) <= most_bytes or len(part) == 1
        assert all(torch.equal(part[n], TENSORS[n]) and index["weight_map"][n] == name for n in part)


def test_one_file(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, None)
    assert files_below(tmp_path) == ["weight.safetensors"]
    assert load_file(tmp_path / "weight.safetensors").keys() == TENSORS.keys()


MIXED = {
    "odd": torch.arange(7, dtype=torch.int8),
    "scale": torch.rand(1),
    "weight": torch.rand(5, 3).bfloat16(),
    "half": torch.rand(2, 2).half(),
    "wide": torch.arange(3),
    "eight": torch.rand(3, 5).to(torch.float8_e4m3fn),
    "packed": torch.arange(9, dtype=torch.uint8),
    "sums": torch.arange(4, dtype=torch.int32),
}


def test_every_dtype_is_where_the_library_looks_for_it(tmp_path: Path) -> None:
    write(tmp_path, MIXED, None)
    found = load_file(tmp_path / "weight.safetensors")
    assert found.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].double(), tensor.double()), name


def test_rows_one_after_another(tmp_path: Path) -> None:
    files = write(tmp_path, {"a": torch.zeros(7, 3), "b": torch.ones(2)}, None)
    for first in (4, 0, 2, 6):
        rows = torch.arange(first * 3.0, min(first + 2, 7) * 3.0).view(-1, 3)
        files.write("a", rows, first)
    assert torch.equal(load_file(tmp_path / "weight.safetensors")["a"], torch.arange(21.0).view(7, 3))


def test_what_was_not_planned_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, MIXED, None)
    for wrong in (torch.rand(5, 3), torch.rand(5, 4).bfloat16(), torch.rand(6, 3).bfloat16()):
        with pytest.raises(ValueError, match="weight was planned as"):
            files.write("weight", wrong)


def test_reading(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "model.safetensors")
    files = TensorFiles([tmp_path / "model.safetensors"])
    for name, tensor in MIXED.items():
        found = files.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found.double(), tensor.double()), name
    assert torch.equal(files.rows("weight", 1, 4), MIXED["weight"][1:4])
    rows = torch.tensor([4, 0, 4, 2])
    assert torch.equal(files.gathered("weight", rows), MIXED["weight"][rows])


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    save_file({"a": torch.rand(100)}, tmp_path / "model.safetensors")
    files = TensorFiles([tmp_path / "model.safetensors"])
    with (tmp_path / "model.safetensors").open("r+b") as opened:
        opened.truncate(300)
    with pytest.raises(OSError, match="ends too early"):
        files.read("a")
