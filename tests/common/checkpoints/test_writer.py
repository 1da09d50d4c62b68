"""Output directories: whole, or not at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.common.checkpoints.writer import check_output, whole_directory, write_json, write_weights
from octavo.common.errors import OctavoError

from ...support import files_below


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "parents" / "made" / "out"
    with whole_directory(target, "--out") as stage:
        (stage / "file").write_text("text")
        assert not target.exists() and stage.parent == target.parent, "on the same disk, so that a rename publishes it"
    assert files_below(target.parent) == ["out", "out/file"]


@pytest.mark.parametrize("failure", [OSError("disk full"), RuntimeError("bug"), KeyboardInterrupt()])
def test_nothing_is_left_if_anything_fails(failure: BaseException, tmp_path: Path) -> None:
    wanted = OctavoError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(wanted), whole_directory(tmp_path / "out", "--out") as stage:
        (stage / "file").write_text("text")
        raise failure
    assert files_below(tmp_path) == []


def test_an_empty_directory_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with whole_directory(target, "--out") as stage:
        (stage / "file").write_text("first")
    with pytest.raises(OctavoError, match=r"--out .*exists already"), whole_directory(target, "--out"):
        pass
    assert (target / "file").read_text() == "first"


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OctavoError, match="nothing was kept"), whole_directory(target, "--out") as stage:
        (stage / "file").write_text("mine")
        target.mkdir()
        (target / "file").write_text("theirs")
    assert files_below(tmp_path) == ["out", "out/file"] and (target / "file").read_text() == "theirs"


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with whole_directory(Path("out"), "--out") as stage:
        (stage / "file").write_text("text")
    assert files_below(tmp_path) == ["out", "out/file"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(OctavoError, match="--out"):
            check_output(path, "--out")
    check_output(tmp_path / "new" / "far" / "below", "--out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_parent(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OctavoError, match="cannot be written"):
        check_output(tmp_path / "closed" / "out", "--out")


TENSORS = {name: torch.full((size,), float(size)) for name, size in (("a", 100), ("b", 60), ("c", 300), ("d", 10))}


@pytest.mark.parametrize(
    ("most_bytes", "files"),
    [(10_000, 1), (1640, 2), (1200, 3), (640, 3), (400, 4), (1, 4)],
)
def test_files_of_a_size(most_bytes: int, files: int, tmp_path: Path) -> None:
    write_weights(tmp_path, "weight.safetensors", TENSORS, most_bytes)
    names = [f"weight-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)]
    assert files_below(tmp_path) == [*names, "weight.safetensors.index.json"]
    index = json.loads((tmp_path / "weight.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == list(TENSORS) and index["metadata"] == {"total_size": 470 * 4}
    for name in names:
        part = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in part.values()) <= most_bytes or len(part) == 1
        assert all(torch.equal(part[n], TENSORS[n]) and index["weight_map"][n] == name for n in part)


def test_one_file(tmp_path: Path) -> None:
    write_weights(tmp_path, "weight.safetensors", TENSORS, None)
    assert files_below(tmp_path) == ["weight.safetensors"]
    assert load_file(tmp_path / "weight.safetensors").keys() == TENSORS.keys()


def test_json_is_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"b": 1, "a": "Ü"})
    assert (tmp_path / "file").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "Ü"\n}\n'
