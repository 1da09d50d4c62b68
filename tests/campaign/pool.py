"""Forked workers that each take a try at a time, and are ended where one takes too long, too much memory, or dies."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from .memory import processor_seconds, resident_megabytes
from .outcomes import CRASH, HANG, MEMORY, Result

Work = Callable[[int, Path, Callable[[str], None]], Result]
"""Makes a try of a number in a scratch folder, and says in words what it is before it runs."""
MOST_SECONDS = 10.0
"""Of processor time, so that a busy machine makes no hang."""
MOST_SECONDS_ASLEEP = 60.0
KILLED_MEGABYTES = 3072
"""Above what was resident before, where a worker is ended at once."""
TRIES_PER_WORKER = 500
LOOK_EVERY = 0.05
LOOK_FOR_PARENT = 5.0
DUMP_SIGNAL = signal.SIGUSR1


def _serve(connection: Connection, work: Work, folder: Path) -> None:
    """The loop of a worker; its stderr goes to a file, for what C code says before it dies."""
    log = os.open(folder / Worker.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    faulthandler.enable(sys.stderr)
    faulthandler.register(DUMP_SIGNAL, sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    while os.getppid() == parent:  # the other workers hold the pipe open too, so that its end says nothing
        if connection.poll(LOOK_FOR_PARENT):
            number = connection.recv()
            os.ftruncate(log, 0)
            connection.send(work(number, folder / "scratch", connection.send))


class Worker:
    """A forked process and the try that it is at."""

    LOG = "stderr"

    def __init__(self, work: Work, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / self.LOG
        self._log.unlink(missing_ok=True)
        context = multiprocessing.get_context("fork")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work, folder), daemon=True)
        self.process.start()
        other.close()
        self.folder = folder
        self.number: int | None = None
        self.done = 0

    def begin(self, number: int) -> None:
        """Hand it a try."""
        self.number, self.what = number, ""
        self._wall = time.monotonic()
        self._processor = processor_seconds(self.process.pid)
        self._resident = resident_megabytes(self.process.pid)
        self.connection.send(number)

    def overdue(self) -> tuple[str, str] | None:
        """The end and detail of a try that has to be stopped."""
        grown = resident_megabytes(self.process.pid) - self._resident
        if grown > KILLED_MEGABYTES:
            return MEMORY, f"stopped at {grown:.0f} MB"
        if processor_seconds(self.process.pid) - self._processor > MOST_SECONDS:
            return HANG, f"more than {MOST_SECONDS:.0f} s of processor time"
        if time.monotonic() - self._wall > MOST_SECONDS_ASLEEP:
            return HANG, f"more than {MOST_SECONDS_ASLEEP:.0f} s"
        return None

    def stack(self) -> str:
        """Where it is: the innermost lines of Octavo in a dump of its stack."""
        os.kill(self.process.pid, DUMP_SIGNAL)
        time.sleep(0.3)
        return self.last_words("File")

    def last_words(self, *marks: str) -> str:
        """The first lines of its stderr that hold one of some marks."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return " / ".join(line.strip() for line in text.splitlines() if any(mark in line for mark in marks))[:600]

    def stop(self) -> int | None:
        """End it and return its exit code."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


def _died(worker: Worker) -> str:
    code = worker.stop()
    cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    marks = ("SUMMARY", "runtime error", "CHECK failed", "Fatal", "corrupt", "invalid", "File")
    return f"{cause}: {worker.last_words(*marks)}"


def run_all(
    numbers: Sequence[int], work: Work, folder: Path, count: int, name: Callable[[int], str]
) -> Iterator[Result]:
    """The results of tries as they end; `name` gives the kind of a try whose worker is lost."""
    waiting = list(reversed(numbers))
    workers = [Worker(work, folder / f"worker{index}") for index in range(min(count, len(waiting)))]
    try:
        for worker in workers:
            worker.begin(waiting.pop())
        while any(worker.number is not None for worker in workers):
            ready = wait([w.connection for w in workers if w.number is not None], timeout=LOOK_EVERY)
            for index, worker in enumerate(workers):
                if worker.number is None:
                    continue
                result = _look(worker, worker.connection in ready, name)
                if result is None:
                    continue
                yield result
                is_lost = not worker.process.is_alive() or worker.done >= TRIES_PER_WORKER
                worker.number = None
                if is_lost:
                    worker.stop() if worker.process.is_alive() else None
                    worker = workers[index] = Worker(work, worker.folder)
                if waiting:
                    worker.begin(waiting.pop())
    finally:
        for worker in workers:
            worker.stop()


def _look(worker: Worker, is_ready: bool, name: Callable[[int], str]) -> Result | None:
    """The result of a worker's try, if it has ended or has to."""
    number = worker.number
    if is_ready:
        try:
            said = worker.connection.recv()
        except (EOFError, OSError):
            return Result(number, name(number), worker.what, CRASH, _died(worker))
        if isinstance(said, Result):
            worker.done += 1
            return said
        worker.what = said
    overdue = worker.overdue()
    if overdue is None:
        return None
    end, detail = overdue
    where = worker.stack()
    worker.stop()
    return Result(number, name(number), worker.what, end, f"{detail}: {where}")
