"""What the kernels for CUDA GPUs share: Triton, what is known of a GPU, and codes as kernels read and write them.

The kernels have run on an H100 (torch 2.11, Triton 3.6), see benchmarks/README.md. Without a GPU, Triton's interpreter
runs them on the CPU against the references, and its compiler translates them for compute capability 8.0 and 9.0. They
take tensors with their strides as tuples `(pointer, strides)`.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .fallback import fell_back

try:
    import triton
    import triton.language as tl
except ImportError:  # the references serve
    triton, tl = None, SimpleNamespace(constexpr=object)

OLDEST_CAPABILITY = 80
"""Ampere: the first with bfloat16 and int8 in the matrix units that the kernels use."""
FP8_CAPABILITY = 89
"""Ada: the first with conversions and matrix products of fp8."""
TESTED = "run on an H100"
"""How far the kernels are, as `report` says it."""
CODE_KINDS = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""How kernels are told what a tensor of codes holds; anything else is "float"."""


class Gpu(NamedTuple):
    """What decides how kernels run on a device.

    Attributes:
        capability: compute capability, as 80 for 8.0.
        processors: number of multiprocessors.
    """

    capability: int
    processors: int


PLANS: dict[tuple, Callable] = {}
"""What `by_plan` has worked out for calls of an op, by all that its kernels depend on but values."""
MOST_PLANS = 4096
GPUS: dict[torch.device, Gpu] = {}
"""What `gpu_of` has asked the driver already."""


def gpu_of(device: torch.device) -> Gpu:
    """What is known of a CUDA device."""
    if device not in GPUS:
        properties = torch.cuda.get_device_properties(device)
        GPUS[device] = Gpu(properties.major * 10 + properties.minor, properties.multi_processor_count)
    return GPUS[device]


def triton_supports(x: torch.Tensor) -> str | None:
    """None, or why the Triton kernels do not serve what x says: they are for NVIDIA's GPUs from Ampere on."""
    if triton is None:
        return "Triton is not installed; pip install triton"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs"
    if x.dtype == torch.float64:
        return "the Triton kernels do not compute in float64; load the model in bfloat16, float16 or float32"
    capability = gpu_of(x.device).capability
    if capability < OLDEST_CAPABILITY:
        return f"the Triton kernels take compute capability {OLDEST_CAPABILITY / 10} and newer, not {capability / 10}"
    return None


def cuda_description(text: str) -> Callable[[], str]:
    """What `report` says of a kernel for CUDA."""

    def text_now() -> str:
        if triton is None:
            return "reference (PyTorch): Triton is not installed"
        if torch.version.hip is not None:
            return "reference (PyTorch): the Triton kernels are for NVIDIA GPUs"
        return f"Triton ({TESTED}): {text}; float64, and GPUs before Ampere, by the reference (PyTorch)"

    return text_now


def jit(*unspecialized: str) -> Callable[[Callable], Any]:
    """`triton.jit`, which compiles no variants for values of the arguments named; without Triton, nothing."""

    def decorate(function: Callable) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(unspecialized))

    return decorate


