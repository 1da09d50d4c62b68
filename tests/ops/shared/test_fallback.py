"""What no fast kernel serves is said once per op, device and reason, and refused where somebody is strict."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo import ops
from octavo.ops.codec.cpu import CODEC_KERNEL
from octavo.ops.codec.cuda import decode_cuda, encode_cuda, encode_token_cuda
from octavo.ops.linear.cpu import LINEAR_KERNEL
from octavo.ops.linear.cuda import (
    linear_fp8_cuda,
    linear_w8a8_cuda,
    linear_w8a8_dynamic_cuda,
    linear_weight_only_cuda,
)
from octavo.ops.shared import fallback, registry, triton_helpers
from octavo.ops.shared.fallback import fell_back

from ..npu_double import on_npu

CODES, SCALE = torch.zeros(1, 2, 3, 8, dtype=torch.int8), torch.ones(2, 1, 8)
MATRIX, ONES, BIAS = torch.ones(4, 32, dtype=torch.int8), torch.ones(4), torch.zeros(4, dtype=torch.int32)


def values(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(1, 2, 3, 8, dtype=dtype)


def row(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(1, 32, dtype=dtype)


CALLS: dict[str, tuple[Callable, tuple[Any, ...]]] = {
    "encode": (encode_cuda, (values, SCALE, None, CODES.clone())),
    "encode_token": (encode_token_cuda, (values, CODES.clone(), torch.ones(1, 2, 3, 1))),
    "decode": (decode_cuda, (values, SCALE, None)),
    "linear_w8a8": (linear_w8a8_cuda, (row, MATRIX, torch.ones(1), torch.zeros(1), BIAS, ONES)),
    "linear_w8a8_dynamic": (linear_w8a8_dynamic_cuda, (row, MATRIX, ONES, None)),
    "linear_weight_only": (linear_weight_only_cuda, (row, MATRIX, ONES[:, None], None, None)),
    "linear_fp8": (linear_fp8_cuda, (row, MATRIX.to(torch.float8_e4m3fn), ONES, None, None)),
}
"""By op: its kernel for CUDA, and arguments of which the first makes values of a dtype."""
SMALL_CODES = torch.zeros(1, 2, 3, 4, dtype=torch.uint8)
ON_NPU: dict[str, tuple[str, Callable, tuple[Any, ...], str]] = {
    "a codebook": (
        "encode", ops.encode, (values(), SCALE, None, SMALL_CODES, None, 4, torch.arange(16.0)), "codebooks"
    ),
    "a scale per token": ("encode", ops.encode, (values(), torch.ones(1, 2, 3, 1), None, CODES.clone()), "along the"),
    "4 bits": ("encode_token", ops.encode_token, (values().half(), SMALL_CODES, torch.ones(1, 2, 3, 1)), "4 bits"),
    "float16 scales": (
        "encode_token", ops.encode_token, (values().half(), CODES.clone(), torch.ones(1, 2, 3, 1).half()), "in float32"
    ),
    "decoding": ("decode", ops.decode, (CODES, SCALE, None), "npu_anti_quant"),
}  # fmt: skip
"""What the NPU's ops do not serve: the op, its arguments, and a word of the reason."""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has fallen back yet."""
    monkeypatch.setattr(fallback, "_FELL_BACK", set())


def assert_declared(call: Callable[[], Any], op: str, device: str, reason: str) -> None:
    """Two calls warn once, the report names the reason, and strictly the call is refused before it writes a result."""
    with pytest.raises(NotImplementedError, match=reason) as refused, ops.strict():
        call()
    assert "\n" not in str(refused.value) and str(refused.value).startswith(f"{op} on {device} ")
    assert not fallback.calls_fallen_back()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    (warning,) = [str(one.message) for one in caught if "octavo:" in str(one.message)]
    assert warning.startswith(f"octavo: {op} on {device} runs as the reference") and reason in warning
    assert "\n" not in warning and "ops.strict()" in warning
    (line,) = [line for line in ops.report().splitlines() if "has run as reference" in line]
    assert line.split()[:2] == [op, device] and reason in line


@pytest.mark.parametrize("op", CALLS)
def test_on_the_cpu_without_a_compiler(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (CODEC_KERNEL, LINEAR_KERNEL):
        monkeypatch.setattr(kernel, "_loaded", {})
        monkeypatch.setattr(kernel, "failure", "no C compiler here")
    first, *others = CALLS[op][1]
    assert_declared(lambda: getattr(ops, op)(first(), *others), op, "CPU", "no C compiler here")


@pytest.mark.parametrize("op", CALLS)
def test_on_cuda_without_triton(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_helpers, "triton", None)
    kernel, (first, *others) = CALLS[op]
    assert_declared(lambda: kernel(first(), *others), op, "CUDA", "Triton is not installed")


@pytest.mark.skipif(triton_helpers.triton is None, reason="Triton is not installed: pip install triton")
@pytest.mark.parametrize("op", CALLS)
def test_float64_on_cuda(op: str) -> None:
    kernel, (first, *others) = CALLS[op]
    assert_declared(lambda: kernel(first(torch.float64), *others), op, "CUDA", "do not compute in float64")


@pytest.mark.skipif(triton_helpers.triton is None, reason="Triton is not installed: pip install triton")
def test_a_gpu_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(triton_helpers.GPUS, torch.device("cpu"), triton_helpers.Gpu(75, 40))
    kernel, (first, *others) = CALLS["encode"]
    assert_declared(lambda: kernel(first(), *others), "encode", "CUDA", "8.0 and newer, not 7.5")


@pytest.mark.parametrize("name", ON_NPU)
def test_on_an_npu(name: str) -> None:
    op, call, arguments, reason = ON_NPU[name]
    assert_declared(lambda: on_npu(call, *arguments), op, "NPU", reason)


def test_on_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that has no kernel for the CPU stands for the ops on a device that has no kernels."""
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    doubled = registry.define("doubled_in_a_test(Tensor x) -> Tensor", lambda x: 2 * x, torch.empty_like)
    assert_declared(lambda: doubled(ONES), "doubled_in_a_test", "CPU", "no kernels for this device")
    assert torch.equal(doubled(ONES), 2 * ONES)


def test_what_the_user_knows_already_is_refused_too_but_not_said_again() -> None:
    fallback.announced("asked for in a test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fell_back("encode", "CPU", "asked for in a test")
    with pytest.raises(NotImplementedError, match="asked for in a test"), ops.strict():
        fell_back("encode", "CPU", "asked for in a test")


def test_strict_nests_and_ends_where_it_was_begun() -> None:
    with pytest.warns(RuntimeWarning), ops.strict():
        with ops.strict():
            pass
        with pytest.raises(NotImplementedError):
            fell_back("encode", "CPU", "a reason")
        elsewhere = threading.Thread(target=fell_back, args=("encode", "CPU", "a reason"))  # in no such block
        elsewhere.start()
        elsewhere.join()
    assert fell_back("encode", "CPU", "a reason")


def test_a_process_can_be_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_KERNELS", "strict")
    with pytest.raises(NotImplementedError, match="a reason"):
        fell_back("encode", "CPU", "a reason")


def test_what_a_kernel_serves_is_served_strictly_and_without_a_word() -> None:
    with warnings.catch_warnings(), ops.strict():
        warnings.simplefilter("error")
        assert not fell_back("encode", "CPU", None)
        if not CODEC_KERNEL.supports():
            ops.encode(values(), SCALE, None, CODES.clone())
