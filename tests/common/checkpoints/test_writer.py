"""Output directories: whole, or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.common.checkpoints.writer import Stage, check_output, stage_path, whole_directory, write_json
from octavo.common.errors import OctavoError

from ...support import files_below

JOB = {"of": "a test"}


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "parents" / "made" / "out"
    with whole_directory(target, "--out", JOB) as stage:
        (stage.path / "file").write_text("text")
        assert not target.exists() and stage.path.parent == target.parent, (
            "on the same disk, so that a rename publishes it"
        )
    assert files_below(target.parent) == ["out", "out/file"]


@pytest.mark.parametrize("failure", [OSError("disk full"), RuntimeError("bug"), KeyboardInterrupt()])
def test_nothing_is_left_if_anything_fails(failure: BaseException, tmp_path: Path) -> None:
    wanted = OctavoError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(wanted), whole_directory(tmp_path / "out", "--out", JOB) as stage:
        (stage.path / "file").write_text("text")
        raise failure
    assert files_below(tmp_path) == []


def test_an_empty_directory_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with whole_directory(target, "--out", JOB) as stage:
        (stage.path / "file").write_text("first")
    with pytest.raises(OctavoError, match=r"--out .*exists already"), whole_directory(target, "--out", JOB):
        pass
    assert (target / "file").read_text() == "first"


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OctavoError, match="nothing was kept"), whole_directory(target, "--out", JOB) as stage:
        (stage.path / "file").write_text("mine")
        target.mkdir()
        (target / "file").write_text("theirs")
    assert files_below(tmp_path) == ["out", "out/file"] and (target / "file").read_text() == "theirs"


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with whole_directory(Path("out"), "--out", JOB) as stage:
        (stage.path / "file").write_text("text")
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


def interrupted(target: Path, steps: int) -> Path:
    """A stage for `target` as an interruption behind so many steps leaves it."""
    with pytest.raises(KeyboardInterrupt), whole_directory(target, "--out", JOB) as stage:
        (stage.path / "file").write_text("half")
        for step in range(1, steps + 1):
            stage.finish_step(step, {"x": torch.full((3,), float(step))}, {"of": step})
        raise KeyboardInterrupt
    return stage_path(target)


def test_an_interrupted_stage_is_gone_on_with(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "out", 2)
    assert files_below(path) == [".progress", ".progress/progress.json", ".progress/state-2.safetensors", "file"]
    with whole_directory(tmp_path / "out", "--out", JOB, resumes=True) as stage:
        assert (stage.step, stage.notes, stage.state["x"].tolist()) == (2, {"of": 2}, [2.0, 2.0, 2.0])
        assert (stage.path / "file").read_text() == "half"
    assert files_below(tmp_path) == ["out", "out/file"]


def test_an_interruption_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 0)
    assert files_below(tmp_path) == []


def test_what_was_interrupted_is_not_lost_unasked(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "out", 1)
    before = files_below(path)
    with pytest.raises(OctavoError, match="give --resume, or remove"), whole_directory(tmp_path / "out", "--out", JOB):
        pass
    other = {**JOB, "w_bit": 4}
    with (
        pytest.raises(OctavoError, match=r"--resume: .* differs in w_bit \(unset then, 4 now\)"),
        whole_directory(tmp_path / "out", "--out", other, resumes=True),
    ):
        pass
    assert files_below(path) == before


def test_resuming_nothing_begins_anew(tmp_path: Path) -> None:
    path = stage_path(tmp_path / "out")
    path.mkdir()
    (path / "left by a process killed at its start").write_text("")
    with whole_directory(tmp_path / "out", "--out", JOB, resumes=True) as stage:
        assert (
            isinstance(stage, Stage)
            and stage.step == 0
            and files_below(path)
            == [
                ".progress",
                ".progress/progress.json",
                ".progress/state-0.safetensors",
            ]
        )
    assert files_below(tmp_path) == ["out"]


def test_two_processes_do_not_write_the_same(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from octavo.common.checkpoints.writer import whole_directory
with whole_directory(Path(sys.argv[1]), "--out", {}):
    pass
"""
    with whole_directory(tmp_path / "out", "--out", JOB) as stage:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
        assert "another process is writing it" in done.stderr and stage.path.is_dir()
    assert files_below(tmp_path) == ["out"]


def test_json_is_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"b": 1, "a": "Ü"})
    assert (tmp_path / "file").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "Ü"\n}\n'
