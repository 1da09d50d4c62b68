"""Scores by position on the CPU."""

from dataclasses import replace

import pytest
import torch

from ..metrics import relative_rmse
from ..tolerances import TOLERANCES
from .attention_calls import (
    CODES,
    FLOATS,
    add_positions,
    assert_close,
    assert_lse_close,
    call_of,
    int8_call,
)

pytestmark = pytest.mark.usefixtures("build")


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("dtype", CODES + FLOATS)
@pytest.mark.parametrize("width", [1, 16, 60, 64, 128])
def test_scores_by_position_in_float64(dtype: torch.dtype, queries: int, width: int) -> None:
    call = add_positions(call_of(dtype, dtype, queries, keys=333), width)
    output, lse = call.run_lse()
    expected, expected_lse = call.oracle_lse()
    assert_close(output, expected)
    assert_lse_close(lse, expected_lse)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float32])
def test_large_scores_by_position_lose_no_more_than_float32(dtype: torch.dtype, queries: int) -> None:
    """Up to 1,000 and more: what is left of a score is exact to a few 1e-4, and so are the weights."""
    call = call_of(dtype, dtype, queries, keys=700, width=64)
    call.scaling = 0.125
    add_positions(call, 64, rows=800, size=400.0)
    terms = call.position_query @ call.position_table[:600].mT * call.scaling
    assert terms.abs().max() > 1000
    output, lse = call.run_lse()
    expected, expected_lse = call.oracle_lse()
    assert relative_rmse(output, expected) < TOLERANCES["attention with large scores by position"]
    tolerance = TOLERANCES["log-sum-exp of large scores by position"]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("queries", [1, 40])
def test_a_bias_of_k_that_is_left_out_enters_by_position(queries: int) -> None:
    """RoPE of a bias that dwarfs K: what Qwen2 has on single channels."""
    keys, width, half = 300, 32, 16
    angles = torch.arange(keys)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos().double(), angles.sin().double()
    bias = torch.zeros(2, width).double()
    bias[:, 5], bias[0, 20], bias[1, 31] = 200, -90, 150
    first, second = bias[:, None, :half], bias[:, None, half:]
    rotated = torch.cat((cos * first - sin * second, cos * second + sin * first), dim=-1)
    call = call_of(torch.float32, torch.float32, queries, keys, width=width)
    whole = replace(call, key=call.key.double() + rotated)
    q1, q2 = call.query[..., :half], call.query[..., half:]
    b1, b2 = (part.float().repeat_interleave(3, dim=0) for part in (first, second))
    call.position_query = torch.cat((q1 * b1 + q2 * b2, q2 * b1 - q1 * b2), dim=-1)
    call.position_table = torch.cat((cos, sin), dim=-1).float()
    call.position_start = torch.tensor([0])
    assert relative_rmse(call.run(), whole.oracle()) < TOLERANCES["attention with large scores by position"]


@pytest.mark.parametrize("queries", [1, 2, 40])
@pytest.mark.parametrize("start", [-500, -30, 0, 90, 10**12])
def test_rows_beyond_the_table_are_its_ends(queries: int, start: int) -> None:
    """What stands around the table is not read."""
    call = add_positions(int8_call(queries, keys=250), 16)
    storage = torch.full((400, 16), float("nan"))
    storage[100:300] = call.position_table[:200]
    call.position_table, call.position_start = storage[100:300], torch.tensor([start])
    rows = (start + torch.arange(250)).clamp(0, 199)
    written_out = replace(call, position_table=storage[100:300][rows], position_start=torch.tensor([0, 0]))
    assert_close(call.run(), written_out.run())
    assert_close(call.reference(), written_out.run())


@pytest.mark.parametrize("queries", [1, 40])
def test_scores_by_position_take_any_layout_and_dtype(queries: int) -> None:
    call = add_positions(int8_call(queries, keys=250), 16)
    expected = call.run()
    spread = torch.empty(500, 3, 16)
    spread[:, 1] = call.position_table
    for table in (spread[:, 1], call.position_table.mT.contiguous().mT, call.position_table.double()):
        assert torch.equal(replace(call, position_table=table).run(), expected)
    rows = call.position_query
    for query in (rows.contiguous(), rows.mT.contiguous().mT, rows.double()):
        assert torch.equal(replace(call, position_query=query).run(), expected)
    assert torch.equal(replace(call, position_start=call.position_start.int()).run(), expected)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["position_query", "position_table"])
@pytest.mark.parametrize("queries", [1, 40])
def test_scores_by_position_that_are_no_number_stay_none(queries: int, broken: str, what: float) -> None:
    call = add_positions(int8_call(queries, keys=250), 16)
    call.position_start = torch.tensor([0])
    getattr(call, broken)[..., 0, 3] = what
    output, lse = call.run_lse()
    expected, expected_lse = call.reference_lse()
    assert torch.equal(output.isfinite(), expected.isfinite()) and torch.equal(lse.isfinite(), expected_lse.isfinite())
    assert not output.isfinite().all()
