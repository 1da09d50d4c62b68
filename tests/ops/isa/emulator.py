"""Kernels of a processor that this machine does not have: compiled for it, run in an emulator, called from here.

    with emulated([ATTENTION_KERNEL], ISAS["armv8.2-a"], folder):
        ops.attention(...)      # runs in qemu

A call is the struct that Python packs, and the memory of the tensors that it points to. `Tensor.data_ptr` tells what is
a pointer: a number that lies in the memory of a tensor whose address was asked for. All of that memory goes to the
emulator and comes back, so that a test of an op is a test of the emulated kernel.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple

import numpy as np
import pytest
import torch

from octavo.ops.shared.compile import BASE_FLAGS, CKernel

HARNESS = Path(__file__).with_name("harness.c")
KEPT_BYTES = 1 << 28
"""Memory of tensors that is kept, so that no other tensor gets its address; the oldest goes first."""
FUNCTIONS_AT, MOST_FUNCTIONS = 0xFFDEADBEEF0000, 1000
"""The address that stands for the first function, which no memory has and no number that is worth a thought."""
_FLAGS = ("-O1", *(flag for flag in BASE_FLAGS if flag not in ("-O3", "-fPIC", "-shared")), "-fopenmp")
"""As the kernels of this machine are built, but for optimizations that take thrice as long to compile."""

_ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # emulated threads that spin take the time of the others


class Isa(NamedTuple):
    """Instructions to compile for.

    Attributes:
        flags: of the compiler.
        compiler: the command.
        runner: the command of the emulator; none where the machine itself runs it.
    """

    flags: tuple[str, ...]
    compiler: str = "aarch64-linux-gnu-gcc"
    runner: tuple[str, ...] = ("qemu-aarch64", "-cpu", "max")

    def missing(self) -> str | None:
        """Why it cannot be tried here, or None."""
        if self.runner and platform.machine() == "aarch64":
            return "this machine is the processor itself, on which all tests of ops run"
        lacking = [name for name in (self.compiler, *self.runner[:1]) if not shutil.which(name)]
        packages = "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
        return f"{' and '.join(lacking)} cannot be found ({packages})" if lacking else None


ISAS = {
    "armv8-a": Isa(("-march=armv8-a",)),
    "armv8.2-a": Isa(("-march=armv8.2-a+dotprod+fp16",)),
    "armv9-a": Isa(("-march=armv9-a+i8mm+bf16+fp16",)),
}
"""Raspberry Pi 4; Neoverse N1 and Apple M1; those with SVE2 and products of matrices of int8 and bfloat16."""


def compiled(kernels: Sequence[CKernel], isa: Isa, folder: Path) -> Path:
    """The harness with kernels in it, out of the folder or compiled into it."""
    functions = " ".join(f"FUNCTION({name})" for kernel in kernels for name in kernel.functions)
    command = [isa.compiler, *_FLAGS, *isa.flags]
    sources = {kernel.name: kernel.source() for kernel in kernels}
    sources["harness"] = f"#define FUNCTIONS {functions}\n{HARNESS.read_text()}"
    identity = "\0".join((_version_of(isa.compiler), *command, *sources.values()))
    program = folder / hashlib.sha256(identity.encode()).hexdigest()[:20]
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor() as pool:
            objects = [str(Path(scratch, f"{name}.o")) for name in sources]
            parts = [[*command, "-c", "-x", "c", "-", "-o", made] for made in objects]
            list(pool.map(_compile, parts, sources.values()))
            for kernel, made in zip(kernels, objects, strict=False):  # one may contain what is a function of another
                kept = [f"--keep-global-symbol={name}" for name in kernel.functions]
                subprocess.run([_program_of(isa.compiler, "objcopy"), *kept, made], check=True)
            whole = str(Path(scratch, "whole"))
            _compile([*command, "-static", "-o", whole, *objects, "-lm"], "")
            os.replace(whole, program)
    return program


def _program_of(compiler: str, name: str) -> str:
    """The program of a compiler's own binutils."""
    command = [compiler, f"-print-prog-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _compile(command: list[str], source: str) -> None:
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@cache
def _version_of(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


class Memory:
    """The memory of tensors whose addresses were asked for, kept so that no other tensor gets them."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[int, torch.UntypedStorage | bytes]] = {}
        self._kept_bytes = 0

    def note(self, address: int, size: int, owner: torch.UntypedStorage | bytes) -> None:
        """Remember what lies where, and forget the oldest if that is too much."""
        if size and address not in self._storages:
            self._storages[address] = size, owner
            self._kept_bytes += size
        while self._kept_bytes > KEPT_BYTES and len(self._storages) > 1:
            self._kept_bytes -= self._storages.pop(next(iter(self._storages)))[0]

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Ascending addresses, and the bytes behind each."""
        starts = np.array(sorted(self._storages), dtype=np.uint64)
        return starts, np.array([self._storages[int(start)][0] for start in starts], dtype=np.uint64)


class Parcel:
    """Packed arguments and all memory that they point to, directly or through other memory.

    Attributes:
        buffers: contents; the first is the packed arguments.
        starts: the address of each, 0 of the first.
        relocations: `[R, 4]` pointers: buffer and byte where each stands, buffer and byte where it points to.
    """

    def __init__(self, packed: bytes, memory: Memory) -> None:
        self.buffers, self.starts, self.relocations = [packed], [0], []
        starts, sizes = memory.spans()
        index_of: dict[int, int] = {}
        for index, content in enumerate(self.buffers):  # which grow meanwhile
            words = np.frombuffer(content, dtype=np.uint64, count=len(content) // 8)
            spans = np.searchsorted(starts, words, side="right") - 1
            offsets = words - starts[spans] if len(starts) else words
            is_pointer = (spans >= 0) & (offsets < sizes[spans]) if len(starts) else np.zeros(len(words), dtype=bool)
            for word in np.flatnonzero(is_pointer):
                start = int(starts[spans[word]])
                if start not in index_of:
                    index_of[start] = len(self.buffers)
                    self.buffers.append(ctypes.string_at(start, int(sizes[spans[word]])))
                    self.starts.append(start)
                self.relocations.append((index, int(word) * 8, index_of[start], int(offsets[word])))
            for word in np.flatnonzero((words >= FUNCTIONS_AT) & (words < FUNCTIONS_AT + MOST_FUNCTIONS)):
                self.relocations.append((index, int(word) * 8, -1, int(words[word]) - FUNCTIONS_AT))

    def message(self, function: int) -> bytes:
        """What the harness reads."""
        packed, *buffers = self.buffers
        head = (function, len(packed), len(buffers), len(self.relocations), *map(len, buffers))
        numbers = np.array([*head, *np.ravel(self.relocations)], dtype=np.int64)
        return b"".join((numbers.tobytes(), packed, *buffers))

    def take_back(self, answer: IO[bytes]) -> None:
        """Put what the harness leaves in the buffers into the memory that they are copies of."""
        for start, content in zip(self.starts[1:], self.buffers[1:], strict=True):
            ctypes.memmove(start, answer.read(len(content)), len(content))


class Emulated(NamedTuple):
    """A function of the harness, called as one of a library is."""

    process: subprocess.Popen
    memory: Memory
    index: int

    def __call__(self, packed: bytes) -> int:
        """What the function returns; the memory is as it leaves it."""
        parcel = Parcel(packed, self.memory)
        self.process.stdin.write(parcel.message(self.index))
        self.process.stdin.flush()
        returned = self.process.stdout.read(8)
        assert len(returned) == 8, f"the emulated kernel ended: {self.process.wait()}"
        parcel.take_back(self.process.stdout)
        return int.from_bytes(returned, "little", signed=True)


def _note_pointers(patch: pytest.MonkeyPatch, memory: Memory) -> None:
    """Let `memory` know of every tensor and every `bytes` whose address is asked for; functions get addresses too."""
    data_ptr, cast = torch.Tensor.data_ptr, ctypes.cast

    def noted_data_ptr(tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        memory.note(storage.data_ptr(), storage.nbytes(), storage)
        return data_ptr(tensor)

    def noted_cast(value: Any, kind: Any) -> Any:
        if isinstance(value, Emulated):
            return kind(FUNCTIONS_AT + value.index)
        found = cast(value, kind)
        if isinstance(value, ctypes.c_char_p) and isinstance(value._objects, bytes):
            memory.note(found.value, len(value._objects), value._objects)
        return found

    patch.setattr(torch.Tensor, "data_ptr", noted_data_ptr)
    patch.setattr(ctypes, "cast", noted_cast)


@contextmanager
def emulated(kernels: Sequence[CKernel], isa: Isa, folder: Path) -> Iterator[None]:
    """Inside, the functions of these kernels run in the emulator; the programs are kept in `folder`."""
    command, memory = [*isa.runner, str(compiled(kernels, isa, folder))], Memory()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_ENVIRONMENT)
    with process, pytest.MonkeyPatch.context() as patch:  # which closes its input, and waits
        _note_pointers(patch, memory)
        numbers = count()
        for kernel in kernels:
            loaded = {name: Emulated(process, memory, next(numbers)) for name in kernel.functions}
            patch.setattr(kernel, "_loaded", loaded)
        yield
