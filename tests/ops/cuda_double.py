"""The CUDA kernels without a GPU: run by Triton's interpreter on CPU tensors, or translated by its compiler.

The functions of `ops/*/cuda.py` are called as on a GPU. What launches a kernel is exchanged, so the arguments, the grid
and the constants are those that a GPU would get.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from octavo.ops.shared.codes import FP8_DTYPES
from octavo.ops.shared.triton_helpers import GPUS, PLANS, Gpu, tl, triton

MODULES = (
    "octavo.ops.shared.triton_helpers",
    "octavo.ops.attention.cuda",
    "octavo.ops.attention.cuda_kernels",
    "octavo.ops.attention.cuda_tiles",
    "octavo.ops.codec.cuda",
    "octavo.ops.codec.cuda_kernels",
    "octavo.ops.linear.cuda",
    "octavo.ops.linear.cuda_kernels",
)
LANGUAGE = ("triton.language", "triton.language.standard")
"""Where Triton keeps functions of its language that are kernels themselves, as `tl.sum`."""
CPU = torch.device("cpu")
SHARED_MEMORY = {80: 163, 89: 99, 90: 227}
"""KiB that a program may have, by compute capability."""
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed: pip install triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck_on_gpu(op: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
    """`torch.library.opcheck`, but for what it cannot do: compare codes in fp8 on a GPU, where they have no product."""
    dtypes = {part.dtype for part in (*args, *(kwargs or {}).values()) if isinstance(part, torch.Tensor)}
    torch.library.opcheck(op, args, kwargs, test_utils=OPCHECKS if dtypes.isdisjoint(FP8_DTYPES) else OPCHECKS[1:])


@contextmanager
def _exchanged(gpu: Gpu, modules: tuple[str, ...], exchange: Callable[[Any], Any]) -> Iterator[None]:
    """The CPU taken for a GPU, and every kernel and helper of some modules for what `exchange` makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GPUS, CPU, gpu)
        PLANS.clear()  # they hold kernels
        for name in modules:
            module = import_module(name)
            for symbol, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction):
                    patch.setattr(module, symbol, exchange(value))
        yield
        PLANS.clear()


def _converted(data: np.ndarray, source: Any, target: Any, rounding: Any = None) -> np.ndarray:
    """A float array as another float type, as bits: what the interpreter does itself, but truncates."""
    bits = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}
    values = torch.from_numpy(np.ascontiguousarray(data)).view(_torch_dtype(source)).to(_torch_dtype(target))
    return values.view(bits[target.primitive_bitwidth]).numpy()


def _torch_dtype(dtype: Any) -> torch.dtype:
    names = {"bf16": "bfloat16", "fp8e4nv": "float8_e4m3fn", "fp8e5": "float8_e5m2", "fp64": "float64"}
    return getattr(torch, names.get(dtype.name, dtype.name.replace("fp", "float")))


def _mended_product(product: Callable) -> Callable:
    """The interpreter's matrix product, which multiplies the bits of bfloat16 as if they were numbers."""

    def widened(operand: Any) -> Any:
        if operand.dtype.name != "bf16":
            return operand
        return type(operand)(_converted(operand.data, operand.dtype, tl.float32).view(np.float32), tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *others: Any) -> Any:
        return product(self, widened(left), widened(right), *others)

    return create_dot


def _mended_cast(cast: Callable) -> Callable:
    """The interpreter's cast, which takes an integer for the bits of a bfloat16."""

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar.name == "bf16" and not source.dtype.is_floating():
            source = cast(self, source, tl.float32)
        return cast(self, source, target)

    return cast_impl


@contextmanager
def interpreted(capability: int = 90, processors: int = 4) -> Iterator[None]:
    """Kernels run by the interpreter, as for a GPU of this capability and number of multiprocessors."""
    import triton.experimental.gluon  # noqa: F401  the interpreter imports it, which fails once the language is exchanged
    from triton.runtime import interpreter

    # The interpreter puts its functions into the language for each call, and leaves them there: once is enough.
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    scope.set_attr(tl.tensor, "__index__", lambda number: int(number.handle.data.squeeze()))  # numpy 2.4, Triton < 3.9
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))
        patch.setattr(interpreter, "_convert_float", _converted)
        builder = interpreter.InterpreterBuilder
        patch.setattr(builder, "cast_impl", _mended_cast(builder.cast_impl))
        patch.setattr(builder, "create_dot", _mended_product(builder.create_dot))
        gpu = Gpu(capability, processors)
        with _exchanged(gpu, MODULES + LANGUAGE, lambda kernel: interpreter.InterpretedFunction(kernel.fn)):
            try:
                yield
            finally:
                scope.restore()


class _Driver:
    """As much of a driver as the compiler asks."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class _Compiling:
    """A kernel that is translated when it is launched; `done` takes what came out."""

    def __init__(self, kernel: Any, done: list) -> None:
        self.kernel, self.done = kernel, done

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any, **options: Any) -> None:
            self.done.append(self.kernel.warmup(*args, grid=grid, **options))

        return launch


@contextmanager
def compiled(capability: int, processors: int = 108) -> Iterator[list]:
    """Kernels translated to machine code of a capability instead of run: yields the list of what came out."""
    from triton.runtime import driver

    done: list = []
    kernels: list = []

    def exchange(kernel: Any) -> Any:
        kernel.device_caches.clear()
        kernels.append(kernel)
        return _Compiling(kernel, done) if kernel.fn.__name__.endswith("_kernel") else kernel

    with _exchanged(Gpu(capability, processors), MODULES, exchange):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "_active", _Driver(capability))
            yield done
        for kernel in kernels:
            kernel.device_caches.clear()
