"""One try in a worker: prepared from its seed and number, run, and judged."""

import contextlib
import io
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random

from .kinds import KINDS, kind_of
from .memory import peak_megabytes, reset_peak
from .outcomes import BROKEN, CAUGHT, EQUAL, FOREIGN, LEFT, MEANT, MEMORY, REFUSED, SILENT, TRACEBACK, Result

MOST_MEGABYTES = 1024
"""By which a try may raise the peak of resident memory."""
LONGEST_LINE = 1000
"""Characters of a line that is still one: a message of Octavo has 900 at most, to which scripts add."""
OWN_CODE = ("octavo_runtime", "modeling_", "/common/", "/ops/", "/models/llama3/", "/models/qwen2/")
LAST_RESORT = "(OCTAVO_TRACEBACK=1 shows where)"


class Expect(Enum):
    """What acceptance of damage must come with."""

    EQUAL = "the result of the undamaged one"
    REFUSAL = "nothing: it must be refused"
    ANYTHING = "a result of its own, which is meant or which no check can tell from the right one"


@dataclass(frozen=True)
class Accepted:
    """What was damaged was taken.

    Attributes:
        is_equal: whether its result is that of the undamaged one.
        difference: how it differs.
        is_sound: False where the result is wrong whatever the damage may mean.
    """

    is_equal: bool
    difference: str = ""
    is_sound: bool = True


def does_not_load(error: Exception) -> Accepted:
    """What a conversion wrote without complaint, and a load refuses."""
    return Accepted(False, f"the output does not load: {type(error).__name__}: {error}", is_sound=False)


@dataclass(frozen=True)
class Script:
    """A script ended: its exit code, what it wrote on stderr, and on success what was accepted."""

    code: int
    stderr: str
    accepted: Accepted | None = None


@dataclass(frozen=True)
class Attempt:
    """A try, prepared.

    Attributes:
        what: what is damaged, and how.
        run: does it; raises where it is refused.
        expect: what acceptance must come with.
        refusals: names of exceptions that refuse.
        may_be_foreign: whether an exception that no code of Octavo has part in is a refusal too.
        absent: paths that must not exist if it is refused.
    """

    what: str
    run: Callable[[], Accepted | Script]
    expect: Expect = Expect.EQUAL
    refusals: tuple[str, ...] = ("OctavoError",)
    may_be_foreign: bool = False
    absent: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Room:
    """Where a try works: the folder of what can be damaged, read only, and one of its own, empty."""

    bases: Path
    scratch: Path


def _is_one_line(text: str) -> bool:
    return 0 < len(text.strip()) <= LONGEST_LINE and "\n" not in text.strip()


def _is_foreign(error: BaseException) -> bool:
    """Whether no code of Octavo has part in an exception."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return not any(part in name for name in frames for part in OWN_CODE if "site-packages" not in name)


def _where(error: BaseException) -> str:
    """An exception and the innermost lines of Octavo's code that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if any(part in f.filename for part in OWN_CODE) and "site-packages" not in f.filename]
    places = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in own[-2:])
    text = " / ".join(line.strip() for line in str(error).splitlines() if line.strip())[:200]
    return f"{type(error).__name__}: {text} ({places or 'no code of Octavo'})"


def _of_script(done: Script, attempt: Attempt) -> tuple[str, str]:
    if done.code == 0:
        return _of_accepted(done.accepted or Accepted(True), attempt)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:") or ": error: " in line]
    last = errors[-1] if errors else (lines or ["nothing on stderr"])[-1]
    if len(errors) != 1 or "Traceback" in done.stderr or not _is_one_line(last):
        return TRACEBACK, f"exit code {done.code}, {len(errors)} lines of error: {last[:300]}"
    return (CAUGHT if LAST_RESORT in last else REFUSED), last


def _of_accepted(accepted: Accepted, attempt: Attempt) -> tuple[str, str]:
    if attempt.expect is Expect.REFUSAL:
        return SILENT, f"accepted, and must be refused; {accepted.difference or 'the result is the same'}"
    if not accepted.is_sound:
        return SILENT, accepted.difference
    if accepted.is_equal:
        return EQUAL, ""
    return (MEANT if attempt.expect is Expect.ANYTHING else SILENT), accepted.difference


def _of_exception(error: BaseException, attempt: Attempt) -> tuple[str, str]:
    if type(error).__name__ in attempt.refusals:
        line = str(error)
        return (REFUSED, line) if _is_one_line(line) else (TRACEBACK, f"no single line: {_where(error)}")
    if attempt.may_be_foreign and _is_foreign(error):
        return FOREIGN, _where(error)
    return TRACEBACK, _where(error)


def judge(attempt: Attempt) -> tuple[str, str]:
    """Run an attempt; its end and the detail. Tracebacks go to stderr, where a try is looked at alone."""
    stderr, log = io.StringIO(), sys.stderr
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            done = attempt.run()
        except (Exception, SystemExit) as error:
            traceback.print_exc(file=log)
            end, detail = _of_exception(error, attempt)
        else:
            end, detail = (_of_script if isinstance(done, Script) else _of_accepted)(done, attempt)
    left = [path.name for path in attempt.absent if os.path.exists(path)]  # of a name too long too
    if left and end in (REFUSED, CAUGHT):
        return LEFT, f"{left[0]} is left behind: {detail}"
    return end, detail


def drawn(number: int, seed: int) -> tuple[str, Random]:
    """The kind of a try, and the random numbers that it goes on with."""
    rng = Random(f"{seed}-{number}")
    return kind_of(rng), rng


def run_try(number: int, seed: int, room: Room, say: Callable[[str], None]) -> Result:
    """Make and judge the try of a number in a room; `say` is told what it is before it runs."""
    kind, rng = drawn(number, seed)
    shutil.rmtree(room.scratch, ignore_errors=True)
    room.scratch.mkdir(parents=True)
    os.chdir(room.scratch)  # where relative paths of damaged command lines lead
    try:
        attempt = KINDS[kind].prepare()(rng, room)
    except Exception as error:
        return Result(number, kind, "(not prepared)", BROKEN, _where(error) + traceback.format_exc()[-500:])
    say(attempt.what)
    before = reset_peak()
    start = time.process_time()
    end, detail = judge(attempt)
    seconds, megabytes = time.process_time() - start, peak_megabytes() - before
    if megabytes > MOST_MEGABYTES:
        end, detail = MEMORY, f"{megabytes:.0f} MB ({end}: {detail})"
    return Result(number, kind, attempt.what, end, detail, seconds, megabytes)
