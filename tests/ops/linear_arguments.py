"""Arguments of the linear ops that every version of them refuses, each a change of those that all of them serve."""

from collections.abc import Callable
from typing import Any

import torch

from octavo import ops
from octavo.ops.linear.arguments import LARGEST_IN_FEATURES
from octavo.ops.linear.cuda import linear_fp8_cuda, linear_w8a8_cuda, linear_w8a8_dynamic_cuda, linear_weight_only_cuda
from octavo.ops.linear.npu import linear_w8a8_dynamic_npu, linear_w8a8_npu, linear_weight_only_npu
from octavo.ops.linear.reference import (
    linear_fp8_block_reference,
    linear_fp8_reference,
    linear_grouped_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)

Arguments = dict[str, Any]
Change = tuple[type[Exception], str, Arguments]
"""The error, words of it, and the arguments that differ."""
OpCase = tuple[Callable[[], Arguments], list[Change], tuple[Callable | None, ...]]
"""Arguments that are served, changes that are refused, and the versions for CPU, reference, CUDA and NPU."""
X, N = torch.randn(3, 64).half(), 8
CODES, ONES = torch.zeros((N, 64), dtype=torch.int8), torch.ones(N)
DEEP = {
    "x": torch.zeros(1, LARGEST_IN_FEATURES + 1).half(),
    "weight": torch.zeros((N, LARGEST_IN_FEATURES + 1), dtype=torch.int8),
}
NO_CHANNELS = {"x": X[:, :0], "weight": CODES[:, :0]}
BIAS: list[Change] = [
    (ValueError, "bias (7,) in float32 does not belong", {"bias": torch.ones(7)}),
    (ValueError, "bias (8, 1) in float32 does not belong", {"bias": torch.ones(8, 1)}),
    (ValueError, "bias (8,) in int64 does not belong", {"bias": torch.ones(8, dtype=torch.int64)}),
]
MATRIX: list[Change] = [
    (ValueError, "do not go together", {"x": X[:, 1:]}),
    (ValueError, "do not go together", {"x": X[0, 0]}),
    (ValueError, "do not go together", {"x": X.int()}),
    (ValueError, "do not go together", {"weight": CODES[0]}),
    (ValueError, "do not go together", {"weight": CODES.long()}),
    (ValueError, "do not go together", NO_CHANNELS),
]


def w8a8_arguments() -> Arguments:
    return {
        "x": X,
        "weight": CODES,
        "input_scale": torch.ones(1),
        "input_offset": torch.zeros(1),
        "quant_bias": torch.zeros(N, dtype=torch.int32),
        "deq_scale": ONES,
    }


def w8a8_dynamic_arguments() -> Arguments:
    return {"x": X, "weight": CODES, "weight_scale": ONES, "bias": None}


def weight_only_arguments() -> Arguments:
    return {"x": X, "weight": CODES, "weight_scale": ONES[:, None], "weight_zero": None, "bias": None}


def grouped_arguments() -> Arguments:
    return {**weight_only_arguments(), "weight_scale": torch.ones(N, 2), "group": 32}


def fp8_arguments() -> Arguments:
    return {"x": X, "weight": CODES.to(torch.float8_e4m3fn), "weight_scale": ONES, "input_scale": None, "bias": None}


def fp8_block_arguments() -> Arguments:
    weight = torch.zeros(N, 128).to(torch.float8_e4m3fn)
    return {"x": torch.randn(3, 128).half(), "weight": weight, "weight_scale": torch.ones(1, 1), "bias": None}


