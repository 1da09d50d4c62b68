"""Contract tests of which keys a query sees on an NPU: lengths, windows, segments."""

from typing import Any

import pytest
import torch

from ..metrics import relative_rmse
from ..tolerances import TOLERANCES
from .npu_attention_calls import (
    BATCH,
    GROUPS,
    both,
    int8_problem,
    padding_mask,
    problem,
    tolerance,
    with_queries,
    with_room,
)
from .npu_double import TorchNpu


@pytest.mark.parametrize("granularity", [None, "channel", "head", "token"])
@pytest.mark.parametrize("case", [{}, {"causal": False}])
def test_a_segment_at_decode_is_read_whole(npu: TorchNpu, granularity: str | None, case: dict[str, Any]) -> None:
    """More tokens than are stored: the query stands further on."""
    arguments = {**problem(granularity, False, torch.float16, 96, 96), "length": torch.tensor([300, -4]), **case}
    result, expected = both(arguments)
    (_, call), = npu.calls  # fmt: skip
    assert call["actual_seq_lengths_kv"] == [96, 1] and not result[1].any()
    assert relative_rmse(result, expected) <= tolerance(torch.float16)


@pytest.mark.parametrize("granularity", [None, "channel", "head", "token"])
@pytest.mark.parametrize("lengths", [[70, 9], [70], [1, 0]])
@pytest.mark.parametrize("queries", [1, 12])
def test_length(npu: TorchNpu, granularity: str | None, lengths: list[int], queries: int) -> None:
    arguments = with_queries(with_room(problem(granularity, False, torch.float16, 70, 96), 96), queries)
    result, expected = both({**arguments, "length": torch.tensor(lengths)})
    assert npu.ops() == ["npu_fused_infer_attention_score"] * (queries == 1 or granularity != "token")
    for _, call in npu.calls:
        assert call["actual_seq_lengths_kv"] == [max(1, n) for n in (lengths if len(lengths) > 1 else lengths * BATCH)]
        assert call["key"].data_ptr() == arguments["key"].data_ptr()
    assert relative_rmse(result, expected) <= tolerance(torch.float16)


@pytest.mark.parametrize("lengths", [[70, 9], [70], [1, 0]])
@pytest.mark.parametrize("window", [0, 33])
def test_length_with_int8_queries(npu: TorchNpu, lengths: list[int], window: int) -> None:
    arguments = with_room(int8_problem(torch.float16, 70, 96), 96)
    result, expected = both({**arguments, "length": torch.tensor(lengths), "window": window})
    assert npu.ops() == ["npu_quantize"] + ["_npu_paged_attention_quant"] * GROUPS
    assert relative_rmse(result, expected) <= TOLERANCES["npu int8 attention rmse"]


@pytest.mark.parametrize("granularity", [None, "channel", "head", "token"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("window", [1, 33, 69, 70])
def test_window_at_decode_reads_what_is_in_it(
    npu: TorchNpu, granularity: str | None, affine: bool, window: int
) -> None:
    result, expected = both({**problem(granularity, affine, torch.float16, 70, 96), "window": window})
    (_, call), = npu.calls  # fmt: skip
    assert call["actual_seq_lengths_kv"] == [window] * BATCH and call["key"].shape[2] == (96 if window == 70 else 128)
    assert relative_rmse(result, expected) <= tolerance(torch.float16)


@pytest.mark.parametrize("granularity", [None, "channel", "token"])
@pytest.mark.parametrize("lengths", [[70, 9], [70, 40], [5, 3]])
def test_window_at_decode_of_sequences_of_different_lengths(
    npu: TorchNpu, granularity: str | None, lengths: list[int]
) -> None:
    arguments = with_room(problem(granularity, False, torch.float16, 70, 96), 96)
    result, expected = both({**arguments, "length": torch.tensor(lengths), "window": 33})
    assert npu.calls[0][1]["actual_seq_lengths_kv"] == [min(33, tokens) for tokens in lengths]
    assert relative_rmse(result, expected) <= tolerance(torch.float16)


@pytest.mark.parametrize("granularity", [None, "channel"])
@pytest.mark.parametrize("window", [1, 5, 40, 70])
@pytest.mark.parametrize("lengths", [None, [70, 30], [70, 4]])
@pytest.mark.parametrize("queries", [2, 12])
def test_window_of_several_queries(
    npu: TorchNpu, granularity: str | None, window: int, lengths: list[int] | None, queries: int
) -> None:
    arguments = with_queries(problem(granularity, False, torch.float16, 70, 96), queries)
    length = None if lengths is None else torch.tensor(lengths)
    result, expected = both({**arguments, "window": window, "length": length})
    (_, call), = npu.calls  # fmt: skip
    assert call["sparse_mode"] == (3 if window == 70 else 4)
    assert relative_rmse(result, expected) <= tolerance(torch.float16)


def test_a_window_that_is_one_key_too_wide_fails(npu: TorchNpu, monkeypatch: pytest.MonkeyPatch) -> None:
    right = npu.npu_fused_infer_attention_score

    def wrong(*args: Any, pre_tokens: int, **kwargs: Any) -> Any:
        return right(*args, pre_tokens=pre_tokens + 1, **kwargs)

    monkeypatch.setattr(npu, "npu_fused_infer_attention_score", wrong)
    result, expected = both({**with_queries(problem(None, False, torch.float16, 70, 96), 12), "window": 5})
    assert relative_rmse(result, expected) > 100 * tolerance(torch.float16)


def test_a_window_without_causality_or_beside_a_mask_is_none(npu: TorchNpu) -> None:
    arguments = {**with_queries(problem(None, False, torch.float16, 70, 96), 12), "window": 5}
    for case in ({"causal": False}, {"mask": padding_mask(12, 70)}):
        result, expected = both({**arguments, **case})
        assert relative_rmse(result, expected) <= tolerance(torch.float16)
    assert [call.get("sparse_mode", 0) for _, call in npu.calls] == [0, 1]
