"""Output directories: whole, or not at all."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.common.convert.output.writer import Stage, check_output, stage_path, whole_directory, write_json
from octavo.common.errors import OctavoError

from ....support import files_below

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
    (path / ".progress").mkdir(parents=True)
    (path / ".progress" / "state-0.safetensors").write_text("left by a process killed at its start")
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


# Where the output is to be.


PLACES = {
    "a link to an empty directory": lambda d: ((d / "real").mkdir(), (d / "out").symlink_to("real")),
    "a link to nothing yet": lambda d: (d / "out").symlink_to(d / "far" / "real"),
    "below a link": lambda d: ((d / "parent").mkdir(), (d / "out").symlink_to("parent/real")),
}


@pytest.mark.parametrize("kind", PLACES)
def test_behind_a_link(kind: str, tmp_path: Path) -> None:
    PLACES[kind](tmp_path)
    with whole_directory(tmp_path / "out", "--out", JOB) as stage:
        (stage.path / "file").write_text("text")
        assert stage.path.parent == (tmp_path / "out").resolve().parent, "on the disk of what the link names"
    assert (tmp_path / "out").is_symlink() and files_below(tmp_path / "out") == ["file"]
    assert not any("partial" in name for name in files_below(tmp_path))


@pytest.mark.parametrize("ending", ["/", "/.", "/../out"])
def test_other_spellings_of_a_directory(ending: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_directory(Path(f"{tmp_path}/out{ending}"), "--out", JOB) as stage:
        (stage.path / "file").write_text("text")
    assert files_below(tmp_path) == ["out", "out/file"]


def test_links_to_what_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    for name, part in (("out", "exists already"), ("loop", "leads nowhere")):
        with pytest.raises(OctavoError, match=part), whole_directory(tmp_path / name, "--out", JOB):
            pytest.fail("nothing may be computed")
    assert files_below(tmp_path) == ["file", "loop", "out"]


def test_a_mount_point_is_refused_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    with pytest.raises(OctavoError, match="is a mount point"), whole_directory(tmp_path / "out", "--out", JOB):
        pytest.fail("nothing may be computed")
    assert files_below(tmp_path) == ["out"]


def test_a_directory_that_cannot_be_replaced_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one where a part of the same disk is mounted, which does not look like a mount point."""
    (tmp_path / "out").mkdir()

    def busy(source: Path, target: str) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "rename", busy)
    with (
        pytest.raises(OctavoError, match=r"cannot be replaced \(Device"),
        whole_directory(tmp_path / "out", "--out", JOB),
    ):
        pytest.fail("nothing may be computed")
    assert files_below(tmp_path) == ["out"]


