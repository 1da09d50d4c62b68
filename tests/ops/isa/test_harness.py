"""The emulator itself: pointers go along, through other memory too, and what a kernel breaks is seen."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from octavo.ops.shared.compile import CKernel

from .emulator import ISAS, Isa, emulated

SOURCE = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct { float *x; int64_t count; } Vector;
typedef struct { Vector *vectors; int64_t count; } Vectors;

int doubled(const Vectors *arguments) {
    for (int64_t v = 0; v < arguments->count; v++)
        for (int64_t i = 0; i < arguments->vectors[v].count; i++) arguments->vectors[v].x[i] *= 2;
    return 7;
}
"""
HERE = Isa(("-O1",), "cc", ())


@pytest.fixture(params=["here", "armv8-a"])
def doubled(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """`doubled(vectors, count)`: doubles so many elements of each of some tensors."""
    isa = HERE if request.param == "here" else ISAS[request.param]
    if isa.missing():
        pytest.skip(isa.missing())
    kernel = CKernel.__new__(CKernel)  # which no process compiles with the others
    kernel.name, kernel.functions, kernel._loaded = "doubled", ("doubled",), None
    monkeypatch.setattr(kernel, "source", lambda: SOURCE)
    with emulated([kernel], isa, tmp_path):

        def run(vectors: list[torch.Tensor], count: int) -> int:
            table = torch.tensor([number for x in vectors for number in (x.data_ptr(), count)])
            call = torch.tensor([table.data_ptr(), len(vectors)])
            return kernel._loaded["doubled"](call.numpy().tobytes())

        yield run


def test_pointers_in_memory_that_is_pointed_to_are_followed(doubled: Callable) -> None:
    storage = torch.arange(100.0)
    assert doubled([storage[10:], storage[50:]], 20) == 7
    expected = torch.arange(100.0)
    expected[10:30] *= 2
    expected[50:70] *= 2
    assert torch.equal(storage, expected)


def test_a_kernel_that_writes_behind_a_tensor_is_found(doubled: Callable) -> None:
    with pytest.raises(AssertionError, match="the emulated kernel ended"):
        doubled([torch.ones(64)], 65)
