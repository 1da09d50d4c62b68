"""A try ends as what it raises, returns, leaves and uses says."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from octavo.common.errors import OctavoError
from octavo.ops.shared.codes import code_range

from . import trial
from .outcomes import (
    BROKEN,
    CAUGHT,
    EQUAL,
    FOREIGN,
    LEFT,
    MEANT,
    MEMORY,
    REFUSED,
    SILENT,
    TRACEBACK,
    Result,
)
from .report import failure_line, table
from .trial import Accepted, Attempt, Expect, Room, Script, does_not_load, judge, run_try

SAME, OTHER = Accepted(True), Accepted(False, "off by 0.3")


def _raising(error: BaseException) -> Callable[[], Accepted]:
    def run() -> Accepted:
        raise error

    return run


@pytest.mark.parametrize(
    ("expect", "accepted", "end"),
    [
        (Expect.EQUAL, SAME, EQUAL),
        (Expect.EQUAL, OTHER, SILENT),
        (Expect.ANYTHING, SAME, EQUAL),
        (Expect.ANYTHING, OTHER, MEANT),
        (Expect.ANYTHING, does_not_load(OctavoError("no")), SILENT),
        (Expect.REFUSAL, SAME, SILENT),
        (Expect.REFUSAL, OTHER, SILENT),
    ],
)
def test_what_is_accepted(expect: Expect, accepted: Accepted, end: str) -> None:
    assert judge(Attempt("", lambda: accepted, expect))[0] == end


_Bundled = type("OctavoError", (ValueError,), {})  # as the code beside some weights has it, which may let lines pass


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (OctavoError("file: is damaged; copy it again"), REFUSED),
        (_Bundled("two\nlines"), TRACEBACK),
        (_Bundled("x" * 5000), TRACEBACK),
        (OctavoError(""), TRACEBACK),
        (ValueError("not ours"), TRACEBACK),
        (RecursionError(), TRACEBACK),
        (SystemExit(1), TRACEBACK),
    ],
)
def test_what_is_raised(error: BaseException, end: str) -> None:
    assert judge(Attempt("", _raising(error)))[0] == end


def test_what_no_code_of_octavo_has_part_in_is_foreign_where_that_may_be() -> None:
    assert judge(Attempt("", _raising(OSError("no JSON")), may_be_foreign=True))[0] == FOREIGN
    assert judge(Attempt("", lambda: code_range("no dtype"), may_be_foreign=True))[0] == TRACEBACK


@pytest.mark.parametrize(
    ("code", "stderr", "end"),
    [
        (1, "a bar\nerror: --flag x: is wrong; give y\n", REFUSED),
        (2, "script.py: error: argument --flag\n", REFUSED),
        (1, "error: TypeError: x (OCTAVO_TRACEBACK=1 shows where)\n", CAUGHT),
        (1, "error: one\nerror: two\n", TRACEBACK),
        (1, "something\n", TRACEBACK),
        (1, "Traceback (most recent call last):\nerror: x\n", TRACEBACK),
        (0, "", EQUAL),
    ],
)
def test_how_a_script_ends(code: int, stderr: str, end: str) -> None:
    assert judge(Attempt("", lambda: Script(code, stderr)))[0] == end


def test_what_a_refusal_leaves_behind_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run = _raising(OctavoError("no"))
    assert judge(Attempt("", run, absent=(tmp_path / "out",)))[0] == LEFT
    assert judge(Attempt("", run, absent=(tmp_path / "other",)))[0] == REFUSED


class _Prepared:
    """Stands for a kind of tries whose one attempt is given."""

    sanitized = False

    def __init__(self, run: Callable[[], Accepted] | None) -> None:
        self._run = run

    def prepare(self) -> Callable[[Random, Room], Attempt]:
        def attempt(rng: Random, room: Room) -> Attempt:
            assert self._run is not None
            return Attempt("what", self._run)

        return attempt


def _grows() -> Accepted:
    return Accepted(len(bytearray(b"1") * (200 << 20)) > 0)


@pytest.mark.parametrize(("run", "end"), [(_grows, MEMORY), (lambda: SAME, EQUAL), (None, BROKEN)])
def test_a_try_is_measured(
    run: Callable[[], Accepted] | None, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/clear_refs").exists() and end == MEMORY:
        pytest.skip("the peak of resident memory is read from /proc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "MOST_MEGABYTES", 100)
    monkeypatch.setattr(trial, "KINDS", dict.fromkeys(trial.KINDS, _Prepared(run)))
    said: list[str] = []
    result = run_try(5, 0, Room(tmp_path, tmp_path / "scratch"), said.append)
    assert result.end == end and result.number == 5
    assert said == ([] if end == BROKEN else ["what"])


def test_the_table_counts_and_a_failure_says_how_to_see_it_again() -> None:
    results = [Result(n, "config", "x", end, "", 0.1, 1.0) for n, end in enumerate((EQUAL, REFUSED, REFUSED, SILENT))]
    lines = table(results).splitlines()
    assert [line.split() for line in lines] == [
        ["refused", "equal", "silent", "tries"],
        ["config", "2", "1", "1", "4"],
        ["all", "2", "1", "1", "4"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert failure_line(results[3], 9).endswith("python -m tests.campaign --seed 9 --only 3")
