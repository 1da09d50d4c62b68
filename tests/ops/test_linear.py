"""Linears on the CPU: W8A8 equals its reference exactly, as sums are whole numbers; the others sum in float32."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from octavo.ops import (
    linear_fp8,
    linear_fp8_block,
    linear_grouped,
    linear_w8a8,
    linear_w8a8_dynamic,
    linear_weight_only,
)
from octavo.ops.linear.reference import (
    linear_fp8_block_reference,
    linear_fp8_reference,
    linear_grouped_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)
from octavo.ops.shared.codes import expand_scale, pack_int4, unpack_int4

from ..tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("build")


def layer(in_features: int, out_features: int) -> tuple[torch.Tensor, ...]:
    """Random weight, input scale and offset, bias and dequantization scale of a layer."""
    return (
        torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8),
        torch.rand(1) * 0.05 + 0.005,
        torch.randint(-50, 50, (1,)).float(),
        torch.randint(-10000, 10000, (out_features,), dtype=torch.int32),
        torch.rand(out_features) * 0.01,
    )


@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 7, 12, 13, 20, 37, 100, 400]),
    in_features=st.sampled_from([1, 7, 16, 31, 64, 77, 250, 576, 1000]),
    out_features=st.sampled_from([1, 3, 16, 17, 64, 65, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(rows: int, in_features: int, out_features: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, in_features).to(dtype)
    arguments = layer(in_features, out_features)
    assert torch.equal(linear_w8a8(x, *arguments), linear_w8a8_reference(x, *arguments))


FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = st.sampled_from([1, 2, 3, 4, 5, 7, 13, 16, 17, 20, 37, 100, 400])
COLUMNS = st.sampled_from([1, 3, 16, 17, 33, 64, 65, 130])
BIASES = st.sampled_from([None, *FLOAT_DTYPES])


def bias_of(out_features: int, dtype: torch.dtype | None) -> torch.Tensor | None:
    return None if dtype is None else torch.randn(out_features).to(dtype)


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Of one shape and dtype, and but for the rounding of sums equal."""
    assert output.shape == expected.shape
    assert output.dtype == expected.dtype
    name = "linear" if output.dtype == torch.float32 else "linear in half"
    size = expected.float().pow(2).mean().sqrt().clamp_min(1e-30)  # a weight of one channel may be 0
    error = (output.float() - expected.float()).pow(2).mean().sqrt() / size
    assert error <= TOLERANCES[name]


@settings(max_examples=80, deadline=None)
@given(
    rows=ROWS,
    in_features=st.sampled_from([1, 7, 16, 31, 64, 77, 250, 576, 1100]),
    out_features=COLUMNS,
    dtype=st.sampled_from(FLOAT_DTYPES),
    bias=BIASES,
    seed=st.integers(0, 1000),
)
def test_dynamic_equals_the_reference(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, bias: torch.dtype | None, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(rows, in_features) * torch.rand(rows, 1) * 10).to(dtype)
    weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    arguments = (x, weight, torch.rand(out_features) * 0.01, bias_of(out_features, bias))
    assert torch.equal(linear_w8a8_dynamic(*arguments), linear_w8a8_dynamic_reference(*arguments))


