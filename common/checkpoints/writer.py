"""Writing an output directory: whole, or not at all; and going on with one whose process was stopped."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import OctavoError

PROGRESS = ".progress"
"""Directory within a stage; it is gone before the stage becomes the output."""
LONGEST_VALUE = 40
"""Characters of the longest value that is shown of a job that differs."""


class _Kept(OctavoError):
    """An error that leaves a stage as it is."""


def check_output(directory: Path, flag: str) -> None:
    """Raise an `OctavoError` if `directory` holds something already or could not be made."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OctavoError(f"{flag} {directory}: exists already; choose another directory or remove it")
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OctavoError(f"{flag} {directory}: {parent} cannot be written; choose another directory")


def _change(name: str, before: Any, now: Any) -> str:
    """What differs, with both values where they are short."""
    values = ["unset" if value is None else str(value).strip("'") for value in (before, now)]
    return name if max(map(len, values)) > LONGEST_VALUE else f"{name} ({values[0]} then, {values[1]} now)"


class Stage:
    """The directory in which an output grows, and how far it has come.

    Attributes:
        path: the directory.
        step: steps that are finished; 0 at first.
        state: tensors that were kept with the last of them.
        notes: plain data that was kept with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0
        self.state: dict[str, torch.Tensor] = {}
        self.notes: dict[str, Any] = {}
        self._progress = path / PROGRESS

    @property
    def _file(self) -> Path:
        return self._progress / "progress.json"

    def _state_file(self, step: int) -> Path:
        return self._progress / f"state-{step}.safetensors"

    def begin(self, job: dict[str, Any]) -> None:
        """Start anew; `job` says what is being made."""
        self._progress.mkdir()
        self._job = job
        self.finish_step(0, {}, {})

    def resume(self, job: dict[str, Any], flag: str) -> bool:
        """Go on where the last process stopped; False if it had not finished a step.

        Raises:
            OctavoError: that was another job.
        """
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
            step = int(known["step"])
            if step == 0:
                return False
            with safe_open(self._state_file(step), framework="pt") as opened:
                self.state = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, SafetensorError):
            return False
        differing = sorted(name for name in {*job, *known["job"]} if job.get(name) != known["job"].get(name))
        if differing:
            raise _Kept(
                f"{flag}: the interrupted conversion in {self.path} differs in "
                f"{', '.join(_change(name, known['job'].get(name), job.get(name)) for name in differing)}; "
                "go on as it was begun, or remove it"
            )
        self._job, self.step, self.notes = job, step, known["notes"]
        return True

    def finish_step(self, step: int, state: dict[str, torch.Tensor], notes: dict[str, Any]) -> None:
        """Record that everything up to a step is written, with what the next one needs."""
        before = self._state_file(self.step)
        file = self._state_file(step)
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, file)
        _sync(file)
        text = json.dumps({"step": step, "job": self._job, "notes": notes})
        fresh = self._file.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        _sync(fresh)
        os.replace(fresh, self._file)
        if before != file:
            before.unlink(missing_ok=True)
        self.step = step

    def _end(self) -> None:
        shutil.rmtree(self._progress)


def _sync(path: Path) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())


def stage_path(directory: Path) -> Path:
    """Where the output for `directory` grows: beside it, hidden."""
    directory = directory.absolute()
    return directory.parent / f".{directory.name}.partial"


@contextmanager
def _locked(stage: Path, flag: str) -> Iterator[None]:
    """Keep other processes out of a stage, which is a directory that exists."""
    handle = os.open(stage, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Kept(f"{flag}: another process is writing it ({stage}); wait for that one") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def whole_directory(directory: Path, flag: str, job: dict[str, Any], resumes: bool = False) -> Iterator[Stage]:
    """A stage to write into, which becomes `directory` at the end, or vanishes if anything fails.

    Once a step is finished, it stays if the process is killed, interrupted or fails, for another one to go on with; but
    not if an `OctavoError` says that what is made is not wanted.

    Args:
        flag: what the user named the directory with, for messages.
        job: plain data that tells one job from another.
        resumes: whether to go on with what an interrupted process left, if it left anything.

    Raises:
        OctavoError: the directory cannot be written, or the disk is full; something is left of an interrupted process
            and `resumes` does not say what to do with it.
    """
    check_output(directory, flag)
    directory, path = directory.absolute(), stage_path(directory)
    where, stage = f"{flag} {directory}", Stage(path)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True)
        with _locked(path, where):
            if stage.resume(job, "--resume" if resumes else where) and not resumes:
                raise _Kept(f"{where}: an interrupted conversion is in {path}; give --resume, or remove it")
            if not stage.step:
                _empty(path)
                stage.begin(job)
            yield stage
            stage._end()
            os.replace(path, directory)
    except _Kept:
        raise
    except OctavoError:
        _discard(path)
        raise
    except BaseException as error:
        if stage.step:
            kept = f": what is finished is kept in {path}; give --resume to go on, or remove it"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from None
            raise OctavoError(f"{where}: stopped by {type(error).__name__} ({error}){kept}") from error
        _discard(path)
        if isinstance(error, (OSError, SafetensorError)):
            raise OctavoError(f"{where}: cannot be written ({error}); nothing was kept") from None
        raise


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _discard(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
