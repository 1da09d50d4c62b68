"""Writing an output directory: whole, or not at all; and going on with one whose process was stopped."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...errors import OctavoError
from ..spelling import named
from .stage import PROGRESS, Kept, Stage, is_made_by_us, read_record, remove_progress, sync

LONGEST_FILE_NAME = 255
"""Bytes of a name that file systems take."""


def _place(directory: Path) -> Path:
    """Where an output really is: behind all links."""
    return Path(os.path.realpath(directory))


def stage_path(directory: Path) -> Path:
    """Where the output for `directory` grows: beside it, hidden."""
    place = _place(directory)
    return place.parent / f".{place.name}.partial"


def check_output(directory: Path, flag: str) -> None:
    """Raise an `OctavoError` if `directory` holds something already, or could not be made or put in its place."""
    if len(os.fsencode(stage_path(directory).name)) > LONGEST_FILE_NAME:
        raise Kept(f"{flag} {directory.name[:40]}...: is a name too long for a directory; choose a shorter one")
    place = _place(directory)
    if place.is_symlink():
        raise Kept(f"{flag} {directory}: is a link that leads nowhere; choose another directory or remove it")
    if os.path.ismount(place):
        raise Kept(f"{flag} {directory}: is a mount point, which nothing can replace; name a directory in it")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        _tidy(place, f"{flag} {directory}")
        raise Kept(f"{flag} {directory}: exists already; choose another directory or remove it")
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise Kept(f"{flag} {directory}: {parent} cannot be written; choose another directory")
    _check_stage(stage_path(directory), f"{flag} {directory}")


def _tidy(output: Path, where: str) -> None:
    """Remove the record that a process left which was stopped behind putting a whole output in its place."""
    progress = output / PROGRESS
    if progress.is_symlink() or not progress.is_dir():
        return
    record = read_record(output)
    if (record is not None and record.get("whole")) or not any(progress.iterdir()):
        with contextlib.suppress(OSError):
            remove_progress(output)
    elif record is not None:
        raise Kept(
            f"{where}: is an interrupted conversion; move it to {stage_path(output)} and give {named('resume=True')}, "
            "or remove it"
        )


def _check_stage(path: Path, where: str) -> None:
    """Raise an `OctavoError` if what is at the place of a stage is none."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir() or os.path.ismount(path):
        raise Kept(f"{where}: {path} is in the way, which is no directory of a conversion; move it or remove it")
    if not is_made_by_us(path):
        raise Kept(f"{where}: {path} is in the way, which holds files of no conversion; move it or remove it")


def _check_replaceable(place: Path, where: str) -> None:
    """Raise an `OctavoError` if an empty directory cannot be replaced, as a place where another one is mounted."""
    if not place.is_dir():
        return
    aside = tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent)
    try:
        os.rename(place, aside)
    except OSError as error:
        os.rmdir(aside)
        raise Kept(f"{where}: cannot be replaced ({error.strerror}); name a directory in it, or another one") from None
    os.rename(aside, place)


@contextmanager
def _locked(stage: Path, flag: str) -> Iterator[None]:
    """Keep other processes out of a stage, which is a directory that exists."""
    handle = os.open(stage, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Kept(f"{flag}: another process is writing it ({stage}); wait for that one") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def whole_directory(directory: Path, flag: str, job: dict[str, Any], resumes: bool = False) -> Iterator[Stage]:
    """A stage to write into, which becomes `directory` at the end, or vanishes if anything fails.

    Once a step is finished, it stays if the process is killed, interrupted or fails, for another one to go on with; but
    not if an `OctavoError` says that what is made is not wanted. The record of the steps is removed when the output is
    in its place, so that there is no moment at which a kill loses them.

    Args:
        flag: what the user named the directory with, for messages.
        job: plain data that tells one job from another.
        resumes: whether to go on with what an interrupted process left, if it left anything.

    Raises:
        OctavoError: the directory cannot be written, or the disk is full; something is left of an interrupted process
            and `resumes` does not say what to do with it; something else is where the stage is to be.
    """
    check_output(directory, flag)
    where = f"{flag} {directory.absolute()}"
    place, path = _place(directory), stage_path(directory)
    stage = Stage(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True)
        with _locked(path, where):
            check_output(directory, flag)  # another process may have been faster
            _open(stage, place, where, job, resumes)
            yield stage
            stage.finish()
            os.replace(path, place)
    except Kept:
        raise
    except OctavoError:
        _discard(path)
        raise
    except BaseException as error:
        if stage.step:
            kept = f": what is finished is kept in {path}; give {named('resume=True')} to go on, or remove it"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from None
            raise OctavoError(f"{where}: stopped by {type(error).__name__} ({error}){kept}") from error
        _discard(path)
        if isinstance(error, (OSError, SafetensorError)):
            raise OctavoError(f"{where}: cannot be written ({error}); nothing was kept") from None
        raise
    with contextlib.suppress(OSError):  # a directory that may not be read
        sync(place.parent)
    with contextlib.suppress(OSError):  # the output is whole, and the next run tidies it
        remove_progress(place)


def _open(stage: Stage, place: Path, where: str, job: dict[str, Any], resumes: bool) -> None:
    """Go on with a stage, or begin anew."""
    try:
        _check_replaceable(place, where)
    except Kept:
        if not any(stage.path.iterdir()):
            stage.path.rmdir()
        raise
    found = stage.resume(job, named("resume=True") if resumes else where)
    if not resumes and (found or stage.damage):
        damage = f", of which {stage.damage}" if stage.damage else ""
        raise Kept(
            f"{where}: an interrupted conversion is in {stage.path}{damage}; give {named('resume=True')}, or remove it"
        )
    if not found:
        _empty(stage.path)
        stage.begin(job)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _discard(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    file.write_text(json_text(data), encoding="utf-8")


def json_text(data: dict[str, Any]) -> str:
    """An object as indented JSON, as files have it."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
