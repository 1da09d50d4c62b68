"""The directory in which an output grows, and the record of how far it has come, which tells damage from progress."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import OctavoError
from ..spelling import named_without_dashes

PROGRESS = ".progress"
"""Directory within a stage; it is removed from the output once that is in its place."""
RECORD = "progress.json"
READ_BYTES = 2**22
"""Bytes that are read at a time of what is only summed up."""
LONGEST_VALUE = 40
"""Characters of the longest value that is shown of a job that differs."""


class Kept(OctavoError):
    """An error that leaves a stage as it is."""


def new_digest() -> Any:
    """What bytes are summed up with to see later whether they are still the same."""
    return hashlib.sha256()


def _digest_of_json(data: dict[str, Any]) -> str:
    digest = new_digest()
    digest.update(json.dumps(data).encode())
    return digest.hexdigest()


def _digest_of_file(file: Path) -> str:
    digest = new_digest()
    with file.open("rb") as opened:
        while part := opened.read(READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _change(name: str, before: Any, now: Any) -> str:
    """What differs, with both values where they are short."""
    values = ["unset" if value is None else str(value).strip("'") for value in (before, now)]
    name = named_without_dashes(name)
    return name if max(map(len, values)) > LONGEST_VALUE else f"{name} ({values[0]} then, {values[1]} now)"


def sync(path: Path) -> None:
    """Return once a file, or the names in a directory where that can be had, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # which some file systems cannot do
            raise
    finally:
        os.close(handle)


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a stage, or of an output that still has it; None if there is none that can be trusted."""
    try:
        record = json.loads((directory / PROGRESS / RECORD).read_text(encoding="utf-8"))
        digest = record.pop("digest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if digest == _digest_of_json(record) else None


def is_made_by_us(path: Path) -> bool:
    """Whether a directory is a stage, or one whose process was stopped before it had written anything else."""
    progress = path / PROGRESS
    if progress.is_symlink() or not progress.is_dir():
        return not any(path.iterdir())
    names = [entry.name for entry in progress.iterdir()]
    if RECORD in names:  # which may have come to harm, and so may a state
        return b'"job"' in (progress / RECORD).read_bytes() or any(name.startswith("state-") for name in names)
    return os.listdir(path) == [PROGRESS] and all(name.startswith(("state-", "progress.")) for name in names)


def remove_progress(directory: Path) -> None:
    """Remove the record of a finished output, itself last, so that what is left by a kill is known for what it is."""
    progress = directory / PROGRESS
    for entry in progress.iterdir():
        if entry.name != RECORD:
            entry.unlink()
    (progress / RECORD).unlink(missing_ok=True)
    progress.rmdir()


class Stage:
    """The directory in which an output grows, and how far it has come.

    Attributes:
        path: the directory.
        step: steps that are finished; 0 at first.
        state: tensors that were kept with the last of them.
        notes: plain data that was kept with it.
        damage: what is damaged of a stage that cannot be gone on with; "" if nothing is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0
        self.state: dict[str, torch.Tensor] = {}
        self.notes: dict[str, Any] = {}
        self.damage = ""
        self._progress = path / PROGRESS
        self._record: dict[str, Any] = {}

    def _state_file(self, step: int) -> Path:
        return self._progress / f"state-{step}.safetensors"

    def begin(self, job: dict[str, Any]) -> None:
        """Start anew; `job` says what is being made."""
        self._progress.mkdir()
        self._record = {"job": job}
        self.finish_step(0, {}, {})

    def resume(self, job: dict[str, Any], flag: str) -> bool:
        """Go on where the last process stopped; False if it had not finished a step, or if `damage` says of what.

        Raises:
            OctavoError: that was another job.
        """
        file = self._progress / RECORD
        if not file.is_file():
            return False
        record = read_record(self.path)
        self._check_job(job, flag, record)
        if record is None:
            self.damage = f"{file} is damaged"
            return False
        if record["step"] == 0:
            return False
        state = self._state_file(record["step"])
        try:
            if _digest_of_file(state) != record["state"]:
                raise ValueError
            with safe_open(state, framework="pt") as opened:
                self.state = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError):
            self.damage = f"{state} is damaged"
            return False
        self._record, self.step, self.notes = record, record["step"], record["notes"]
        return True

    def _check_job(self, job: dict[str, Any], flag: str, record: dict[str, Any] | None) -> None:
        """Raise an `OctavoError` if a record with finished steps, be it of a version before this, is of another job."""
        if record is None:
            try:
                record = json.loads((self._progress / RECORD).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                return
            if not isinstance(record, dict) or "digest" in record:
                return
        known = record.get("job")
        if not record.get("step") or not isinstance(known, dict):
            return
        differing = sorted(name for name in {*job, *known} if job.get(name) != known.get(name))
        if differing:
            raise Kept(
                f"{flag}: the interrupted conversion in {self.path} differs in "
                f"{', '.join(_change(name, known.get(name), job.get(name)) for name in differing)}; "
                "go on as it was begun, or remove it"
            )

    def finish_step(self, step: int, state: dict[str, torch.Tensor], notes: dict[str, Any]) -> None:
        """Record that everything up to a step is written, with what the next one needs."""
        before, file = self._state_file(self.step), self._state_file(step)
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, file)
        sync(file)
        self._write(step=step, state=_digest_of_file(file), notes=notes)
        if before != file:
            before.unlink(missing_ok=True)
        self.step = step

    def amend(self, notes: dict[str, Any]) -> None:
        """Change the notes of the last step."""
        self._write(notes=notes)
        self.notes = notes

    def finish(self) -> None:
        """Record that the output is whole, and return once all of it is on the disk."""
        self._write(whole=True)
        for path in (*self.path.rglob("*"), self.path):
            sync(path)

    def _write(self, **changes: Any) -> None:
        """Change the record, or leave it as it was if the process is stopped."""
        self._record |= changes
        file = self._progress / RECORD
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(self._record | {"digest": _digest_of_json(self._record)}), encoding="utf-8")
        sync(fresh)
        os.replace(fresh, file)
