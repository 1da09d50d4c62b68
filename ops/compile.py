"""C sources to callable kernels: compiled on first use, kept in a per-user cache, loaded with ctypes.

Environment variables:
    OCTAVO_KERNELS=reference   compile nothing; the references serve.
    OCTAVO_CACHE=DIR           where compiled kernels are kept, instead of `~/.cache/octavo/kernels`; where that cannot
                               be written, a folder of the user's own under the system's temporary one serves.
    CC=COMMAND                 the C compiler, instead of the first of cc, gcc and clang.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .resources import resource

BASE_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi")
TUNING = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
"""Optional flags, the best first; a compiler that refuses one gets the next. Without OpenMP there is one thread."""

_COMPILE_LOCK = threading.Lock()
_ALL_KERNELS: "list[CKernel]" = []
_WARNED: set[str] = set()


class CompileError(Exception):
    """No compiler, or one that fails; the message is one line."""


def find_compiler() -> list[str]:
    """The command of the C compiler: $CC, or the first of cc, gcc and clang."""
    chosen = os.environ.get("CC")
    for candidate in [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if candidate and shutil.which(candidate[0]):
            return candidate
    raise CompileError(
        f"CC={chosen} is not an executable" if chosen else "no C compiler (cc, gcc or clang) is installed"
    )


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def cache_folders() -> list[Path]:
    """Where compiled kernels are looked for, and kept in the first that can be written."""
    chosen = os.environ.get("OCTAVO_CACHE")
    folders = [Path(chosen)] if chosen else []
    if not chosen:
        with contextlib.suppress(RuntimeError):  # a user without a home
            folders.append(Path("~/.cache/octavo/kernels").expanduser())
    temporary = _temporary_folder()
    return folders if temporary is None else [*folders, temporary / f"octavo-kernels-{_user()}"]


def _temporary_folder() -> Path | None:
    """The system's temporary folder; None where no such folder can be written."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def _scratch_in(folder: Path) -> tempfile.TemporaryDirectory:
    """A new directory in a cache folder, which is made if missing.

    Raises:
        OSError: it cannot be written, or somebody else can write it too and could put a library of theirs there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    return tempfile.TemporaryDirectory(dir=folder, prefix=".")


def _check_owner(folder: Path) -> None:
    """Raise OSError for a folder under the temporary one, a name that anybody can take, that is not ours alone."""
    if folder.parent == _temporary_folder() and hasattr(os, "getuid"):
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != _user() or state.st_mode & 0o022:
            raise OSError(errno.EPERM, "belongs to somebody else", str(folder))


def _cpu_model() -> str:
    """What -march=native depends on: the model and the features of the first core."""
    try:
        first_core = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return platform.processor()
    kept = ("model", "flags", "Features", "CPU")  # not the clock, which changes from one reading to the next
    return "\n".join(line for line in first_core.splitlines() if line.startswith(kept))


def _run(command: list[str], temporary: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler, which keeps what it needs for a moment in `temporary`, or else where the system says."""
    environment = None if temporary is None else {**os.environ, "TMPDIR": str(temporary)}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, env=environment
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{command[0]}: {error}") from None


def compile_shared(name: str, source: str) -> Path:
    """Path of the shared library of a C source, out of the cache or compiled now.

    Safe beside other processes that do the same: each compiles into a file of its own and moves it into place at once.
    """
    compiler = find_compiler()
    version = _run([*compiler, "--version"]).stdout
    identity = "\0".join((source, *compiler, version, *BASE_FLAGS, repr(TUNING), platform.machine(), _cpu_model()))
    file_name = f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.so"
    unwritable = ""
    for folder in cache_folders():
        try:
            if (folder / file_name).is_file():
                _check_owner(folder)
                return folder / file_name
            scratch = _scratch_in(folder)
        except OSError as error:
            unwritable = unwritable or f"cannot write {folder}: {error.strerror}"
            continue
        with scratch:
            built = _built(compiler, source, Path(scratch.name) / file_name)
            return built.replace(folder / file_name)
    raise CompileError(unwritable or "there is no home and no temporary folder to compile in; set OCTAVO_CACHE")


def _built(compiler: list[str], source: str, library: Path) -> Path:
    """The library, compiled with the best flags that the compiler takes from its source, which is put beside it."""
    file = library.with_suffix(".c")
    file.write_text(source, encoding="utf-8")
    first_error = ""
    for tuning in TUNING:
        result = _run([*compiler, *BASE_FLAGS, *tuning, "-o", str(library), str(file), "-lm"], library.parent)
        if result.returncode == 0:
            return library
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        first_error = first_error or (lines[0].strip() if lines else f"exit status {result.returncode}")
    raise CompileError(f"{shlex.join(compiler)} failed: {first_error}")


def _compile_all() -> None:
    """Compile every kernel that is not in the cache, each in a process of its own at the same time.

    A model needs them all, and one after the other they would take twice as long. What fails says so when it is loaded.
    """

    def compile_one(kernel: "CKernel") -> None:
        with contextlib.suppress(CompileError, OSError):
            compile_shared(kernel.name, kernel.source())

    with ThreadPoolExecutor(len(_ALL_KERNELS)) as pool:
        list(pool.map(compile_one, _ALL_KERNELS))


class CKernel:
    """The functions of one C source, compiled when one of any kernel is first asked for, all kernels at the same time.

    Args:
        name: of the kernel, in warnings and in the cache.
        sources: names of the resources that make up the source, in order.
        functions: names of the exported functions; each takes one pointer to packed arguments and returns an int.
    """

    def __init__(self, name: str, sources: tuple[str, ...], functions: tuple[str, ...]) -> None:
        self.name = name
        self.sources = sources
        self.functions = functions
        self.failure: str | None = None
        self._loaded: dict[str, Callable[[bytes], int]] | None = None
        _ALL_KERNELS.append(self)

    def source(self) -> str:
        """The C source, one file."""
        return "\n".join(f'#line 1 "{name}"\n{resource(name)}' for name in self.sources)

    def load(self) -> dict[str, Callable[[bytes], int]]:
        """The functions by name; empty if the reference has to serve, of which the first call warns."""
        if self._loaded is None:
            with _COMPILE_LOCK:
                if self._loaded is None:
                    self._loaded = self._build()
        return self._loaded

    def _build(self) -> dict[str, Callable[[bytes], int]]:
        if os.environ.get("OCTAVO_KERNELS") == "reference":
            self.failure = "OCTAVO_KERNELS=reference"
            return {}
        try:
            _compile_all()
            library = ctypes.CDLL(str(compile_shared(self.name, self.source())))
        except (CompileError, OSError) as error:
            self.failure = str(error)
            if self.failure not in _WARNED:
                _WARNED.add(self.failure)
                warnings.warn(
                    "octavo: the C kernels of the CPU could not be built and the PyTorch references run instead, "
                    f"slower; install gcc or clang, or set CC ({self.failure})",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return {}
        loaded = {}
        for function in self.functions:
            entry = getattr(library, function)
            entry.argtypes, entry.restype = [ctypes.c_char_p], ctypes.c_int
            loaded[function] = entry
        return loaded

    def description(self) -> str:
        """What serves on the CPU, for `ops.report()`; builds the kernel to know."""
        return "C kernel" if self.load() else f"reference (PyTorch): {self.failure}"
