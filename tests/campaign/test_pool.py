"""Workers that hang, die or take too much memory are ended and named; those that are well go on."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from . import pool
from .outcomes import CRASH, EQUAL, HANG, MEMORY, Result

Say = Callable[[str], None]


def _work(number: int, folder: Path, say: Say) -> Result:
    """A try that ends as its number says."""
    say(f"number {number}")
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2:
        while True:
            pass
    if number == 3:
        time.sleep(60)
    if number == 4:
        kept = bytearray(b"1") * (200 << 20)
        time.sleep(60)
        del kept
    return Result(number, "kind", f"number {number}", EQUAL, str(os.getpid()))


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for."""
    monkeypatch.setattr(pool, "MOST_SECONDS", 0.5)
    monkeypatch.setattr(pool, "MOST_SECONDS_ASLEEP", 2.0)
    monkeypatch.setattr(pool, "KILLED_MEGABYTES", 100)


@pytest.mark.parametrize(("number", "end"), [(0, EQUAL), (1, CRASH), (2, HANG), (3, HANG), (4, MEMORY)])
def test_each_end_is_told_apart_and_the_next_try_is_well(number: int, end: str, tmp_path: Path) -> None:
    results = list(pool.run_all([number, 0], _work, tmp_path, 1, lambda number: "kind"))
    assert [(result.number, result.end) for result in results] == [(number, end), (0, EQUAL)]
    assert results[0].what == f"number {number}"
    assert end != CRASH or "SIGSEGV" in results[0].detail


def test_workers_are_used_again_and_every_try_is_made_once(tmp_path: Path) -> None:
    results = list(pool.run_all(range(5, 25), _work, tmp_path, 2, lambda number: "kind"))
    assert sorted(result.number for result in results) == list(range(5, 25))
    assert len({result.detail for result in results}) <= 2
