"""300 tries of the campaign, and whether it would see what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..support import REPOSITORY
from .sanitized import FLAGS, environment_of, sanitizer_libraries
from .trial import drawn

TRIES = 300
WRITES_OUTSIDE = "int fill(char *codes) { int last = 2147483647; codes[-1] = 0; return last + codes[0]; }"
OVERFLOWS = "int fill(char *codes) { int last = 2147483647; codes[0] = 1; return last + codes[0]; }"
CALL = "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); c = ctypes.CDLL(None); c.malloc.restype = ctypes.c_void_p\n"
CALL += "lib.fill(ctypes.c_void_p(c.malloc(64)))"


@pytest.mark.slow
def test_no_try_fails() -> None:
    command = [sys.executable, "-m", "tests.campaign", "--tries", str(TRIES), "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:] + done.stdout
    assert done.stdout.splitlines()[-2].split()[-1] == str(TRIES) or "left out" in done.stdout


def test_a_try_follows_from_its_seed_and_number() -> None:
    assert [drawn(number, 7)[0] for number in range(50)] == [drawn(number, 7)[0] for number in range(50)]
    assert drawn(3, 7)[1].random() == drawn(3, 7)[1].random() != drawn(3, 8)[1].random()


@pytest.mark.parametrize(("source", "report"), [(WRITES_OUTSIDE, "heap-buffer-overflow"), (OVERFLOWS, "overflow")])
def test_the_sanitizers_see_what_a_kernel_does_wrong(source: str, report: str, tmp_path: Path) -> None:
    libraries, reason = sanitizer_libraries()
    if reason:
        pytest.skip(f"no sanitizers: {reason}")
    (tmp_path / "kernel.c").write_text(source)
    compiled = ["gcc", *FLAGS.split(), "-shared", "-fPIC", "-o", "kernel.so", "kernel.c"]
    subprocess.run(compiled, cwd=tmp_path, check=True)
    environment = {**os.environ, **environment_of(libraries)}
    command = [sys.executable, "-c", CALL, str(tmp_path / "kernel.so")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and report in done.stderr, done.stderr
