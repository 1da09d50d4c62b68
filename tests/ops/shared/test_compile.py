"""How the C kernels come to be: compiled once, by anybody at the same time, or not at all and then not in silence."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.ops.shared import private_cache
from octavo.ops.shared.compile import compile_shared

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
    """A process of its own, with a cache of kernels of its own, which are compiled quickly and run slowly."""
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "OCTAVO_CACHE": str(cache), "OCTAVO_CFLAGS": "-O0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """What a process prints that ends well and without a word of warning."""
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    return output


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the kernels in it; not to be changed."""
    cache = tmp_path_factory.mktemp("compiled")
    output_of(start(cache, ENCODE))
    return cache


def copy_of(compiled: Path, folder: Path) -> Path:
    """A copy of a cache in a new folder, as a cache has to be."""
    shutil.copytree(compiled, folder)
    folder.chmod(0o700)
    return folder


def library_in(cache: Path, name: str = "codec") -> Path:
    (library,) = cache.glob(f"{name}-*.so")
    return library


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


def test_the_temporary_folder_of_another_user_is_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / f"octavo-kernels-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    _, errors = start(unwritable(tmp_path), TMPDIR=str(tmp_path)).communicate()
    assert "cannot write" in errors
    assert not list(folder.iterdir())


def test_a_cache_that_can_be_read_only_serves_what_it_holds(tmp_path: Path, compiled: Path) -> None:
    cache = copy_of(compiled, tmp_path / "cache")
    cache.chmod(0o500)
    written = sorted(cache.iterdir())
    output_of(start(cache, ENCODE))
    assert sorted(cache.iterdir()) == written


def test_a_relative_cache_is_one_of_the_working_directory(
    tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of(compiled, tmp_path / "cache"))
    output_of(start(Path("."), ENCODE))
    assert sorted(file.name for file in Path(".").iterdir()) == sorted(file.name for file in compiled.iterdir())


