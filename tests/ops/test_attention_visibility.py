"""Which keys a query sees on the CPU: masks, causality, windows, lengths."""

from dataclasses import replace

import pytest
import torch

from .attention_calls import CODES, FLOATS, assert_close, call_of, causal_mask, int8_call, poison

pytestmark = pytest.mark.usefixtures("build")


@pytest.mark.parametrize("queries", [1, 2, 40])
@pytest.mark.parametrize("window", [1, 7, 250, 2000])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_a_window_in_float64(dtype: torch.dtype, window: int, queries: int) -> None:
    call = replace(call_of(dtype, dtype, queries, keys=1300), window=window)
    assert_close(call.run(), call.oracle())


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", CODES + FLOATS)
def test_length_equals_a_shorter_storage(dtype: torch.dtype, queries: int) -> None:
    call = call_of(dtype, dtype, queries, keys=700)
    shorter = replace(call, key=call.key[:, :, :450].clone(), value=call.value[:, :, :450].clone())
    expected = shorter.run()
    poison(call.key[:, :, 450:])
    poison(call.value[:, :, 450:])
    for length in (torch.tensor([450]), torch.tensor([450, 450], dtype=torch.int32)):
        assert_close(replace(call, length=length).run(), expected)


def test_no_token_in_use_gives_zeros() -> None:
    call = int8_call()
    assert not replace(call, length=torch.tensor([0, 40])).run()[0].any()
    assert not replace(call, length=torch.tensor([0])).run().any()


@pytest.mark.parametrize("queries", [2, 40])
def test_causality_equals_its_mask(queries: int) -> None:
    call = int8_call(queries, keys=130)
    assert_close(call.run(), replace(call, mask=causal_mask(queries, 130)).run())


@pytest.mark.parametrize("queries", [1, 20])
def test_a_chunk_of_a_prompt_sees_what_the_whole_prompt_sees(queries: int) -> None:
    call = int8_call(queries=130, keys=130)
    last = replace(call, query=call.query[:, :, -queries:])
    assert_close(last.run(), call.run()[:, -queries:], call.has_many_rows())


@pytest.mark.parametrize("queries", [2, 40])
def test_a_query_that_sees_nothing_gets_zeros(queries: int) -> None:
    call = int8_call(queries, keys=50)
    mask = torch.ones(queries, 50, dtype=torch.bool)
    mask[1] = False
    output = replace(call, mask=mask, value_zero=torch.ones(2, 1, 1)).run()
    assert not output[:, 1].any()
    assert output[:, 0].all()


@pytest.mark.parametrize("keys", [50, 1100])
def test_a_mask_of_one_column_is_for_all_keys(keys: int) -> None:
    call = int8_call(queries=3, keys=keys)
    mask = torch.tensor([True, False, True])[:, None]
    written_out = replace(call, mask=mask.expand(3, keys))
    assert_close(replace(call, mask=mask).run(), written_out.run())
    assert_close(replace(call, mask=mask).reference(), written_out.run())


def test_more_queries_than_keys_leave_the_first_blind() -> None:
    output = int8_call(queries=5, keys=3).run()
    assert not output[:, :2].any()
    assert output[:, 2:].any(dim=-1).all()


@pytest.mark.parametrize("queries", [1, 40])
def test_what_lies_behind_the_last_token_is_not_read(queries: int) -> None:
    call = int8_call(queries, keys=50)
    storage = torch.full((2, 2, 80, 32), float("nan"))
    storage[:, :, :50] = call.key
    floats = replace(call, key=storage[:, :, :50], value=storage[:, :, :50])
    assert torch.isfinite(floats.run()).all()
