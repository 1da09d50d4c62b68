"""The kernels built for processors that this machine does not have: the `build` of the tests here."""

from collections.abc import Iterator

import pytest
import torch

from octavo.ops.decoder.cpu import DECODER_KERNEL

from ...support import REPOSITORY
from ..conftest import CPU_KERNELS
from .emulator import ISAS, emulated

PROGRAMS = REPOSITORY / ".cache" / "emulated"


@pytest.fixture(scope="module", params=list(ISAS))
def build(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op as a processor of other instructions computes it."""
    isa = ISAS[request.param]
    reason = isa.missing()
    if reason:
        pytest.skip(reason)
    with emulated((*CPU_KERNELS, DECODER_KERNEL), isa, PROGRAMS):
        yield request.param


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Calls are shared among threads, whatever this machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