@settings(max_examples=100, deadline=None)
@given(
    rows=ROWS,
    in_features=st.sampled_from([1, 7, 31, 32, 77, 96, 128, 320, 576, 1024]),
    out_features=COLUMNS,
    group=st.sampled_from([None, 32, 64, 128]),
    is_int4=st.booleans(),
    has_zero=st.booleans(),
    scale_dtype=st.sampled_from([torch.float32, torch.float16]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    bias=BIASES,
    seed=st.integers(0, 1000),
)
def test_weight_only_is_close_to_the_reference(
    rows: int,
    in_features: int,
    out_features: int,
    group: int | None,
    is_int4: bool,
    has_zero: bool,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    in_features = -(-in_features // 32) * 32 if is_int4 else in_features
    num_groups = 1 if group is None or in_features % group else in_features // group
    weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    if is_int4:
        weight = pack_int4(weight >> 4, 32)
    scale = (torch.rand(out_features, num_groups) * 0.02 + 0.001).to(scale_dtype)
    zero = (torch.randn(out_features, num_groups) * (2 if is_int4 else 30)).to(scale_dtype) if has_zero else None
    arguments = (torch.randn(rows, in_features).to(dtype), weight, scale, zero, bias_of(out_features, bias))
    assert_close(linear_weight_only(*arguments), linear_weight_only_reference(*arguments))


def grouped_arguments(
    rows: int, in_features: int, out_features: int, group: int, is_int4: bool, has_zero: bool, seed: int
) -> tuple[torch.Tensor, ...]:
    """x whose groups differ in size, and a weight in groups."""
    torch.manual_seed(seed)
    num_groups = in_features // group
    weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    if is_int4:
        weight = pack_int4(weight >> 4, 32)
    scale = torch.rand(out_features, num_groups) * 0.02 + 0.001
    zero = torch.randint(-8, 8, scale.shape).float() if has_zero else None
    x = torch.randn(rows, num_groups, group) * 10 ** (torch.rand(rows, num_groups, 1) * 2 - 1)
    return x.view(rows, in_features), weight, scale, zero, bias_of(out_features, torch.float32)


@settings(max_examples=80, deadline=None)
@given(
    rows=ROWS,
    shape=st.sampled_from([(32, 32), (64, 32), (96, 96), (320, 64), (576, 32), (1024, 128), (31, 31), (77, 77)]),
    out_features=COLUMNS,
    is_int4=st.booleans(),
    has_zero=st.booleans(),
    dtype=st.sampled_from(FLOAT_DTYPES),
    seed=st.integers(0, 1000),
)
def test_grouped_is_close_to_the_reference(
    rows: int,
    shape: tuple[int, int],
    out_features: int,
    is_int4: bool,
    has_zero: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    assume(rows * out_features >= 16)  # of few numbers, whose terms may cancel, a relative error says little
    x, *arguments = grouped_arguments(
        rows, shape[0], out_features, shape[1], is_int4 and shape[0] % 32 == 0, has_zero, seed
    )
    x = x.to(dtype)
    assert_close(linear_grouped(x, *arguments, shape[1]), linear_grouped_reference(x, *arguments, shape[1]))


@pytest.mark.parametrize("is_int4", [True, False])
@pytest.mark.parametrize("has_zero", [True, False])
@pytest.mark.parametrize("group", [32, 16])
def test_the_grouped_reference_is_its_formula(is_int4: bool, has_zero: bool, group: int) -> None:
    x, weight, scale, zero, bias = grouped_arguments(5, 96, 12, 32, is_int4, has_zero, 0)
    x_scale = (x.double().view(5, -1, group).abs().amax(-1) / 127).float()
    codes = (x.view(5, -1, group) / x_scale[..., None]).round().clamp(-128, 127).double()
    weight_codes = (unpack_int4(weight, 32) if is_int4 else weight).double()
    weight_codes = weight_codes - (0 if zero is None else expand_scale(zero, 12, 96).double())
    expected = bias.double().expand(5, 12).clone()
    for part in range(96 // group):
        sums = codes[:, part] @ weight_codes[:, part * group : (part + 1) * group].T
        expected += sums * x_scale[:, part, None].double() * scale[:, part * group // 32].double()
    found = linear_grouped_reference(x, weight, scale, zero, bias, group)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS,
    in_features=st.sampled_from([1, 7, 31, 32, 77, 320, 1024]),
    out_features=COLUMNS,
    is_static=st.booleans(),
    is_per_tensor=st.booleans(),
    dtype=st.sampled_from(FLOAT_DTYPES),
    bias=BIASES,
    seed=st.integers(0, 1000),
)
def test_fp8_is_close_to_the_reference(
    rows: int,
    in_features: int,
    out_features: int,
    is_static: bool,
    is_per_tensor: bool,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(out_features, in_features) * 10 ** torch.randn(out_features, in_features)).clamp(-448, 448)
    scale = torch.rand(1 if is_per_tensor else out_features) * 0.01 + 0.001
    input_scale = torch.rand(1) * 0.05 + 0.001 if is_static else None
    x = torch.randn(rows, in_features).to(dtype)
    arguments = (x, weight.to(torch.float8_e4m3fn), scale, input_scale, bias_of(out_features, bias))
    assert_close(linear_fp8(*arguments), linear_fp8_reference(*arguments))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_every_fp8_code_counts_as_what_it_is(rows: int) -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    weight = torch.zeros(256, 256, dtype=torch.uint8)
    weight[:, 3] = codes
    x = torch.zeros(rows, 256)
    x[:, 3] = 1.0
    weight = weight.view(torch.float8_e4m3fn)
    output = linear_fp8(x, weight, torch.ones(1), torch.ones(1), None)
    assert torch.equal(output, weight[:, 3].float().expand(rows, -1))


@pytest.mark.parametrize("rows", [1, 4, 5, 17, 40])
@pytest.mark.parametrize(("in_features", "out_features"), [(128, 5), (256, 128), (384, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_in_blocks(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    """As DeepSeek defines it, block by block in float64."""
    torch.manual_seed(rows)
    weight = (torch.randn(out_features, in_features) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-out_features // 128), in_features // 128) * 0.01 + 0.001
    x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(out_features)
    output = linear_fp8_block(x, weight, scale, bias)
    assert output.dtype == dtype
    assert_close(output, linear_fp8_block_reference(x, weight, scale, bias))
    expected = bias.double().repeat(rows, 1)
    for first in range(0, in_features, 128):
        part = x[:, first : first + 128].float()
        of_row = part.abs().amax(1, keepdim=True) / 448
        codes = (part / of_row).to(torch.float8_e4m3fn).double()
        for row in range(0, out_features, 128):
            block = weight[row : row + 128, first : first + 128].double()
            expected[:, row : row + 128] += codes @ block.T * of_row * scale[row // 128, first // 128].double()
    assert (output.double() - expected).abs().max() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_every_fp8_code_of_a_block_counts_as_what_it_is(rows: int) -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    weight = torch.zeros(256, 256, dtype=torch.uint8)
    weight[:, 3] = codes
    x = torch.zeros(rows, 256)
    x[:, 3] = 448.0
    output = linear_fp8_block(x, weight.view(torch.float8_e4m3fn), torch.full((2, 2), 1 / 448), None)
    torch.testing.assert_close(output, weight[:, 3].view(torch.float8_e4m3fn).float().expand(rows, -1))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_nan_stays_visible(rows: int) -> None:
    x, weight = torch.randn(rows, 64), torch.randn(20, 64).to(torch.float8_e4m3fn)
    codes, scale = torch.ones(20, 64, dtype=torch.int8), torch.ones(20)
    weight[7, 5] = float("nan")
    is_nan = linear_fp8(x, weight, scale, None, None).isnan()
    assert is_nan[:, 7].all()
    assert is_nan.sum() == rows
    x[0, 33] = float("nan")
    for output in (
        linear_fp8(x, weight, scale, None, None),
        linear_w8a8_dynamic(x, codes, scale, None),
        linear_weight_only(x, codes, scale[:, None], None, None),
        linear_grouped(x, codes, torch.ones(20, 2), None, None, 32),
        linear_fp8_block(torch.cat((x, x), 1), torch.cat((weight, weight), 1), torch.ones(1, 1), None),
    ):
        assert output[0].isnan().all()
        assert rows == 1 or not output[1:, :7].isnan().any()


def test_a_row_of_zeros_gives_the_bias() -> None:
    x, bias = torch.zeros(3, 64), torch.randn(5)
    weight = torch.randn(5, 64)
    assert torch.equal(linear_w8a8_dynamic(x, weight.to(torch.int8), torch.ones(5), bias), bias.expand(3, 5))
    assert torch.equal(linear_fp8(x, weight.to(torch.float8_e4m3fn), torch.ones(5), None, bias), bias.expand(3, 5))


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_the_extreme_codes_do_not_saturate(rows: int) -> None:
    in_features, out_features = 4096, 3
    x = torch.full((rows, in_features), -1e6)  # codes of -128
    weight = torch.full((out_features, in_features), -128, dtype=torch.int8)
    bias, scale = torch.zeros(out_features, dtype=torch.int32), torch.ones(out_features)
    output = linear_w8a8(x, weight, torch.ones(1), torch.zeros(1), bias, scale)
    assert torch.equal(output, torch.full((rows, out_features), 128.0 * 128 * in_features))


def test_leading_dimensions_and_strides_are_kept() -> None:
    arguments = layer(48, 20)
    x = torch.randn(5, 2, 48).transpose(0, 1)
    output = linear_w8a8(x, *arguments)
    assert output.shape == (2, 5, 20)
    assert torch.equal(output[1, 3], linear_w8a8(x[1, 3].clone(), *arguments))
    weight, scale = arguments[0], arguments[4]
    for op, rest in (
        (linear_w8a8, arguments),
        (linear_w8a8_dynamic, (weight, scale, None)),
        (linear_weight_only, (weight, scale[:, None], None, None)),
        (linear_grouped, (weight, scale[:, None], None, None, 48)),
        (linear_fp8, (weight.to(torch.float8_e4m3fn), scale, None, None)),
    ):
        output = op(x, *rest)
        assert output.shape == (2, 5, 20)
        assert torch.equal(output, op(x.contiguous(), *rest))
        assert op(torch.empty(2, 0, 48), *rest).shape == (2, 0, 20)
        assert op(x.double(), *rest).dtype == torch.float64


def test_strided_weights_and_scales_are_taken() -> None:
    x, weight, scale = torch.randn(3, 64), torch.randint(-128, 128, (128, 40), dtype=torch.int8), torch.rand(40, 4)
    strided = weight.T[:, ::2], scale[:, ::2], -scale[:, 1::2]
    expected = linear_weight_only(x, *(part.contiguous() for part in strided), None)
    assert torch.equal(linear_weight_only(x, *strided, None), expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    arguments = layer(576, 200)
    x = torch.randn(50, 576)
    rows = torch.cat([linear_w8a8(x[row : row + 1], *arguments) for row in range(50)])
    assert torch.equal(linear_w8a8(x, *arguments), rows)


def test_another_input_gives_another_output() -> None:
    arguments = layer(64, 32)
    x = torch.randn(2, 64)
    assert not torch.equal(linear_w8a8(x, *arguments), linear_w8a8(x + 1, *arguments))


def test_a_weight_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        linear_w8a8(torch.randn(2, 65), *layer(64, 32))


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    x, codes, scale = torch.randn(2, 64), torch.zeros(8, 64, dtype=torch.int8), torch.ones(8)
    packed, fp8 = torch.zeros(8, 32, dtype=torch.uint8), torch.zeros(8, 64).to(torch.float8_e4m3fn)
    refused = [
        ("do not go together", lambda: linear_w8a8_dynamic(x[:, 1:], codes, scale, None)),
        ("do not go together", lambda: linear_w8a8_dynamic(x, packed, scale, None)),
        ("weight_scale must be float32 [8]", lambda: linear_w8a8_dynamic(x, codes, scale[1:], None)),
        ("bias (7,)", lambda: linear_w8a8_dynamic(x, codes, scale, scale[1:])),
        ("weight_scale (8, 3)", lambda: linear_weight_only(x, codes, torch.ones(8, 3), None, None)),
        ("not 16", lambda: linear_weight_only(x, codes, torch.ones(8, 4), None, None)),
        ("weight_zero (8, 1)", lambda: linear_weight_only(x, codes, torch.ones(8, 2), torch.ones(8, 1), None)),
        ("do not go together", lambda: linear_weight_only(x[:, :48], packed[:, :24], scale[:, None], None, None)),
        ("do not go together", lambda: linear_weight_only(x, fp8, scale[:, None], None, None)),
        ("do not go together", lambda: linear_fp8(x, codes, scale, None, None)),
        ("weight_scale must be float32 [8]", lambda: linear_fp8(x, fp8, scale[1:], None, None)),
        ("input_scale must be float32 [1]", lambda: linear_fp8(x, fp8, scale, scale, None)),
    ]
    for reason, call in refused:
        with pytest.raises(ValueError, match=re.escape(reason)):
            call()


def test_opcheck() -> None:
    x, codes, bias = torch.randn(2, 3, 64), torch.zeros(32, 64, dtype=torch.int8), torch.randn(32)
    packed, scale = torch.zeros(32, 32, dtype=torch.uint8), torch.rand(32, 2)
    ops = torch.ops.octavo
    torch.library.opcheck(ops.linear_w8a8.default, (x, *layer(64, 32)))
    torch.library.opcheck(ops.linear_w8a8_dynamic.default, (x, codes, scale[:, 0].contiguous(), bias))
    torch.library.opcheck(ops.linear_weight_only.default, (x, packed, scale, scale, bias))
    torch.library.opcheck(ops.linear_weight_only.default, (x, codes, scale[:, :1], None, None))
    torch.library.opcheck(ops.linear_grouped.default, (x, packed, scale, scale, bias, 32))
    arguments = (x, codes.to(torch.float8_e4m3fn), bias, None, bias)
    checks = ("test_faketensor", "test_aot_dispatch_dynamic")  # test_schema cannot compare fp8 tensors
    torch.library.opcheck(ops.linear_fp8.default, arguments, test_utils=checks)
    blocks = torch.randn(2, 128), torch.ones(32, 128).to(torch.float8_e4m3fn), torch.ones(1, 1), bias
    torch.library.opcheck(ops.linear_fp8_block.default, blocks, test_utils=checks)
