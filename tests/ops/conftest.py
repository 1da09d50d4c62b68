"""Fixtures of the tests of ops: memory that nobody wrote is poisoned, and kernels are built in more than one way."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from octavo.ops.attention.cpu import ATTENTION_KERNEL
from octavo.ops.codec.cpu import CODEC_KERNEL
from octavo.ops.linear.cpu import LINEAR_KERNEL
from octavo.ops.shared.instruction_set import ISA_FLAGS, chosen_isa, cpu_flags

from .npu_double import TorchNpu, installed_double

CPU_KERNELS = (ATTENTION_KERNEL, CODEC_KERNEL, LINEAR_KERNEL)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, with NaN or the largest number in every element that it leaves unwritten."""

    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))  # Inductor allocates some that take gradients
        elif tensor.dtype != torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """An op that returns memory it did not write fails its test, also where that memory happens to be 0."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> TorchNpu:
    """The double of torch_npu, which records what it is called with."""
    return installed_double(monkeypatch)


@pytest.fixture(scope="module", params=list(ISA_FLAGS))
def build(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels as this machine runs them, and as machines without its vector instructions do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_ISA", request.param)
        try:
            chosen_isa()
        except ValueError as error:
            pytest.skip(str(error))
        if request.param == "avx2" and "avx512f" not in (cpu_flags() or ()):
            pytest.skip("the native build is the one for AVX2 here")
        for kernel in CPU_KERNELS:
            patch.setattr(kernel, "_loaded", None)
            patch.setattr(kernel, "isa", kernel.isa)
            assert kernel.load(), kernel.failure
        yield request.param
