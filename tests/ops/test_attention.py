"""Attention over codes on the CPU: equal to its reference, to softmax in float64, and to itself said otherwise."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import attention
from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.reference import attention_reference

from ..metrics import relative_rmse
from .attention_calls import (
    CODES,
    FLOATS,
    FORMS,
    MASKS,
    add_positions,
    assert_close,
    assert_lse_close,
    call_of,
    int8_call,
    length_of,
    mask_of,
    part_of,
    query_scale_of,
)

pytestmark = pytest.mark.usefixtures("build")


@settings(max_examples=150, deadline=None)
@given(
    dtypes=st.tuples(st.sampled_from(CODES + FLOATS), st.sampled_from(CODES + FLOATS)),
    batch=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 3]),
    ratio=st.sampled_from([1, 2, 3, 4, 5, 7, 8]),
    width=st.sampled_from([12, 16, 24, 32, 64, 80, 96, 128, 256]),
    keys=st.sampled_from([0, 1, 2, 31, 32, 63, 127, 192, 193, 300, 1100]),
    queries=st.sampled_from([1, 1, 1, 2, 5, 17, 64]),
    scales=st.tuples(st.sampled_from(FORMS), st.sampled_from(FORMS)),
    zeros=st.tuples(st.sampled_from(("none", *FORMS)), st.sampled_from(("none", *FORMS))),
    token_groups=st.tuples(st.sampled_from([1, 3, 32, 96]), st.sampled_from([1, 3, 32])),
    query_scale=st.sampled_from(["none", "none", "per head", "per token"]),
    mask=st.sampled_from(MASKS),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 40, 200]),
    length=st.sampled_from(["none", "none", "one, int32", "per sequence"]),
    positions=st.sampled_from([0, 0, 16, 20, 64]),
    half=st.booleans(),
    token_major=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(
    dtypes: tuple[torch.dtype, torch.dtype],
    batch: int,
    groups: int,
    ratio: int,
    width: int,
    keys: int,
    queries: int,
    scales: tuple[str, str],
    zeros: tuple[str, str],
    token_groups: tuple[int, int],
    query_scale: str,
    mask: str,
    causal: bool,
    window: int,
    length: str,
    positions: int,
    half: bool,
    token_major: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    call = call_of(*dtypes, queries, keys, groups, ratio, width, batch, token_major)
    call.key_group, call.value_group = token_groups
    call.key_scale = part_of(scales[0], call, call.key, call.key_group, half=half)
    call.key_zero = part_of(zeros[0], call, call.key, call.key_group, is_zero=True)
    call.value_scale = part_of(scales[1], call, call.value, call.value_group, half=half)
    call.value_zero = part_of(zeros[1], call, call.value, call.value_group, is_zero=True, half=half)
    call.query_scale, call.mask = query_scale_of(query_scale, call), mask_of(mask, call)
    call.causal, call.window = causal, window
    call.length = length_of(length, call)
    if positions:
        add_positions(call, positions)
    output, lse = call.run_lse()
    expected, expected_lse = call.reference_lse()
    assert torch.equal(output, call.run())
    assert_close(output, expected, call.has_many_rows())
    assert_lse_close(lse, expected_lse, call.has_many_rows())


@pytest.mark.parametrize("ratio", [1, 3, 9])
@pytest.mark.parametrize("width", [7, 20, 77])
def test_any_width_of_int8(width: int, ratio: int) -> None:
    call = call_of(torch.int8, torch.int8, queries=2, keys=70, ratio=ratio, width=width)
    assert_close(call.run(), call.oracle())


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", CODES)
def test_codes_equal_softmax_in_float64(dtype: torch.dtype, form: str, queries: int) -> None:
    call = call_of(dtype, dtype, queries, keys=333, width=64)
    call.key_group, call.value_group = 32, 5
    for side, codes, group in (("key", call.key, 32), ("value", call.value, 5)):
        setattr(call, f"{side}_scale", part_of(form, call, codes, group))
        setattr(call, f"{side}_zero", part_of(form, call, codes, group, is_zero=True))
    assert_close(call.run(), call.oracle(), call.has_many_rows())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_whole_numbers_keep_a_query_of_very_different_channels(dtype: torch.dtype) -> None:
    """Digits of a common step per row are as good as floats."""
    call = call_of(dtype, dtype, queries=1, keys=500, width=128)
    call.query = call.query * torch.logspace(-4, 1, 128)
    call.scaling = 0.02
    assert_close(call.run(), call.oracle())


@pytest.mark.parametrize("queries", [1, 3, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_softmax_in_float64(queries: int, causal: bool) -> None:
    call = replace(int8_call(queries, keys=333), causal=causal)
    assert_close(call.run(), call.oracle())


def test_many_keys_are_split_over_threads_and_merged() -> None:
    call = int8_call(queries=1, keys=5000, groups=1, ratio=4, width=64, batch=1)
    assert_close(call.run(), call.oracle())


@pytest.mark.parametrize("mask", ["none", "bool per head", "float", "sees nothing"])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "window"), [(70, 700, 64, 0), (65, 333, 24, 77), (90, 40, 128, 0)]
)
@pytest.mark.parametrize("form", ["per channel", "per head", "per token"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_many_rows(dtype: torch.dtype, form: str, queries: int, keys: int, width: int, window: int, mask: str) -> None:
    """Scales of V that differ a thousandfold, some of them 0, leave the small ones their digits."""
    call = call_of(dtype, dtype, queries, keys, width=width)
    call.window, call.mask = window, mask_of(mask, call)
    call.key_scale, call.value_scale = (part_of(form, call, codes, 1) for codes in (call.key, call.value))
    call.value_scale[..., ::7, :] *= 1e-3
    for zero in (None, part_of(form, call, call.value, 1, is_zero=True)):
        call.value_zero = zero
        output, lse = call.run_lse()
        expected, expected_lse = call.reference_lse()
        assert call.has_many_rows()
        assert_close(output, expected, many_rows=True)
        assert_lse_close(lse, expected_lse, many_rows=True)
    call.value_scale[..., 3::5, :] = 0
    assert_close(call.run(), call.reference(), many_rows=True)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["query", "key_scale", "value_scale"])
def test_many_rows_keep_what_is_no_number(what: float, part: str) -> None:
    call = call_of(torch.int8, torch.int8, queries=70, keys=250, batch=1)
    assert call.has_many_rows()
    call.key_scale, call.value_scale = (part_of("per token", call, codes, 1) for codes in (call.key, call.value))
    getattr(call, part)[0, 0, 20] = what
    output, expected = call.run(), call.reference()
    assert not output.isfinite().all()
    if part != "key_scale" or what != float("inf"):  # which the reference multiplies codes of both signs by: NaN
        assert torch.equal(output.isfinite(), expected.isfinite())


def test_scales_of_v_scale_the_output() -> None:
    call = int8_call()
    assert_close(replace(call, value_scale=call.value_scale * 2).run(), call.run() * 2)


def test_a_zero_point_of_k_changes_nothing() -> None:
    call = int8_call()
    assert_close(replace(call, key_zero=torch.randn(2, 1, 32) * 50).run(), call.run())


def test_another_input_gives_another_output() -> None:
    call = int8_call()
    for name in ("query", "key", "value", "key_scale", "value_scale"):
        changed = replace(call, **{name: getattr(call, name) + 1})
        assert relative_rmse(changed.run(), call.run()) > 1e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_queries_are_computed_in_float32(dtype: torch.dtype) -> None:
    call = int8_call()
    half = call.query.to(dtype)
    output = replace(call, query=half).run()
    assert output.dtype == dtype
    assert torch.equal(output, replace(call, query=half.float()).run().to(dtype))


def test_what_does_not_go_together_is_refused() -> None:
    call = int8_call()
    with pytest.raises(ValueError, match="do not go together"):
        replace(call, value=call.value[:, :, :-1]).run()
    with pytest.raises(ValueError, match="does not belong to 40 tokens in groups of 1 and 32 channels"):
        replace(call, key_scale=torch.ones(2, 2, 41, 1)).run()
    with pytest.raises(ValueError, match="does not belong to 40 tokens in groups of 1 and 32 channels"):
        replace(call, value_scale=torch.ones(2, 1, 5)).run()
    with pytest.raises(ValueError, match="neither one number nor one for each of 2 sequences"):
        replace(call, length=torch.tensor([1, 2, 3])).run()
    positions = add_positions(int8_call(), 16)
    for change, reason in (
        ({"position_table": None}, "all three or none"),
        ({"position_query": None, "position_table": None}, "all three or none"),
        ({"position_table": torch.ones(9, 15)}, "do not go together"),
        ({"position_table": torch.ones(0, 16)}, "do not go together"),
        ({"position_query": positions.position_query[:, :1]}, "do not go together"),
        ({"position_start": torch.tensor([1, 2, 3])}, "neither one number nor one for each of 2 sequences"),
    ):
        for wrong in (replace(positions, **change), replace(positions, query=positions.query.double(), **change)):
            with pytest.raises(ValueError, match=reason):
                wrong.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("op", [torch.ops.octavo.attention.default, torch.ops.octavo.attention_lse.default])
def test_opcheck(op: torch._ops.OpOverload, dtype: torch.dtype) -> None:
    for call in (int8_call(), add_positions(int8_call(), 16)):
        torch.library.opcheck(op, (), vars(replace(call, query=call.query.to(dtype))))


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("broken", ["query", "key", "value"])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(what: float, broken: str, queries: int) -> None:
    """An overflow must not become plausible text."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        "query": torch.randn((1, 2, queries, 16), generator=generator),
        "key": torch.randn((1, 1, 200, 16), generator=generator),
        "value": torch.randn((1, 1, 200, 16), generator=generator),
    }
    parts[broken][0, 0, 0] = what
    output = attention(**parts, scaling=0.25)
    expected = attention_reference(ATTENTION_CALL.of(**parts, scaling=0.25))
    assert torch.equal(output.isfinite(), expected.isfinite())
    assert not output.isfinite().all()
