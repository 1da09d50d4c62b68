"""A process that runs an engine in an environment of its own, asked over a pipe; `engines/worker.py` says what for."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any

QUIT_SECONDS = 20.0
SYSTEM = Path("/proc/stat")


def busy_seconds() -> float | None:
    """CPU seconds that all processes of this machine took so far; None where the system does not tell."""
    if not SYSTEM.exists():
        return None
    user, nice, system, _, _, *interrupts = map(int, SYSTEM.read_text(encoding="utf-8").splitlines()[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


class EngineFailure(RuntimeError):
    """Why an engine gives no figure, in one line."""


class EngineProcess:
    """A worker, for the length of a `with` block. What it prints goes to `log`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.peak: int | None = None
        """The most bytes that were resident, as the last answer has it."""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command],
                env={**environment, "PYTHONUNBUFFERED": "1"},  # or the last words of one that hangs are lost
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, do: str, limit: float, **arguments: Any) -> Any:
        """What the worker answers.

        Raises:
            EngineFailure: it cannot, it died, or it took more than `limit` seconds.
        """
        timer = Timer(limit, self._process.kill)
        timer.start()
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            was_late = timer.finished.is_set()
            timer.cancel()
        if not line:
            reason = f"took more than {limit:g} s" if was_late else f"died ({self._process.wait(QUIT_SECONDS)})"
            raise EngineFailure(f"{do}: {reason}; its last words are in {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailure(f"{do}: {answer['error']}; see {self.log}")
        self.peak = answer["peak"]
        return answer["result"]

    def others_seconds(self) -> float | None:
        """CPU seconds that all other processes of this machine took so far; None where the system does not tell."""
        busy = busy_seconds()
        if busy is None:
            return None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return busy - (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            print(json.dumps({"do": "quit"}), file=self._process.stdin, flush=True)
            self._process.wait(QUIT_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            for stream in (self._process.stdin, self._process.stdout):
                try:
                    stream.close()
                except BrokenPipeError:
                    print(f"{self.log}: the worker was gone", file=sys.stderr)
