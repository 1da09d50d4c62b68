"""Tries with kernels under address and undefined-behaviour sanitizers, in a process that has libasan loaded first."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .outcomes import Result

FLAGS = "-O0 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
"""For the compiler. Without optimization, since that takes a third of the time and hides no fault."""
OPTIONS = "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0"
LOOK_EVERY = 0.2


def sanitizer_libraries() -> tuple[str, str]:
    """What has to be loaded before all else, and why it cannot be: one of the two is empty.

    libstdc++ is there too, as libasan looks for the function that throws exceptions of C++ when it is loaded.
    """
    if not sys.platform.startswith("linux"):
        return "", "libasan is loaded first by LD_PRELOAD, which Linux has"
    if os.environ.get("CC") or not shutil.which("gcc"):
        return "", "CC is set" if os.environ.get("CC") else "there is no gcc"
    found = [_library_of_gcc(name) for name in ("libasan.so", "libstdc++.so")]
    return (" ".join(found), "") if all(found) else ("", "this gcc comes without libasan or libstdc++")


def _library_of_gcc(name: str) -> str:
    """The path of a library, empty if there is none."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if Path(found).is_absolute() else ""


def environment_of(libraries: str) -> dict[str, str]:
    """What compiles kernels with sanitizers, and loads what those need."""
    return {
        "CC": "gcc",
        "OCTAVO_CFLAGS": FLAGS,
        "LD_PRELOAD": libraries,
        "ASAN_OPTIONS": OPTIONS,
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }


class Apart:
    """A process that makes tries beside the others, if there are any.

    Attributes:
        reason: why they cannot be made, if they cannot.
    """

    def __init__(self, numbers: Sequence[int], seed: int, folder: Path) -> None:
        self._numbers = numbers
        self._found = folder / "sanitized.jsonl"
        self._process: subprocess.Popen[bytes] | None = None
        libraries, self.reason = sanitizer_libraries() if numbers else ("", "")
        if not libraries:
            return
        self._log = folder / "sanitized.stderr"
        command = [sys.executable, "-m", f"{__package__}.apart", str(seed), str(folder / "sanitized"), str(self._found)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **environment_of(libraries)}
            )
        self._process.stdin.write(json.dumps(list(numbers)).encode())
        self._process.stdin.close()

    def results(self) -> Iterator[Result]:
        """What it finds, as it finds it.

        Raises:
            RuntimeError: it ends before it is done.
        """
        if self._process is None:
            return
        given = 0
        while given < len(self._numbers):
            is_running = self._process.poll() is None
            lines = self._found.read_text().splitlines() if self._found.exists() else []
            for line in lines[given:]:
                yield Result(**json.loads(line))
            if len(lines) == given and not is_running:
                raise RuntimeError(f"the process with sanitizers ended: {self._log.read_text()[-2000:]}")
            given = len(lines)
            time.sleep(LOOK_EVERY)
        self._process.wait()


def check_kernels() -> None:
    """Load the kernels of this process, compiled if need be.

    Raises:
        RuntimeError: they cannot be, or are not under sanitizers.
    """
    from octavo.ops.attention.cpu import ATTENTION_KERNEL
    from octavo.ops.codec.cpu import CODEC_KERNEL
    from octavo.ops.linear.cpu import LINEAR_KERNEL

    for kernel in (ATTENTION_KERNEL, CODEC_KERNEL, LINEAR_KERNEL):
        if not kernel.load():
            raise RuntimeError(f"{kernel.name}: {kernel.failure}")
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line}
    libraries = [path for path in paths if path.name.startswith(("attention-", "codec-", "linear-"))]
    if not libraries or not all(b"__asan_report" in library.read_bytes() for library in libraries):
        raise RuntimeError("kernels are compiled without sanitizers: OCTAVO_CFLAGS has no effect")


def make_tries(numbers: Sequence[int], seed: int, folder: Path, save: Callable[[Result], None]) -> None:
    """Make tries in this process, which was started for it."""
    import torch

    from .pool import run_all
    from .trial import Room, drawn, run_try

    torch.set_num_threads(1)
    check_kernels()

    def work(number: int, scratch: Path, say: Callable[[str], None]) -> Result:
        return run_try(number, seed, Room(folder, scratch), say)

    for result in run_all(numbers, work, folder, 1, lambda number: drawn(number, seed)[0]):
        save(result)
