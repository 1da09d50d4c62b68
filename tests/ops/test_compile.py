"""How the C kernels come to be: compiled once, by anybody at the same time, or not at all and then not in silence."""

import os
import subprocess
import sys
from pathlib import Path

ENCODE = """
import warnings
warnings.simplefilter("always")
import torch
from octavo import ops

codes = torch.zeros((1, 1, 2, 16), dtype=torch.int8)
ops.encode(torch.full((1, 1, 2, 16), 3.0), torch.ones(1, 1, 1), None, codes)
assert codes.eq(3).all()
"""
REPORT = ENCODE + "print(ops.report())"


def start(cache: Path, program: str = REPORT, **environment: str) -> subprocess.Popen[str]:
    """A process of its own, with a cache of kernels of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "OCTAVO_CACHE": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def unwritable(folder: Path) -> Path:
    """A cache folder that nobody can make, root neither: its parent is a file."""
    file = folder / "a file"
    file.write_text("")
    return file / "cache"


def cpu_lines(report: str) -> list[str]:
    return [line for line in report.splitlines() if line.split()[1:2] == ["CPU"]]


def test_without_a_compiler_the_references_serve_and_one_warning_says_so(tmp_path: Path) -> None:
    output, errors = start(tmp_path, CC="/no/such/compiler").communicate()
    warning_lines = [line for line in errors.splitlines() if "octavo:" in line]
    assert len(warning_lines) == 1
    for word in ("references run instead", "slower", "install gcc or clang", "/no/such/compiler"):
        assert word in warning_lines[0]
    assert cpu_lines(output)
    assert all("reference (PyTorch): " in line for line in cpu_lines(output))


def test_the_first_error_of_a_failing_compiler_is_shown(tmp_path: Path) -> None:
    compiler = tmp_path / "my cc"
    compiler.write_text('#!/bin/sh\necho "x.c:1:2: error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    _, errors = start(tmp_path / "cache", CC=f"'{compiler}'").communicate()
    assert errors.count("octavo:") == 1
    assert "x.c:1:2: error: no such thing" in errors


def test_where_the_cache_cannot_be_written_the_temporary_folder_serves(tmp_path: Path) -> None:
    cache = unwritable(tmp_path)
    (tmp_path / "temporary").mkdir()
    output, errors = start(cache, TMPDIR=str(tmp_path / "temporary")).communicate()
    assert "octavo:" not in errors
    assert all("C kernel" in line for line in cpu_lines(output))
    (folder,) = (tmp_path / "temporary").iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert list(folder.glob("codec-*.so"))


def test_a_library_that_another_user_could_have_put_there_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / f"octavo-kernels-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    _, errors = start(unwritable(tmp_path), TMPDIR=str(tmp_path)).communicate()
    assert "cannot write" in errors
    assert not list(folder.iterdir())


def test_a_cache_that_can_be_read_only_serves_what_it_holds(tmp_path: Path) -> None:
    assert start(tmp_path, ENCODE).wait() == 0
    tmp_path.chmod(0o500)
    written = sorted(tmp_path.iterdir())
    _, errors = start(tmp_path, ENCODE).communicate()
    tmp_path.chmod(0o700)
    assert errors == ""
    assert sorted(tmp_path.iterdir()) == written


NOWHERE_TEMPORARY = """
import tempfile
def gettempdir():
    raise FileNotFoundError(2, "No usable temporary directory found")
tempfile.gettempdir = gettempdir
"""


def test_without_a_temporary_folder_the_cache_serves(tmp_path: Path) -> None:
    output, errors = start(tmp_path, NOWHERE_TEMPORARY + REPORT, TMPDIR="/no/such/folder").communicate()
    assert errors == ""
    assert all("C kernel" in line for line in cpu_lines(output))
    assert len(list(tmp_path.iterdir())) == 3


HOMELESS = """
import os, pwd
def getpwuid(user):
    raise KeyError(user)
pwd.getpwuid = getpwuid
del os.environ["HOME"], os.environ["OCTAVO_CACHE"]
"""


def test_without_a_home_the_temporary_folder_serves(tmp_path: Path) -> None:
    program = HOMELESS + "from octavo.ops.compile import cache_folders; print(*cache_folders())"
    output, _ = start(tmp_path, program, TMPDIR=str(tmp_path), HOME=str(tmp_path)).communicate()
    assert output.strip() == str(tmp_path / f"octavo-kernels-{os.getuid()}")


def test_without_any_folder_the_references_serve(tmp_path: Path) -> None:
    output, errors = start(tmp_path, NOWHERE_TEMPORARY + HOMELESS + REPORT, HOME=str(tmp_path)).communicate()
    assert errors.count("octavo:") == 1 and "set OCTAVO_CACHE" in errors
    assert all("reference (PyTorch)" in line for line in cpu_lines(output))


def test_the_reference_can_be_asked_for(tmp_path: Path) -> None:
    output, errors = start(tmp_path, OCTAVO_KERNELS="reference").communicate()
    assert "octavo:" not in errors
    assert all("OCTAVO_KERNELS=reference" in line for line in cpu_lines(output))
    assert not list(tmp_path.iterdir())


def test_nothing_is_compiled_before_an_op_is_called(tmp_path: Path) -> None:
    environment = {**os.environ, "OCTAVO_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import octavo.ops"], env=environment, check=True)
    assert not list(tmp_path.iterdir())


def test_processes_that_compile_at_once_share_one_result(tmp_path: Path) -> None:
    processes = [start(tmp_path, ENCODE) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
    libraries = sorted(tmp_path.iterdir())
    assert [library.name.rsplit("-", 1)[0] for library in libraries] == ["attention", "codec", "linear"]
    written = [library.stat().st_mtime_ns for library in libraries]
    assert start(tmp_path, ENCODE).wait() == 0
    assert [library.stat().st_mtime_ns for library in libraries] == written
