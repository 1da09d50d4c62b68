"""Plans of calls on CUDA: what depends on the signature of arguments is worked out once, and only for that."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from octavo import ops
from octavo.ops.shared import fallback, registry
from octavo.ops.shared.triton_helpers import GPUS, PLANS, Gpu, Launch, by_plan

from ..cuda_double import CPU, needs_triton


class Kernel:
    """A kernel that writes down how it is launched: bound by Triton, or as it was compiled."""

    arg_names = ("x", "codes", "count", "WIDTH", "KIND")

    def __init__(self) -> None:
        self.bound: list[tuple] = []
        self.launched: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*arguments: Any, **constants: Any) -> "Compiled":
            self.bound.append((grid, arguments, constants))
            return Compiled(self)

        return launch


class Compiled:
    """What Triton returns of a launch."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable:
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for a GPU, with no plans."""
    monkeypatch.setitem(GPUS, CPU, Gpu(90, 132))
    PLANS.clear()
    yield
    PLANS.clear()


def test_what_is_compiled_is_launched_from_the_second_time_on() -> None:
    kernel, codes = Kernel(), torch.zeros(3, dtype=torch.float8_e4m3fn)
    launch = Launch(kernel, (7, 2), {"KIND": "e4m3", "WIDTH": 3}, num_warps=4)
    launch((torch.ones(2, 3), 3, 1), codes, 5)
    ((grid, ((_, *strides), raw, count), constants),) = kernel.bound
    assert (grid, strides, raw.dtype, count) == ((7, 2, 1), [3, 1], torch.uint8, 5)
    assert constants == {"KIND": "e4m3", "WIDTH": 3, "num_warps": 4}
    other = torch.ones(2, 3)
    launch((other, 3, 1), codes, 6)
    assert len(kernel.bound) == 1
    assert kernel.launched == [((7, 2, 1), ((other, 3, 1), codes, 6, 3, "e4m3"))]


@needs_triton
def test_a_plan_is_for_all_calls_that_are_alike(gpu: None) -> None:
    made = []

    def make(x: torch.Tensor, factor: float, out: torch.Tensor | None) -> Callable:
        made.append((x.shape, factor))
        return lambda x, factor, out: (x * factor).sum().item()

    def run(x: torch.Tensor, factor: float = 2.0, out: torch.Tensor | None = None) -> float:
        return by_plan("an op", torch.sum, make, (x, factor, out))

    storage = torch.ones(64)
    assert run(torch.ones(8)) == 16 and run(storage[16:24]) == 16 and len(made) == 1
    others = (
        torch.ones(9),
        torch.ones(2, 4),
        torch.ones(4, 2).T,
        storage[1:9],  # at an address that is no multiple of 16
        torch.ones(8, dtype=torch.float16),
    )
    for number, x in enumerate(others, 2):
        assert run(x) == run(x) == 2 * x.numel() and len(made) == number
    assert run(torch.ones(8), 3.0) == 24 and len(made) == 7
    assert run(torch.ones(8), 3.0, storage) == 24 and len(made) == 8


@needs_triton
def test_the_reference_serves_what_kernels_do_not(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_FELL_BACK", set())
    x = torch.ones(3, dtype=torch.float64)
    for _ in range(2):  # it is said each time to who is strict
        with ops.strict(), pytest.raises(NotImplementedError, match="do not compute in float64"):
            by_plan("an op", torch.sum, pytest.fail, (x,))
    with pytest.warns(RuntimeWarning, match="runs as the reference"):
        assert by_plan("an op", torch.sum, pytest.fail, (x,)) == 3


def test_nobody_listens_but_under_modes_and_transforms() -> None:
    seen = []
    with torch.no_grad():
        torch.vmap(lambda x: seen.append(registry.is_unobserved(x)) or x)(torch.ones(2, 3))
    assert seen == [False]


def test_an_op_is_called_past_the_dispatcher_only_where_nobody_listens() -> None:
    x, weight, scale = torch.randn(2, 16), torch.ones((4, 16), dtype=torch.int8), torch.ones(4)
    with torch.no_grad():
        assert registry.is_unobserved(x)
        assert not registry.is_unobserved(torch.nn.Parameter(x))
        with FlopCounterMode(display=False):
            assert not registry.is_unobserved(x)
        called = registry.eagerly(ops.linear_w8a8_dynamic, x, weight, scale, bias=None)
    assert not registry.is_unobserved(x)
    assert torch.equal(called, ops.linear_w8a8_dynamic(x, weight, scale, None))