def planted(folder: Path, library: Path) -> Path:
    """Put a library that is not ours in the place of ours, as if it were whole; returns the file that it makes."""
    mark, source = folder / "was here", folder / "planted.c"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void run(void) { "
        f'fclose(fopen("{mark}", "w")); }}\nint encode(void *a) {{ return 0; }}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / "planted.so"), str(source)], check=True)
    stem = library.stem.rsplit("-", 1)[0]
    library.unlink()
    private_cache.keep_library(folder / "planted.so", library.parent, stem)
    return mark


def foreign_folder(library: Path) -> None:
    library.parent.chmod(0o777)


def foreign_parent(library: Path) -> None:
    library.parent.parent.chmod(0o777)


def foreign_file(library: Path) -> None:
    library.chmod(0o666)


def other_digest(library: Path) -> None:
    library.rename(library.with_stem(library.stem[:-20] + "0" * 20))


def other_owner(library: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(library, 12345, -1)


def other_owner_of_parent(library: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    os.chown(library.parent.parent, 12345, -1)


@pytest.mark.parametrize(
    ("spoil", "is_kept_elsewhere"),
    [
        (foreign_folder, True),
        (foreign_parent, True),
        (other_owner_of_parent, True),
        (foreign_file, False),
        (other_owner, False),
        (other_digest, False),
    ],
)
def test_a_library_that_somebody_else_could_have_planted_is_not_loaded(
    tmp_path: Path, compiled: Path, spoil: Callable[[Path], None], is_kept_elsewhere: bool
) -> None:
    (tmp_path / "home").mkdir()
    cache = copy_of(compiled, tmp_path / "home" / "cache")
    mark = planted(tmp_path, library_in(cache))
    spoil(library_in(cache))
    (tmp_path / "temporary").mkdir()
    if is_kept_elsewhere:
        copy_of(compiled, tmp_path / "temporary" / f"octavo-kernels-{os.geteuid()}")
    output, errors = start(cache, TMPDIR=str(tmp_path / "temporary")).communicate()
    assert not mark.exists()
    assert all("C kernel" in line for line in cpu_lines(output))
    if is_kept_elsewhere:
        assert errors.count("octavo:") == 1 and "set OCTAVO_CACHE" in errors and str(cache) in errors
    else:
        assert errors == ""


def test_a_planted_library_would_show(tmp_path: Path, compiled: Path) -> None:
    cache = copy_of(compiled, tmp_path / "cache")
    mark = planted(tmp_path, library_in(cache))
    start(cache, ENCODE).communicate()
    assert mark.exists()


def test_a_parent_in_which_nobody_can_rename_what_is_not_theirs_is_trusted(tmp_path: Path, compiled: Path) -> None:
    cache = copy_of(compiled, tmp_path / "cache")
    tmp_path.chmod(0o1777)
    output_of(start(cache, ENCODE))
    assert len(list(cache.iterdir())) == 3


def cut_short(library: Path) -> None:
    os.truncate(library, 5000)


def emptied(library: Path) -> None:
    os.truncate(library, 0)


def not_loadable(library: Path) -> None:
    text = library.with_name("text")
    text.write_text("no library")
    stem = library.stem.rsplit("-", 1)[0]
    library.unlink()
    private_cache.keep_library(text, library.parent, stem)


@pytest.mark.parametrize("spoil", [cut_short, emptied, not_loadable])
def test_a_broken_library_is_compiled_again_without_a_word(
    tmp_path: Path, compiled: Path, spoil: Callable[[Path], None]
) -> None:
    cache = copy_of(compiled, tmp_path / "cache")
    spoil(library_in(cache))
    output_of(start(cache, ENCODE))
    assert library_in(cache).read_bytes() == library_in(compiled).read_bytes()


SOURCE = """
#ifndef ANSWER
#define ANSWER 42
#endif
__attribute__((visibility("default"))) int answer(void *arguments) { return ANSWER; }
"""


def answer_of(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer(None)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_folder_and_files_are_the_users_alone_under_any_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    cache = tmp_path / "new" / "cache"
    monkeypatch.setenv("OCTAVO_CACHE", str(cache))
    before = os.umask(umask)
    try:
        library = compile_shared("tiny", SOURCE)
    finally:
        os.umask(before)
    assert library.parent == cache and answer_of(library) == 42
    assert [path.stat().st_mode & 0o777 for path in (cache.parent, cache, library)] == [0o700, 0o700, 0o600]


def test_where_the_disk_is_full_the_temporary_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *"/full/"*) echo "x.s: fatal error: No space left on device" >&2; exit 1;; esac\n'
        'exec cc "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library = compile_shared("tiny", SOURCE)
    assert library.parent == tmp_path / f"octavo-kernels-{os.geteuid()}" and answer_of(library) == 42
    assert not list((tmp_path / "full").iterdir())


def test_a_file_in_the_place_of_the_cache_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert answer_of(compile_shared("tiny", SOURCE)) == 42
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_another_folder_is_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is where the folder lies, and the library is loaded from there."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "link"))
    assert compile_shared("tiny", SOURCE).parent == tmp_path / "real"


def test_kernels_of_other_flags_are_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    for answer in (1, 2):
        monkeypatch.setenv("OCTAVO_CFLAGS", f"-DANSWER={answer}")
        assert answer_of(compile_shared("tiny", SOURCE)) == answer


NOWHERE_TEMPORARY = """
import tempfile
def gettempdir():
    raise FileNotFoundError(2, "No usable temporary directory found")
tempfile.gettempdir = gettempdir
"""


def test_without_a_temporary_folder_the_cache_serves(tmp_path: Path) -> None:
    output = output_of(start(tmp_path, NOWHERE_TEMPORARY + REPORT, TMPDIR="/no/such/folder"))
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
    program = HOMELESS + "from octavo.ops.shared.compile import cache_folders; print(*cache_folders())"
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
        output_of(process)
    libraries = sorted(tmp_path.iterdir())
    assert [library.name.split("-")[0] for library in libraries] == ["attention", "codec", "linear"]
    written = [library.stat().st_mtime_ns for library in libraries]
    output_of(start(tmp_path, ENCODE))
    assert [library.stat().st_mtime_ns for library in libraries] == written
