"""Calls of attention that no kernel serves are said once, with the reason, and refused where somebody is strict."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo import ops
from octavo.ops.attention.cpu import ATTENTION_KERNEL, attention_cpu_supports
from octavo.ops.attention.cuda import attention_cuda_supports
from octavo.ops.shared import fallback, triton_helpers

from .attention_calls import Call, add_positions, int8_call
from .npu_double import TorchNpu, on_npu


def half_call(**change: Any) -> Call:
    call = int8_call(queries=1)
    call.query, call.key, call.value = call.query.half(), call.key.contiguous(), call.value.contiguous()
    vars(call).update(change)
    return call


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has fallen back yet."""
    monkeypatch.setattr(fallback, "_FELL_BACK", set())


def assert_declared(run: Callable[[], Any], device: str, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason), ops.strict():
        run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
        run()
    (warning,) = [str(one.message) for one in caught if "octavo:" in str(one.message)]
    assert f" on {device} runs as the reference" in warning and reason in warning


@pytest.mark.parametrize("op", [ops.attention, ops.attention_lse])
def test_queries_in_float64_on_the_cpu(op: Callable) -> None:
    call = int8_call()
    call.query = call.query.double()
    assert_declared(lambda: op(**vars(call)), "CPU", "computes in float32")


@pytest.mark.parametrize("op", [ops.attention, ops.attention_lse])
def test_on_the_cpu_without_a_compiler(op: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ATTENTION_KERNEL, "_loaded", {})
    monkeypatch.setattr(ATTENTION_KERNEL, "failure", "no C compiler here")
    assert_declared(lambda: op(**vars(int8_call())), "CPU", "no C compiler here")


def test_on_cuda_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_helpers, "triton", None)
    assert "Triton is not installed" in attention_cuda_supports(int8_call().call())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask": torch.zeros(2, 1, 1, 40)}, "masks in bool"),
        ({"key_scale": torch.ones(2, 2, 40, 4)}, "a scale per channel, head or token"),
        ({"key_scale": torch.ones(2, 2, 40, 1)}, "of one granularity"),
        ({"query_scale": torch.ones(6, 1, 1)}, "_npu_paged_attention_quant takes one query"),
        ({"length": torch.tensor([90]), "window": 5}, "a segment of a sequence"),
        (vars(add_positions(int8_call(queries=1), 16)), "scores by position"),
    ],
)
def test_on_an_npu(npu: TorchNpu, change: dict[str, Any], reason: str) -> None:
    positions = {name: value for name, value in change.items() if "scores" not in reason or name.startswith("position")}
    call = half_call(**positions)
    assert_declared(lambda: on_npu(ops.attention, **vars(call)), "NPU", reason)
    assert not npu.calls


def test_the_log_sum_exp_on_an_npu() -> None:
    assert_declared(lambda: on_npu(ops.attention_lse, **vars(half_call())), "NPU", "a log-sum-exp")


def test_what_kernels_serve_is_served_strictly(npu: TorchNpu) -> None:
    with ops.strict():
        on_npu(ops.attention, **vars(half_call()))
        if not attention_cpu_supports(int8_call().call()):
            int8_call().run()
            int8_call().run_lse()
