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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pytest
import torch

from octavo.ops.shared.compile import BASE_FLAGS, CKernel

HARNESS = Path(__file__).with_name("harness.c")
KEPT_BYTES = 1 << 28
"""Memory of tensors that is kept, so that no other tensor gets its address; the oldest goes first."""
_FLAGS = ("-O2", *(flag for flag in BASE_FLAGS if flag not in ("-O3", "-fPIC", "-shared")), "-static", "-fopenmp")
"""As the kernels of this machine are built, but for an optimization that takes twice as long to compile."""

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


def compiled(kernel: CKernel, isa: Isa, folder: Path) -> Path:
    """The harness with a kernel in it, out of the folder or compiled into it."""
    functions = " ".join(f"FUNCTION({name})" for name in kernel.functions)
    source = f'{kernel.source()}\n#define FUNCTIONS {functions}\n#line 1 "harness.c"\n{HARNESS.read_text()}'
    command = [isa.compiler, *_FLAGS, *isa.flags, "-x", "c", "-", "-lm"]
    version = _version_of(isa.compiler)
    digest = hashlib.sha256("\0".join((source, version, *command)).encode()).hexdigest()[:20]
    program = folder / f"{kernel.name}-{digest}"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = program.with_suffix(".new")
        done = subprocess.run([*command, "-o", str(unfinished)], input=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.rename(program)
    return program


@cache
def _version_of(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


class Memory:
    """The memory of tensors whose addresses were asked for, kept so that no other tensor gets them."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._kept_bytes = 0

    def note(self, tensor: torch.Tensor) -> None:
        """Remember where the memory of a tensor lies, and forget the oldest if that is too much."""
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self._storages:
            self._storages[storage.data_ptr()] = storage
            self._kept_bytes += storage.nbytes()
        while self._kept_bytes > KEPT_BYTES and len(self._storages) > 1:
            self._kept_bytes -= self._storages.pop(next(iter(self._storages))).nbytes()

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Ascending addresses, and the bytes behind each."""
        starts = np.array(sorted(self._storages), dtype=np.uint64)
        return starts, np.array([self._storages[int(start)].nbytes() for start in starts], dtype=np.uint64)


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


def _called(process: subprocess.Popen, memory: Memory, function: int, packed: bytes) -> int:
    """What a function of the harness returns."""
    parcel = Parcel(packed, memory)
    process.stdin.write(parcel.message(function))
    process.stdin.flush()
    returned = process.stdout.read(8)
    assert len(returned) == 8, f"the emulated kernel ended: {process.wait()}"
    parcel.take_back(process.stdout)
    return int.from_bytes(returned, "little", signed=True)


@contextmanager
def emulated(kernels: Iterable[CKernel], isa: Isa, folder: Path) -> Iterator[None]:
    """Inside, the functions of these kernels run in the emulator; the programs are kept in `folder`."""
    memory, ask = Memory(), torch.Tensor.data_ptr
    with pytest.MonkeyPatch.context() as patch, ExitStack() as processes:

        def noted_data_ptr(tensor: torch.Tensor) -> int:
            memory.note(tensor)
            return ask(tensor)

        patch.setattr(torch.Tensor, "data_ptr", noted_data_ptr)
        for kernel in kernels:
            command = [*isa.runner, str(compiled(kernel, isa, folder))]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_ENVIRONMENT)
            processes.enter_context(process)  # which closes its input and waits
            functions = enumerate(kernel.functions)
            patch.setattr(kernel, "_loaded", {name: partial(_called, process, memory, i) for i, name in functions})
        yield