def precious(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("mine")


def with_a_folder_of_that_name(path: Path) -> None:
    (path / ".progress").mkdir(parents=True)
    (path / "precious").write_text("mine")


IN_THE_WAY = {
    "a directory": precious,
    "a directory with such a folder": with_a_folder_of_that_name,
    "a file": lambda path: path.write_text("mine"),
    "a link": lambda path: (precious(path.parent / "elsewhere"), path.symlink_to("elsewhere")),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_we_did_not_make_is_not_touched(kind: str, resumes: bool, tmp_path: Path) -> None:
    IN_THE_WAY[kind](stage_path(tmp_path / "out"))
    before = files_below(tmp_path)
    with (
        pytest.raises(OctavoError, match=r"\.out\.partial is in the way"),
        whole_directory(tmp_path / "out", "--out", JOB, resumes),
    ):
        pytest.fail("nothing may be computed")
    assert files_below(tmp_path) == before


def test_links_within_a_stage_are_not_followed(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "out", 1)
    precious(tmp_path / "elsewhere")
    (path / "link").symlink_to(tmp_path / "elsewhere")
    (path / ".progress" / "state-1.safetensors").write_bytes(b"damaged")
    with whole_directory(tmp_path / "out", "--out", JOB, resumes=True):
        pass
    assert files_below(tmp_path) == ["elsewhere", "elsewhere/precious", "out"]


# What is left by kills around the end, and what is damaged.


class Killed(BaseException):
    """Ends a process where it is thrown, but for what the interpreter does by itself."""


def killed_at(monkeypatch: pytest.MonkeyPatch, target: Path, call: int) -> Path:
    """A place where a process was killed at its `call`-th change of names and files after the last step."""
    calls = 0
    with monkeypatch.context() as patched:

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls >= call:
                    raise Killed
                return original(*arguments, **named)

            return run

        with pytest.raises((Killed, OctavoError)), whole_directory(target, "--out", JOB) as stage:
            (stage.path / "file").write_text("whole")
            stage.finish_step(1, {"x": torch.ones(1)}, {"of": 1})
            for module, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir"), (Path, "write_text")):
                patched.setattr(module, name, counted(getattr(module, name)))
    return target


@pytest.mark.parametrize("call", range(1, 7))
def test_there_is_no_moment_at_which_a_kill_loses_anything(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = killed_at(monkeypatch, tmp_path / "out", call)
    if not target.exists():
        with whole_directory(target, "--out", JOB, resumes=True) as stage:
            assert stage.step == 1 and stage.state["x"].tolist() == [1.0]
    else:
        assert (target / "file").read_text() == "whole"
        with pytest.raises(OctavoError, match="exists already"):
            check_output(target, "--out")
    assert files_below(tmp_path) == ["out", "out/file"]


def test_a_stage_that_was_moved_to_the_output_is_not_tidied(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 1).rename(tmp_path / "out")
    before = files_below(tmp_path)
    with pytest.raises(OctavoError, match=r"is an interrupted conversion; move it to .*\.out\.partial"):
        check_output(tmp_path / "out", "--out")
    assert files_below(tmp_path) == before


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a truncated record": ("progress.json", lambda file: os.truncate(file, 20)),
    "an empty record": ("progress.json", lambda file: os.truncate(file, 0)),
    "a record of another kind": ("progress.json", lambda file: file.write_text("[1]")),
    "a record of nothing": ("progress.json", lambda file: file.write_text("{}")),
    "a record that no text is": ("progress.json", lambda file: file.write_bytes(b"\xff\xfe")),
    "a flipped bit in the record": ("progress.json", flip),
    "another step": ("progress.json", lambda file: file.write_text(file.read_text().replace('"step": 2', '"step": 1'))),
    "a truncated state": ("state-2.safetensors", lambda file: os.truncate(file, 20)),
    "a flipped bit in the state": ("state-2.safetensors", flip),
    "no state": ("state-2.safetensors", lambda file: file.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_begun_anew_where_that_was_asked_for(damage: str, tmp_path: Path) -> None:
    name, change = DAMAGES[damage]
    path = interrupted(tmp_path / "out", 2)
    change(path / ".progress" / name)
    before = files_below(path)
    with (
        pytest.raises(OctavoError, match=f"{name} is damaged; give --resume, or remove it"),
        whole_directory(tmp_path / "out", "--out", JOB),
    ):
        pytest.fail("nothing may be computed")
    assert files_below(path) == before
    with whole_directory(tmp_path / "out", "--out", JOB, resumes=True) as stage:
        assert (stage.step, stage.state, stage.notes) == (0, {}, {})
        assert stage.damage == f"{path / '.progress' / name} is damaged"
    assert files_below(tmp_path) == ["out"]


def test_a_record_of_a_version_before_is_not_taken_for_damage(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "out", 1)
    record = json.loads((path / ".progress" / "progress.json").read_text())
    known = {"step": 1, "job": {"of": "a version before"}, "notes": record["notes"]}
    (path / ".progress" / "progress.json").write_text(json.dumps(known))
    with (
        pytest.raises(OctavoError, match=r"differs in of \(a version before then"),
        whole_directory(tmp_path / "out", "--out", JOB, resumes=True),
    ):
        pytest.fail("nothing may be computed")


def test_two_processes_do_not_write_the_same(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from octavo.common.convert.output.writer import whole_directory
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


def test_a_directory_of_others_with_a_record_of_theirs_is_not_emptied(tmp_path: Path) -> None:
    stage = stage_path(tmp_path / "out")
    (stage / ".progress").mkdir(parents=True)
    (stage / ".progress" / "progress.json").write_text("{}")
    (stage / "precious").write_text("kept")
    for resumes in (False, True):
        with (
            pytest.raises(OctavoError, match="holds files of no conversion"),
            whole_directory(tmp_path / "out", "--out", JOB, resumes),
        ):
            pass
    assert (stage / "precious").read_text() == "kept"
