"""Attention of CUDA GPUs against its reference, over codes of every kind, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.reference import attention_reference

from ..metrics import relative_rmse
from ..tolerances import TOLERANCES
from .cuda_attention_calls import (
    BATCH,
    CODES,
    GROUPS,
    assert_both_close,
    assert_close,
    call,
    run,
    run_lse,
    with_positions,
)
from .cuda_double import needs_triton

STATIC = st.sampled_from(["head", "channel", "token"])


FORMS = st.one_of(
    st.tuples(STATIC, st.sampled_from(["none", "head", "channel", "token"])),
    st.sampled_from(
        [
            ("token and channels", "token and channels"),
            ("token and few channels", "none"),
            ("tokens and channel", "tokens and channel"),
            ("channel", "tokens and channel"),
            ("token", "token and channels"),
        ]
    ),
)


KINDS = st.sampled_from(["int8", "int4", "e4m3", "e5m2", "own", "float32"])


@needs_triton
@settings(max_examples=60, deadline=None)
@given(
    kinds=st.tuples(KINDS, KINDS),
    forms=st.tuples(FORMS, FORMS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    queries=st.sampled_from([1, 1, 2, 5, 30]),
    tokens=st.sampled_from([1, 2, 63, 64, 97, 300]),
    width=st.sampled_from([16, 64, 80, 128]),
    ratio=st.sampled_from([1, 3, 4]),
    token_groups=st.sampled_from([(1, 1), (5, 1), (32, 32), (16, 128)]),
    quantizes_query=st.booleans(),
    mask=st.sampled_from(["none", "none", "window", "bool", "bool per head", "float", "not causal"]),
    unused=st.sampled_from([0, 70]),
    positions=st.sampled_from([0, 0, 16, 20, 64]),
    capability=st.sampled_from([80, 90]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(
    kinds: tuple[str, str],
    forms: tuple[tuple[str, str], tuple[str, str]],
    dtype: torch.dtype,
    queries: int,
    tokens: int,
    width: int,
    ratio: int,
    token_groups: tuple[int, int],
    quantizes_query: bool,
    mask: str,
    unused: int,
    positions: int,
    capability: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    of_codes = [form if kind in CODES else ("none", "none") for kind, form in zip(kinds, forms, strict=True)]
    arguments = call(*kinds, (*of_codes[0], *of_codes[1]), dtype, queries, tokens, width, ratio, token_groups, unused)
    heads, keys = GROUPS * ratio, tokens + unused
    if quantizes_query:
        largest = {"e4m3": 448, "e5m2": 57344}.get(kinds[0], 127)
        arguments["query_scale"] = (torch.rand(heads, 1, 1) + 3) / largest
    if mask.startswith("bool"):
        shape = (BATCH, heads if mask == "bool per head" else 1, queries, keys)
        arguments["mask"] = torch.rand(shape) < 0.7
    elif mask == "float":
        arguments["mask"] = torch.randn(1, queries, keys)
    arguments["window"] = 7 if mask == "window" else 0
    arguments["causal"] = mask != "not causal"
    arguments = with_positions(arguments, positions) if positions else arguments
    assert_both_close(run_lse(arguments, capability), arguments)


@needs_triton
@pytest.mark.parametrize("processors", [1, 40])
def test_parts_of_the_keys_are_merged(processors: int) -> None:
    arguments = call("int8", "int4", ("token", "none", "token", "token"), torch.float16, 1, 700, 64, 4)
    assert_both_close(run_lse(arguments, processors=processors), arguments)
    assert torch.equal(run(arguments, processors=processors), run_lse(arguments, processors=processors)[0])


@needs_triton
@pytest.mark.parametrize("queries", [1, 9])
def test_queries_that_see_nothing_and_an_empty_cache_give_zeros(queries: int) -> None:
    arguments = call(queries=queries, tokens=260, forms=("token", "token", "channel", "channel"))
    visible = torch.ones(queries, 260, dtype=torch.bool)
    visible[0] = False
    output = run({**arguments, "mask": visible}, processors=8)
    assert not output[:, 0].any() and output[:, 1:].any(dim=-1).all()
    empty = run({**arguments, "length": torch.zeros(1, dtype=torch.long)})
    assert not empty.any() and empty.isfinite().all()
    none = {**arguments, "key": arguments["key"][:, :, :0], "value": arguments["value"][:, :, :0]}
    none |= dict.fromkeys(("key_scale", "key_zero", "value_scale", "value_zero"))
    for output, lse in (run_lse(none), run_lse({**arguments, "length": torch.tensor([-5])})):
        assert not output.any() and (lse == float("-inf")).all()


@needs_triton
@pytest.mark.parametrize("queries", [1, 2, 70])
@pytest.mark.parametrize("window", [0, 63, 64, 150, 200])
def test_windows_wider_than_a_tile_at_every_edge(queries: int, window: int) -> None:
    """Tiles that all rows of a program see take no mask."""
    arguments = call(queries=queries, tokens=330, ratio=2, width=16, unused=6)
    for length in ([330, 257], [256, 255], [331, 128]):
        changed = {**arguments, "window": window, "length": torch.tensor(length)}
        changed["key"][:, :, 330:] = 0
        changed["value"][:, :, 330:] = 0
        assert_close(run(changed, processors=6), changed)


@needs_triton
def test_more_queries_than_keys_leave_the_first_blind() -> None:
    output = run(call(queries=5, tokens=3))
    assert not output[:, :2].any() and output[:, 2:].any(dim=-1).all()


@needs_triton
@pytest.mark.parametrize("queries", [1, 20])
def test_a_chunk_of_a_prompt_sees_what_the_whole_prompt_sees(queries: int) -> None:
    arguments = call(queries=130, tokens=130)
    last = run({**arguments, "query": arguments["query"][:, :, -queries:]})
    assert relative_rmse(last, run(arguments)[:, -queries:]) <= TOLERANCES["cuda attention float32"]


@needs_triton
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("broken", ["query", "key", "value"])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(what: float, broken: str, queries: int) -> None:
    """An overflow must not become plausible text."""
    arguments = call("own", "own", ("none",) * 4, torch.float32, queries, 200, 16, 2)
    arguments[broken][0, 0, 0] = what
    output, expected = run(arguments), attention_reference(ATTENTION_CALL.of(**arguments))
    assert torch.equal(output.isfinite(), expected.isfinite()) and not output.isfinite().all()


@needs_triton
def test_quantized_queries_that_are_no_number_stay_none() -> None:
    arguments = call("int8", "int8", ("head", "none", "head", "none"), torch.float32, 3, 40)
    arguments["query_scale"] = torch.full((GROUPS * 3, 1, 1), 0.02)
    arguments["query"][0, 0, 1, 5] = float("nan")
    output, expected = run(arguments), attention_reference(ATTENTION_CALL.of(**arguments))
    assert torch.equal(output.isfinite(), expected.isfinite()) and not output.isfinite().all()


@needs_triton
def test_large_and_small_queries_and_scales_lose_nothing() -> None:
    """bfloat16 reaches where float16, in which codes are multiplied, does not."""
    arguments = call("int8", "int8", ("channel", "none", "token", "none"), torch.bfloat16, 4, 90, 64)
    for factor in (1e-12, 1e9):
        arguments["query"] = (arguments["query"].float() * factor).bfloat16()
        arguments["key_scale"] = arguments["key_scale"] / factor
        arguments["value_scale"] = arguments["value_scale"] * factor
        assert_close(run(arguments), arguments)


@needs_triton
def test_what_does_not_go_together_is_refused() -> None:
    arguments = call()
    for change, reason in (
        ({"value": arguments["value"][:, :, :-1]}, "do not go together"),
        ({"key_scale": torch.ones(2, 1, 5)}, "does not belong"),
        ({"value_zero": torch.ones(2, 2, 7, 1)}, "does not belong"),
        ({"mask": torch.ones(3, 7, dtype=torch.bool)}, "broadcast"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            run({**arguments, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="up to 256"):
        run(call(width=272))
    with pytest.raises(ValueError, match="up to 256 wide, not 257"):
        run(with_positions(arguments, 257))
    with pytest.raises(ValueError, match="all three or none"):
        run({**with_positions(arguments, 16), "position_table": None})
