"""C sources to callable kernels: compiled on first use, kept in a per-user cache, loaded with ctypes.

Environment variables:
    OCTAVO_KERNELS=reference   compile nothing; the references serve. (`strict`: see fallback.py.)
    OCTAVO_CACHE=DIR           where compiled kernels are kept, instead of `~/.cache/octavo/kernels`; where that cannot
                               be written, or others than the user and root can write it, a folder of the user's own
                               under the system's temporary one serves.
    CC=COMMAND                 the C compiler, instead of the first of cc, gcc and clang.
    OCTAVO_ISA=NAME            the instructions that kernels may use: native (this machine's, and what is taken where
                               nothing is said), avx2 or generic; see instruction_set.py.
    OCTAVO_CFLAGS=FLAGS        more flags for it, behind those below; kernels of other flags are other files. With
                               sanitizers, whose libraries must be in the process before Python is, both of them:

        OCTAVO_CFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
        LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0 python ...
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .fallback import announced
from .instruction_set import ISA_FLAGS, chosen_isa
from .private_cache import (
    ForeignFolder,
    cache_folders,
    discard_library,
    find_library,
    keep_library,
    new_scratch,
    private_folder,
)
from .resources import resource

BASE_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi")
OPENMP = "-fopenmp"
"""A compiler that refuses it gets no such flag, and there is one thread."""

_COMPILE_LOCK = threading.Lock()
_ALL_KERNELS: "list[CKernel]" = []
_WARNING_LOCK = threading.Lock()
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
    environment = {**os.environ, "LC_ALL": "C", **({} if temporary is None else {"TMPDIR": str(temporary)})}
    mask = {"umask": 0o077} if os.name == "posix" else {}  # with the user's own, files might not be readable
    try:
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, env=environment, **mask
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{command[0]}: {error}") from None


@functools.cache
def _version_of(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"]).stdout


def _more_flags() -> list[str]:
    return shlex.split(os.environ.get("OCTAVO_CFLAGS", ""))


def _tunings() -> list[tuple[str, ...]]:
    """Flags to try, the best first; a compiler that refuses some gets the next.

    A machine's own instructions can be done without, but not the set that somebody names.

    Raises:
        ValueError: OCTAVO_ISA names none that there is.
    """
    isa = chosen_isa()
    sets = [ISA_FLAGS[isa]] if isa != "native" else [ISA_FLAGS[isa], ()]
    return [(*flags, *openmp) for openmp in ((OPENMP,), ()) for flags in sets]


def _stem_of(name: str, source: str, compiler: list[str]) -> str:
    """The name of a kernel in the cache: what it is compiled from, by what and for what."""
    version = _version_of(tuple(compiler))
    flags = (*BASE_FLAGS, repr(_tunings()), *_more_flags())
    identity = "\0".join((source, *compiler, version, *flags, platform.machine(), _cpu_model()))
    return f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}"


def _private_folders(problems: list[str]) -> list[Path]:
    """The cache folders that can be trusted; of the others, what is wrong is added to `problems`."""
    folders = []
    for folder in cache_folders():
        try:
            folders.append(private_folder(folder))
        except ForeignFolder as error:
            problems.append(f"cannot write {folder}: {error.strerror}")
            _warn_once(
                f"compiled kernels are not kept in {folder}, since {error.strerror}; set OCTAVO_CACHE to a folder of "
                "your own"
            )
        except OSError as error:
            problems.append(f"cannot write {folder}: {error.strerror}")
    return folders


def compile_shared(name: str, source: str, refused: Path | None = None) -> Path:
    """Path of the shared library of a C source, out of the cache or compiled now.

    Safe beside other processes that do the same: each compiles into a file of its own and moves it into place at once.

    Args:
        refused: a library of the cache that is of no use.

    Raises:
        CompileError: no compiler, one that fails, or no folder that can be written.
    """
    compiler, problems = find_compiler(), []
    stem, folders = _stem_of(name, source, compiler), _private_folders(problems)
    for folder in folders:
        found = find_library(folder, stem)
        if found not in (None, refused):
            return found
    for folder in folders:
        try:
            with new_scratch(folder) as scratch:
                return keep_library(_built(compiler, source, Path(scratch) / f"{name}.so"), folder, stem)
        except OSError as error:
            problems.append(f"cannot write {folder}: {error.strerror}")
    raise CompileError((*problems, "there is no home and no temporary folder to compile in; set OCTAVO_CACHE")[0])


def _built(compiler: list[str], source: str, library: Path) -> Path:
    """The library, compiled with the best flags that the compiler takes from its source, which is put beside it.

    Raises:
        OSError: there is no room for it.
        CompileError: the compiler fails.
    """
    file = library.with_suffix(".c")
    file.write_text(source, encoding="utf-8")
    first_error = ""
    for tuning in _tunings():
        command = [*compiler, *BASE_FLAGS, *tuning, *_more_flags(), "-o", str(library), str(file), "-lm"]
        result = _run(command, library.parent)
        if result.returncode == 0:
            return library
        for code in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(code) in result.stderr:
                raise OSError(code, os.strerror(code), str(library.parent))
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        first_error = first_error or (lines[0].strip() if lines else f"exit status {result.returncode}")
    raise CompileError(f"{shlex.join(compiler)} failed: {first_error}")


def _warn_once(text: str) -> None:
    with _WARNING_LOCK:
        if text in _WARNED:
            return
        _WARNED.add(text)
    warnings.warn(f"octavo: {text}", RuntimeWarning, stacklevel=2)


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
        declarations: C source that follows the first resource: what Python says of the packed arguments.
    """

    def __init__(self, name: str, sources: tuple[str, ...], functions: tuple[str, ...], declarations: str = "") -> None:
        self.name = name
        self.sources = sources
        self.declarations = declarations
        self.functions = functions
        self.failure: str | None = None
        self.isa = "native"
        self._loaded: dict[str, Callable[[bytes], int]] | None = None
        _ALL_KERNELS.append(self)

    def source(self) -> str:
        """The C source, one file."""
        texts = [f'#line 1 "{name}"\n{resource(name)}' for name in self.sources]
        return "\n".join((texts[0], f'#line 1 "declarations of {self.name}"\n{self.declarations}', *texts[1:]))

    def load(self) -> dict[str, Callable[[bytes], int]]:
        """The functions by name; empty if the reference has to serve, of which the first call warns."""
        if self._loaded is None:
            with _COMPILE_LOCK:
                if self._loaded is None:
                    self._loaded = self._build()
        return self._loaded

    def supports(self) -> str | None:
        """None, or why the reference has to serve all calls, which `load` has warned of already."""
        return None if self.load() else self.failure

    def _build(self) -> dict[str, Callable[[bytes], int]]:
        if os.environ.get("OCTAVO_KERNELS") == "reference":
            self.failure = "OCTAVO_KERNELS=reference"
            announced(self.failure)
            return {}
        self.isa = chosen_isa()
        try:
            return self._opened()
        except (CompileError, OSError, AttributeError) as error:
            self.failure = str(error)
            announced(self.failure)
            _warn_once(
                "the C kernels of the CPU could not be built and the PyTorch references run instead, "
                f"slower; install gcc or clang, or set CC ({self.failure})"
            )
            return {}

    def _opened(self) -> dict[str, Callable[[bytes], int]]:
        """The functions of the library; one that cannot be loaded, of another system perhaps, is compiled again."""
        _compile_all()
        library = compile_shared(self.name, self.source())
        try:
            return self._functions_of(library)
        except (OSError, AttributeError):
            discard_library(library)
        return self._functions_of(compile_shared(self.name, self.source(), refused=library))

    def _functions_of(self, path: Path) -> dict[str, Callable[[bytes], int]]:
        library, loaded = ctypes.CDLL(str(path)), {}
        for function in self.functions:
            entry = getattr(library, function)
            entry.argtypes, entry.restype = [ctypes.c_char_p], ctypes.c_int
            loaded[function] = entry
        return loaded

    def description(self) -> str:
        """What serves on the CPU, for `ops.report()`; builds the kernel to know."""
        if not self.load():
            return f"reference (PyTorch): {self.failure}"
        return "C kernel" if self.isa == "native" else f"C kernel (OCTAVO_ISA={self.isa})"
