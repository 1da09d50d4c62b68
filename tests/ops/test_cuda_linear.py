"""The linears of CUDA GPUs against their references: integer sums bit for bit, float sums within rounding."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import linear_fp8, linear_w8a8, linear_w8a8_dynamic, linear_weight_only
from octavo.ops.linear.cuda import (
    linear_fp8_cuda,
    linear_w8a8_cuda,
    linear_w8a8_dynamic_cuda,
    linear_weight_only_cuda,
)
from octavo.ops.linear.reference import (
    WEIGHT_BLOCK,
    linear_fp8_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)
from octavo.ops.shared.codes import pack_int4

from ..tolerances import TOLERANCES
from .cuda_double import SHARED_MEMORY, compiled, interpreted, needs_gpu, needs_triton, opcheck_on_gpu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = st.sampled_from([1, 3, 16, 20, 70]), st.sampled_from([1, 17, 40, 130])


def static_layer(in_features: int, out_features: int) -> tuple[torch.Tensor, ...]:
    """Random weight, input scale and offset, bias and dequantization scale of a layer."""
    return (
        torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8),
        torch.rand(1) * 0.05 + 0.005,
        torch.randint(-50, 50, (1,)).float(),
        torch.randint(-10000, 10000, (out_features,), dtype=torch.int32),
        torch.rand(out_features) * 0.01,
    )


def packed_layer(in_features: int, out_features: int, num_groups: int, is_int4: bool, has_zero: bool) -> tuple:
    """Random weight, scale, zero and bias of a weight-only layer."""
    low, high = (-8, 8) if is_int4 else (-128, 128)
    codes = torch.randint(low, high, (out_features, in_features))
    weight = pack_int4(codes, WEIGHT_BLOCK) if is_int4 else codes.to(torch.int8)
    zero = torch.randn(out_features, num_groups) * 3 if has_zero else None
    return weight, (torch.rand(out_features, num_groups) + 0.5).half(), zero, torch.randn(out_features)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what sums in another order and the rounding of the result to its dtype allow."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert difference <= TOLERANCES[f"cuda linear {str(actual.dtype)[6:]}"]


@needs_triton
@settings(max_examples=15, deadline=None)
@given(
    rows=ROWS,
    in_features=st.sampled_from([16, 77, 256, 300]),
    out_features=COLUMNS,
    dtype=st.sampled_from(FLOATS),
    is_static=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_integer_sums_equal_the_reference(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, is_static: bool, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, in_features).to(dtype)
    static = static_layer(in_features, out_features)
    dynamic = (static[0], static[4], torch.randn(out_features).to(dtype) if has_bias else None)
    with interpreted():
        actual = linear_w8a8_cuda(x, *static) if is_static else linear_w8a8_dynamic_cuda(x, *dynamic)
    expected = linear_w8a8_reference(x, *static) if is_static else linear_w8a8_dynamic_reference(x, *dynamic)
    assert torch.equal(actual, expected)


@needs_triton
@pytest.mark.parametrize("in_features", [40, 2048, 5000])
@pytest.mark.parametrize("out_features", [3, 70])
@pytest.mark.parametrize("is_static", [True, False])
def test_one_token_equals_the_reference(in_features: int, out_features: int, is_static: bool) -> None:
    """Which one kernel serves, in tiles of up to 1024 channels and 16 outputs."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 2 * in_features).bfloat16()[..., ::2]
    weight, *static = static_layer(in_features, out_features)
    weight = torch.cat((weight, weight), dim=1)[:, :in_features]
    for tokens in (x, x.index_fill(-1, torch.tensor([in_features - 1]), float("nan"))):
        if is_static:
            op, reference, arguments = linear_w8a8_cuda, linear_w8a8_reference, (weight, *static)
        else:
            op, reference = linear_w8a8_dynamic_cuda, linear_w8a8_dynamic_reference
            arguments = weight, static[3], torch.randn(out_features)
        with interpreted():
            actual = op(tokens, *arguments)
        expected = reference(tokens, *arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@needs_triton
@settings(max_examples=20, deadline=None)
@given(
    rows=ROWS,
    shape=st.sampled_from([(64, 1), (64, 2), (256, 2), (256, 8), (96, 3), (384, 1)]),
    out_features=COLUMNS,
    dtype=st.sampled_from(FLOATS),
    is_int4=st.booleans(),
    has_zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_float_times_codes_equals_the_reference(
    rows: int, shape: tuple[int, int], out_features: int, dtype: torch.dtype, is_int4: bool, has_zero: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(shape[0], rows).T.to(dtype)  # strided
    arguments = packed_layer(shape[0], out_features, shape[1], is_int4, has_zero)
    with interpreted():
        actual = linear_weight_only_cuda(x, *arguments)
    assert_close(actual, linear_weight_only_reference(x, *arguments))


@needs_triton
@settings(max_examples=15, deadline=None)
@given(
    rows=ROWS,
    in_features=st.sampled_from([16, 77, 256, 300]),
    out_features=COLUMNS,
    dtype=st.sampled_from(FLOATS),
    is_static=st.booleans(),
    is_per_tensor=st.booleans(),
    capability=st.sampled_from([80, 90]),
    seed=st.integers(0, 1000),
)
def test_fp8_equals_the_reference(
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    is_static: bool,
    is_per_tensor: bool,
    capability: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, in_features).to(dtype), torch.randn(out_features, in_features).to(torch.float8_e4m3fn)
    scale = torch.rand(1 if is_per_tensor else out_features) + 0.1
    arguments = (weight, scale, torch.rand(1) * 0.1 + 0.01 if is_static else None, torch.randn(out_features))
    with interpreted(capability):
        actual = linear_fp8_cuda(x, *arguments)
    assert_close(actual, linear_fp8_reference(x, *arguments))


@needs_triton
def test_leading_dimensions_are_kept_and_no_tokens_are_no_work() -> None:
    arguments = static_layer(48, 20)
    x = torch.randn(5, 2, 48).transpose(0, 1)
    with interpreted():
        assert torch.equal(linear_w8a8_cuda(x, *arguments), linear_w8a8_reference(x, *arguments))
        for call in (linear_w8a8_cuda, linear_w8a8_reference):
            assert call(torch.empty(2, 0, 48), *arguments).shape == (2, 0, 20)


@needs_triton
def test_what_is_no_number_stays_none() -> None:
    x = torch.ones(2, 64)
    x[1, 3] = float("nan")
    weight, scale = torch.ones((4, 64), dtype=torch.int8), torch.ones(4)
    with interpreted():
        outputs = (
            linear_w8a8_dynamic_cuda(x, weight, scale, None),
            linear_weight_only_cuda(x, weight, scale[:, None], None, None),
            linear_fp8_cuda(x, weight.to(torch.float8_e4m3fn), scale, None, None),
        )
    for output in outputs:
        assert output[0].isfinite().all() and output[1].isnan().all()


@needs_triton
def test_what_does_not_go_together_is_refused() -> None:
    with interpreted():
        with pytest.raises(ValueError, match="do not go together"):
            linear_w8a8_cuda(torch.randn(2, 65), *static_layer(64, 32))
        with pytest.raises(ValueError, match="quant_bias must be"):
            linear_w8a8_cuda(torch.randn(2, 64), *static_layer(64, 32)[:3], *static_layer(64, 31)[3:])
        with pytest.raises(ValueError, match="multiple of 32"):
            linear_weight_only_cuda(
                torch.randn(2, 96), *packed_layer(96, 8, 2, True, False)[:1], torch.ones(8, 6), None, None
            )
        with pytest.raises(ValueError, match="float8_e4m3fn"):
            linear_fp8_cuda(torch.randn(2, 64), torch.ones(8, 64), torch.ones(8), None, None)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile(capability: int) -> None:
    fp8 = torch.empty((4096, 4096), dtype=torch.float8_e4m3fn)
    scale = torch.empty(4096)
    with compiled(capability) as kernels:
        for rows in (1, 512):
            x = torch.empty((rows, 4096), dtype=torch.bfloat16)
            weight = torch.empty((4096, 4096), dtype=torch.int8)
            linear_w8a8_dynamic_cuda(x, weight, scale, None)
            linear_weight_only_cuda(x, weight, scale[:, None], None, None)
            linear_fp8_cuda(x, fp8, scale, None, None)
            packed, steps = torch.empty((4096, 2048), dtype=torch.uint8), torch.empty((4096, 32), dtype=torch.float16)
            linear_weight_only_cuda(x, packed, steps, steps, None)
        linear_w8a8_cuda(x, weight, scale[:1], scale[:1], torch.empty(4096, dtype=torch.int32), scale)
        linear_weight_only_cuda(x.float(), packed, steps, None, scale)
    assert len(kernels) == 14  # one token in int8 is one kernel
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED_MEMORY[capability] * 1024
    for kernel in kernels:
        if kernel.name == "codes_linear_kernel":
            assert "ld.global.b8" not in kernel.asm["ptx"] and "cp.async.cg.shared.global" in kernel.asm["ptx"]


def on_gpu(arguments: tuple) -> tuple:
    return tuple(argument.cuda() if isinstance(argument, torch.Tensor) else argument for argument in arguments)


@needs_gpu
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (1, torch.float16), (16, torch.bfloat16),
                                             (130, torch.float16)])  # fmt: skip
def test_on_a_gpu(rows: int, dtype: torch.dtype) -> None:
    """Real shapes."""
    torch.manual_seed(0)
    x = torch.randn(rows, 4096).to(dtype)
    static = static_layer(4096, 1030)
    fp8 = torch.randn(1030, 4096).to(torch.float8_e4m3fn)
    exact = (
        (linear_w8a8, linear_w8a8_reference, static),
        (linear_w8a8_dynamic, linear_w8a8_dynamic_reference, (static[0], static[4], None)),
    )
    for op, reference, arguments in exact * 2:  # as they are launched the first time, and from then on
        assert torch.equal(op(x.cuda(), *on_gpu(arguments)).cpu(), reference(x, *arguments))
    layers = [
        packed_layer(4096, 1030, num_groups, is_int4, True) for num_groups in (1, 32, 128) for is_int4 in (True, False)
    ]
    for arguments in layers:
        actual = linear_weight_only(x.cuda(), *on_gpu(arguments)).cpu()
        assert_close(actual, linear_weight_only_reference(x, *arguments))
    for scale in (None, torch.full((1,), 0.01)):
        arguments = (fp8, static[4], scale, torch.randn(1030))
        assert_close(linear_fp8(x.cuda(), *on_gpu(arguments)).cpu(), linear_fp8_reference(x, *arguments))


def gpu_calls() -> list[tuple[Callable, tuple]]:
    weight, scale = torch.randint(-128, 128, (64, 128), dtype=torch.int8), torch.rand(64)
    return [
        (linear_w8a8, static_layer(128, 64)),
        (linear_w8a8_dynamic, (weight, scale, None)),
        (linear_weight_only, (weight, scale[:, None], None, scale)),
        (linear_fp8, (weight.to(torch.float8_e4m3fn), scale, None, None)),
    ]


@needs_gpu
@pytest.mark.parametrize("index", range(4))
def test_opcheck_compile_and_graph_on_a_gpu(index: int) -> None:
    op, arguments = gpu_calls()[index]
    arguments = on_gpu(arguments)
    x = torch.randn(3, 128, dtype=torch.bfloat16, device="cuda")
    opcheck_on_gpu(op.default, (x, *arguments))
    expected = op(x, *arguments)
    compiled_op = torch.compile(lambda values: op(values, *arguments) * 1, fullgraph=True)
    assert torch.equal(compiled_op(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = op(x, *arguments)
    x.copy_(x * 2)
    graph.replay()
    assert torch.equal(output, op(x, *arguments))
