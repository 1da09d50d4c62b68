"""Scores by position and the log-sum-exp of the CUDA kernels, interpreted."""

import pytest
import torch

from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.reference import attention_lse_reference

from ..metrics import relative_rmse
from ..tolerances import TOLERANCES
from .cuda_attention_calls import (
    assert_both_close,
    assert_close,
    call,
    run,
    run_lse,
    with_positions,
)
from .cuda_double import needs_triton


@needs_triton
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("forms", [("token", "channel"), ("channel", "channel"), ("head", "head"), ("none", "channel")])
def test_log_sum_exp_knows_zero_points_that_cancel(forms: tuple[str, str], queries: int) -> None:
    kind = "float32" if forms[0] == "none" else "int8"
    arguments = call(kind, "int8", (*forms, "head", "none"), torch.float32, queries, 150)
    for processors in (1, 4):
        assert_both_close(run_lse(arguments, processors=processors), arguments)


@needs_triton
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("width", [1, 100, 256])
def test_scores_by_position_of_any_width(width: int, queries: int) -> None:
    arguments = with_positions(call(queries=queries, tokens=150, unused=9), width)
    for processors in (1, 12):
        assert_both_close(run_lse(arguments, processors=processors), arguments)


@needs_triton
@pytest.mark.parametrize("queries", [1, 20])
def test_large_scores_by_position_lose_no_more_than_float32(queries: int) -> None:
    arguments = with_positions(call(queries=queries, tokens=150), 64, size=400.0)
    output, lse = run_lse(arguments)
    exact = {**arguments, "query": arguments["query"].double()}
    expected, expected_lse = attention_lse_reference(ATTENTION_CALL.of(**exact))
    assert expected_lse.max() > 1000
    assert relative_rmse(output, expected) <= TOLERANCES["attention with large scores by position"]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("start", [-400, -30, 70, 10**12])
def test_rows_beyond_the_table_are_its_ends(start: int) -> None:
    """What stands around the table is not read."""
    arguments = with_positions(call(queries=3, tokens=150), 16)
    storage = torch.full((290, 16), float("nan"))
    storage[100:190] = arguments["position_table"]
    for first in (torch.tensor([start]), torch.tensor([min(start, 10**9), 3], dtype=torch.int32)):
        changed = {**arguments, "position_table": storage[100:190], "position_start": first}
        assert_both_close(run_lse(changed), changed)


@needs_triton
def test_scores_by_position_take_any_layout_and_dtype() -> None:
    arguments = with_positions(call(queries=3, tokens=150), 16)
    expected = run(arguments)
    spread = torch.full((90, 3, 16), float("nan"))
    spread[:, 1] = arguments["position_table"]
    for table in (spread[:, 1], arguments["position_table"].mT.contiguous().mT):
        assert torch.equal(run({**arguments, "position_table": table}), expected)
    halves = {name: arguments[name].bfloat16() for name in ("position_query", "position_table")}
    assert_close(run({**arguments, **halves}), {**arguments, **halves})


@needs_triton
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize(("window", "causal"), [(0, True), (50, True), (0, False)])
@pytest.mark.parametrize("processors", [1, 12])
def test_segments_are_merged_by_their_log_sum_exp(queries: int, window: int, causal: bool, processors: int) -> None:
    """Of which some are not seen at all."""
    arguments = with_positions(
        call("int8", "int8", ("token", "none", "token", "none"), queries=queries, tokens=260), 16
    )
    arguments |= {"window": window, "causal": causal, "length": torch.tensor([260, 40])}
    parts = []
    for start, stop in ((0, 16), (16, 200), (200, 260)):
        cut = {name: arguments[name][:, :, start:stop] for name in ("key", "value", "key_scale", "value_scale")}
        cut |= {name: arguments[name] + moved for name, moved in (("length", -start), ("position_start", start))}
        parts.append(run_lse({**arguments, **cut}, processors=processors))
    lses = torch.stack([lse for _, lse in parts])
    weights = (lses - lses.logsumexp(dim=0).clamp_min(-1e30)).exp().transpose(-1, -2)[..., None]
    assert_close((torch.stack([output for output, _ in parts]) * weights).sum(dim=0), arguments)