class Launch:
    """A kernel with its grid and constants, launched as often as one likes with arguments of one signature.

    Triton asks every argument for its type and whether its value or address is a multiple of 16, and looks for what it
    has compiled for these answers, which takes longer than the launch. Here that is done the first time; a plan is for
    arguments that are alike in all of it.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], **options: Any) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._constants, self._options = constants, options
        self._launch: Callable | None = None
        self._last: tuple = ()

    def __call__(self, *arguments: Any) -> None:
        """Launch it with what comes before the constants: tensors, alone or as `(tensor, strides)`, and numbers."""
        if self._launch is not None:
            self._launch(*arguments, *self._last)
            return
        raw = [
            (_raw(part[0]), *part[1:]) if isinstance(part, tuple) else _raw(part) if torch.is_tensor(part) else part
            for part in arguments
        ]
        compiled = self._kernel[self._grid](*raw, **self._constants, **self._options)
        if compiled is not None:  # by the interpreter nothing is
            self._last = tuple(self._constants[name] for name in self._kernel.arg_names[len(arguments) :])
            self._launch = compiled[self._grid]


def _raw(codes: torch.Tensor) -> torch.Tensor:
    """Codes as kernels load and store them: fp8 and bool as bytes, since Triton has no e4m3 on Ampere."""
    return codes.view(torch.uint8) if codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bool) else codes


def _described(argument: Any) -> Any:
    """All of an argument that decides how kernels are compiled and launched."""
    if isinstance(argument, torch.Tensor):
        place = argument.get_device(), argument.data_ptr() % 16 == 0
        return argument.dtype, argument.shape, argument.stride(), place
    return argument


def by_plan(
    name: str, reference: Callable, make: Callable[..., Callable], arguments: tuple, given: tuple | None = None
) -> Any:
    """A call of an op by the plan for such arguments, or by the reference where the kernels do not serve them.

    Args:
        make: checks the arguments, and gives the plan for all that are like them, which is called with them.
        given: what these functions are called with, if not with the arguments one by one.

    Raises:
        ValueError: as `make`.
    """
    key = (name, *map(_described, arguments))
    plan, x = PLANS.get(key), arguments[0]
    given = arguments if given is None else given
    if plan is None:
        if fell_back(name, "CUDA", triton_supports(x)):
            return reference(*given)
        if len(PLANS) >= MOST_PLANS:  # of a cache that grows, those of all lengths
            PLANS.clear()
        plan = PLANS[key] = make(*given)
    if x.is_cuda and x.get_device() != torch.cuda.current_device():  # on which Triton launches
        with torch.cuda.device(x.device):
            return plan(*given)
    return plan(*given)


def dense_part(part: torch.Tensor | None) -> torch.Tensor | None:
    """A part of a call that kernels take without strides."""
    return None if part is None else part.contiguous()


def power_of_two(number: int, smallest: int = 1) -> int:
    """The smallest power of two that is neither less than `number` nor than `smallest`."""
    return max(smallest, 1 << (number - 1).bit_length() if number > 1 else 1)


@jit()
def e4m3_as_half(codes, NATIVE: tl.constexpr):
    """Bytes of e4m3 as float16, which holds each exactly."""
    if NATIVE:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        bits = codes.to(tl.uint16)
        shifted = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        values = shifted.to(tl.float16, bitcast=True) * 256.0  # 2 ** (15 - 7), the biases of the exponents
        values = tl.where((bits & 0x7F) == 0x7F, float("nan"), values)
    return values


@jit()
def codes_as_half(codes, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """int8 or fp8 codes, or int4 ones as `load_halves` gives them, as float16, which holds each exactly."""
    if KIND == "e4m3":
        values = e4m3_as_half(codes, NATIVE)
    elif KIND == "e5m2":
        values = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    else:  # as bits of 1024 + code + offset: conversions of integers would take longer than all else
        BITS: tl.constexpr = 0x6400 if KIND == "int4" else 0x6480
        OFFSET: tl.constexpr = 1032.0 if KIND == "int4" else 1152.0
        values = (codes.to(tl.uint8, bitcast=True).to(tl.uint16) ^ BITS).to(tl.float16, bitcast=True) - OFFSET
    return values


@jit()
def codes_as_float(codes, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Codes, or float values as they are, in float32."""
    values = codes if KIND == "float" else codes_as_half(codes, KIND, NATIVE)
    return values.to(tl.float32)


@jit()
def load_halves(pointer, rows, stride, inside, channels, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """The first and the second half of the channels of rows of codes; of int4, `code + 8` in uint8.

    Args:
        rows: offsets `[R, 1]`, of which those count where `inside` `[R, 1]` is true.
        channels: `[1, C]`, from 0; those beyond half the width are loaded as anything finite.
    """
    HALF: tl.constexpr = (WIDTH + 1) // 2
    if KIND == "int4":
        both = tl.load(pointer + rows + channels * stride, mask=inside & (channels < HALF), other=0)
        low, high = both & 15, both >> 4
    else:
        low = tl.load(pointer + rows + channels * stride, mask=inside & (channels < HALF), other=0)
        second = channels + HALF
        high = tl.load(pointer + rows + second * stride, mask=inside & (second < WIDTH), other=0)
    return low, high


@jit()
def round_half_even(x):
    """float32 between -2^22 and 2^22, rounded: what is added leaves no bits behind the point."""
    return (x + 12582912.0) - 12582912.0


@jit()
def fp8_code(x, KIND: tl.constexpr):
    """float32 as bytes of e4m3 or e5m2, halves to even; what is beyond the range takes its end, NaN stays."""
    MANTISSA: tl.constexpr = 3 if KIND == "e4m3" else 2
    BIAS: tl.constexpr = 7 if KIND == "e4m3" else 15
    LARGEST: tl.constexpr = 448.0 if KIND == "e4m3" else 57344.0
    SHIFT: tl.constexpr = 23 - MANTISSA
    SMALLEST_NORMAL: tl.constexpr = (128 - BIAS) << 23
    SUBNORMALS: tl.constexpr = 2.0 ** (BIAS - 1 + MANTISSA)
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    rounded = bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)
    normal = (rounded >> SHIFT) - ((127 - BIAS) << MANTISSA)
    subnormal = (size * SUBNORMALS + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(bits < SMALLEST_NORMAL, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@jit()
def to_code(x, KIND: tl.constexpr):
    """float32 in units of codes as int8, as int4 from -8 to 7 in int8, or as bytes of fp8."""
    if KIND == "int8":
        code = round_half_even(tl.minimum(tl.maximum(x, -128.0), 127.0)).to(tl.int8)
    elif KIND == "int4":
        code = round_half_even(tl.minimum(tl.maximum(x, -8.0), 7.0)).to(tl.int8)
    else:
        code = fp8_code(x, KIND)
    return code