W8A8: list[Change] = [
    *MATRIX,
    (ValueError, "W8A8 adds up to 131071 products exactly", DEEP),
    (ValueError, "quant_bias must be int32 [8]", {"quant_bias": ONES}),
    (ValueError, "deq_scale must be float32 [8]", {"deq_scale": ONES[:, None]}),
    (ValueError, "input_scale must be float32 [1]", {"input_scale": torch.ones(2)}),
    (ValueError, "input_offset must be float32 [1]", {"input_offset": torch.zeros(0)}),
    (ValueError, "all tensors must be on", {"deq_scale": torch.ones(N, device="meta")}),
]
W8A8_DYNAMIC: list[Change] = [
    *MATRIX,
    *BIAS,
    (ValueError, "W8A8 adds up to 131071 products exactly", DEEP),
    (ValueError, "weight_scale must be float32 [8]", {"weight_scale": ONES.half()}),
]
WEIGHT_ONLY: list[Change] = [
    *MATRIX,
    *BIAS,
    (ValueError, "weight_scale (8,) in float32 does not belong", {"weight_scale": ONES}),
    (ValueError, "weight_scale (8, 0) in float32 does not belong", {"weight_scale": torch.ones(N, 0)}),
    (ValueError, "weight_scale (8, 3) in float32 does not belong", {"weight_scale": torch.ones(N, 3)}),
    (ValueError, "weight_zero (8, 2) in float32 must be", {"weight_zero": torch.ones(N, 2)}),
    (ValueError, "weight_zero (8, 1) in int32 must be", {"weight_zero": torch.ones((N, 1), dtype=torch.int32)}),
]
GROUPED: list[Change] = [
    *[change for change in WEIGHT_ONLY if "weight_zero" not in change[2]],
    (ValueError, "weight_zero (8, 1) in float32 must be", {"weight_zero": torch.ones(N, 1)}),
    (ValueError, "a group of 64 input channels does not divide the 32", {"group": 64}),
    (ValueError, "a group of 0 input channels does not divide", {"group": 0}),
    (ValueError, "a group of -32 input channels does not divide", {"group": -32}),
    (
        ValueError,
        "up to 131071 codes add up exactly",
        {**DEEP, "weight_scale": ONES[:, None], "group": LARGEST_IN_FEATURES + 1},
    ),
]
FP8: list[Change] = [
    *[change for change in MATRIX if change[2] is not NO_CHANNELS],
    *BIAS,
    (ValueError, "weight_scale must be float32 [8]", {"weight_scale": ONES[1:]}),
    (ValueError, "input_scale must be float32 [1]", {"input_scale": ONES}),
]

FP8_BLOCK: list[Change] = [
    *[change for change in MATRIX if change[2] is not NO_CHANNELS],
    *BIAS,
    (ValueError, "weight_scale must be float32 (1, 1), not float32 (2, 1)", {"weight_scale": torch.ones(2, 1)}),
    (ValueError, "weight_scale must be float32 (1, 1), not float16", {"weight_scale": torch.ones(1, 1).half()}),
    (
        ValueError, "blocks are of 128 input channels, and the weight has 192",
        {"x": torch.ones(3, 192), "weight": torch.ones(N, 192).to(torch.float8_e4m3fn)},
    ),
]  # fmt: skip


LINEAR_OPS: dict[str, OpCase] = {
    "linear_w8a8": (
        w8a8_arguments,
        W8A8,
        (ops.linear_w8a8, linear_w8a8_reference, linear_w8a8_cuda, linear_w8a8_npu),
    ),
    "linear_w8a8_dynamic": (
        w8a8_dynamic_arguments,
        W8A8_DYNAMIC,
        (ops.linear_w8a8_dynamic, linear_w8a8_dynamic_reference, linear_w8a8_dynamic_cuda, linear_w8a8_dynamic_npu),
    ),
    "linear_weight_only": (
        weight_only_arguments,
        WEIGHT_ONLY,
        (ops.linear_weight_only, linear_weight_only_reference, linear_weight_only_cuda, linear_weight_only_npu),
    ),
    "linear_grouped": (grouped_arguments, GROUPED, (ops.linear_grouped, linear_grouped_reference, None, None)),
    "linear_fp8": (fp8_arguments, FP8, (ops.linear_fp8, linear_fp8_reference, linear_fp8_cuda, None)),
    "linear_fp8_block": (
        fp8_block_arguments, FP8_BLOCK, (ops.linear_fp8_block, linear_fp8_block_reference, None, None),
    ),
}  # fmt: skip
