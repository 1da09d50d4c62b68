"""The W8A8 linear op on the CPU equals its reference exactly: sums are whole numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import linear_w8a8
from octavo.ops.linear.reference import linear_w8a8_reference

pytestmark = pytest.mark.usefixtures("build")


def layer(depth: int, columns: int) -> tuple[torch.Tensor, ...]:
    """Random weight, input scale and offset, bias and dequantization scale of a layer."""
    return (
        torch.randint(-128, 128, (columns, depth), dtype=torch.int8),
        torch.rand(1) * 0.05 + 0.005,
        torch.randint(-50, 50, (1,)).float(),
        torch.randint(-10000, 10000, (columns,), dtype=torch.int32),
        torch.rand(columns) * 0.01,
    )


@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 7, 12, 13, 20, 37, 100, 400]),
    depth=st.sampled_from([1, 7, 16, 31, 64, 77, 250, 576, 1000]),
    columns=st.sampled_from([1, 3, 16, 17, 64, 65, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(rows: int, depth: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, depth).to(dtype)
    arguments = layer(depth, columns)
    assert torch.equal(linear_w8a8(x, *arguments), linear_w8a8_reference(x, *arguments))


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_the_extreme_codes_do_not_saturate(rows: int) -> None:
    depth, columns = 4096, 3
    x = torch.full((rows, depth), -1e6)  # codes of -128
    weight = torch.full((columns, depth), -128, dtype=torch.int8)
    bias, scale = torch.zeros(columns, dtype=torch.int32), torch.ones(columns)
    output = linear_w8a8(x, weight, torch.ones(1), torch.zeros(1), bias, scale)
    assert torch.equal(output, torch.full((rows, columns), 128.0 * 128 * depth))


def test_leading_dimensions_and_strides_are_kept() -> None:
    arguments = layer(48, 20)
    x = torch.randn(5, 2, 48).transpose(0, 1)
    output = linear_w8a8(x, *arguments)
    assert output.shape == (2, 5, 20)
    assert torch.equal(output[1, 3], linear_w8a8(x[1, 3].clone(), *arguments))
    assert linear_w8a8(torch.empty(2, 0, 48), *arguments).shape == (2, 0, 20)


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


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.octavo.linear_w8a8.default, (torch.randn(2, 3, 64), *layer(64, 32)))
