"""All versions of an op refuse the same arguments, in one line, and write nothing; none lets a number wrap."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch

from octavo import ops
from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.cuda import attention_cuda, attention_lse_cuda
from octavo.ops.attention.reference import attention_lse_reference, attention_reference
from octavo.ops.codec.cuda import decode_cuda, encode_cuda, encode_token_cuda
from octavo.ops.codec.npu import decode_npu, encode_npu, encode_token_npu
from octavo.ops.codec.reference import decode_reference, encode_reference, encode_token_reference
from octavo.ops.linear.arguments import LARGEST_IN_FEATURES
from octavo.ops.shared.triton_helpers import triton

from .cuda_double import interpreted, needs_triton
from .linear_arguments import LINEAR_OPS, Arguments, Change, OpCase
from .npu_double import on_npu

B, G, S, D, H = 2, 2, 6, 32, 4
LARGEST, SMALLEST = 2**63 - 1, -(2**63)


def flat(function: Callable) -> Callable:
    """A version of attention, which takes a call, of its arguments by name, as the op takes them."""
    return lambda **arguments: function(ATTENTION_CALL.of(**arguments))


def attention_arguments() -> Arguments:
    return {
        "query": torch.randn(B, H, 1, D).half(),
        "key": torch.zeros((B, G, S, D), dtype=torch.int8),
        "value": torch.zeros((B, G, S, D), dtype=torch.int8),
        "key_scale": torch.ones(G, 1, D),
        "key_zero": None,
        "value_scale": torch.ones(B, G, S, 1),
        "value_zero": None,
        "query_scale": None,
        "mask": None,
        "scaling": 1.0,
        "causal": True,
        "length": None,
        "window": 0,
        "key_group": 1,
        "value_group": 1,
        "position_query": None,
        "position_table": None,
        "position_start": None,
    }


def with_positions(**change: torch.Tensor) -> Arguments:
    parts = {
        "position_query": torch.randn(B, H, 1, 8),
        "position_table": torch.randn(9, 8),
        "position_start": torch.tensor([0]),
    }
    return parts | change


ATTENTION: list[Change] = [
    (ValueError, "do not go together", {"query": torch.randn(H, 1, D).half()}),
    (ValueError, "do not go together", {"query": torch.randn(B, 3, 1, D).half()}),
    (ValueError, "do not go together", {name: torch.zeros((B, 0, S, D)).char() for name in ("key", "value")}),
    (ValueError, "do not go together", {name: torch.zeros((B, G, S, D // 2)).char() for name in ("key", "value")}),
    (ValueError, "a query in float", {"query": torch.zeros((B, H, 1, D), dtype=torch.int32)}),
    (ValueError, "a query in float", {"key": torch.zeros((B, G, S, D), dtype=torch.int64)}),
    (ValueError, "at least 1", {"key_group": 0}),
    (ValueError, "at least 1", {"value_group": -(2**63)}),
    (ValueError, "window at least 0, not 1, 1 and -1", {"window": -1}),
    (ValueError, "key_scale (2, 1, 5) does not belong", {"key_scale": torch.ones(G, 1, 5)}),
    (ValueError, "key_scale (2, 1, 0) does not belong", {"key_scale": torch.ones(G, 1, 0)}),
    (ValueError, "key_scale must be float32 or float16", {"key_scale": torch.ones(G, 1, D, dtype=torch.int32)}),
    (ValueError, "does not broadcast", {"value_zero": torch.ones(3, 1, 1)}),
    (ValueError, "all tensors must be on", {"value_scale": torch.ones(B, G, S, 1, device="meta")}),
    (ValueError, "query_scale must be float32", {"query_scale": torch.ones(H, 1, 1).long()}),
    (ValueError, "does not broadcast", {"query_scale": torch.ones(3, 1, 1)}),
    (ValueError, "a mask is bool or float", {"mask": torch.ones((1, 1, 1, S), dtype=torch.int64)}),
    (ValueError, "does not broadcast", {"mask": torch.ones((1, 1, 1, S + 1), dtype=torch.bool)}),
    (ValueError, "length must be int64 or int32", {"length": torch.tensor([3.0])}),
    (ValueError, "neither one number nor one for each", {"length": torch.tensor([1, 2, 3])}),
    (ValueError, "neither one number nor one for each", {"length": torch.tensor(3)}),
    (ValueError, "all three or none", {"position_start": torch.tensor([0])}),
    (ValueError, "position_start must be int64", with_positions(position_start=torch.tensor([0.5]))),
    (
        ValueError,
        "are float, not float32 and int64",
        with_positions(position_table=torch.ones((9, 8), dtype=torch.int64)),
    ),
    (ValueError, "do not go together", with_positions(position_table=torch.ones(0, 8))),
]


def encode_arguments() -> Arguments:
    return {
        "x": torch.randn(B, G, S, D).half(),
        "scale": torch.ones(G, 1, D),
        "zero": None,
        "codes": torch.full((B, G, S + 2, D), 7, dtype=torch.int8),
        "position": torch.tensor([1]),
    }


def encode_token_arguments() -> Arguments:
    return encode_arguments() | {"scale": torch.full((B, G, S + 2, 1), 7.0)}


TARGET: list[Change] = [
    (ValueError, "codes must be int8 (2, 2, 6, 32)", {"position": None}),
    (ValueError, "position must be int64 or int32", {"position": torch.tensor([1.0])}),
    (ValueError, "position () has neither one number", {"position": torch.tensor(1)}),
    (ValueError, "position (0,) has neither one number", {"position": torch.empty(0, dtype=torch.int64)}),
    (ValueError, "position (2,) has neither one number", {"position": torch.tensor([1, 1])}),
    (ValueError, "all tensors must be on", {"position": torch.tensor([1], device="meta")}),
    (ValueError, "not float values and codes", {"x": torch.ones((B, G, S, D), dtype=torch.int32)}),
    (ValueError, "not float values and codes", {"x": torch.randn(G, S, D).half()}),
    (ValueError, "not float values and codes", {"codes": torch.zeros((B, G, S + 2, D), dtype=torch.int32)}),
    (ValueError, "share memory", {"codes": torch.zeros((B, G, 1, D), dtype=torch.int8).expand(B, G, S + 2, D)}),
]
ENCODE: list[Change] = [
    *TARGET,
    (IndexError, "do not fit into storage of 5", {"codes": torch.zeros((B, G, 5, D), dtype=torch.int8)}),
    (ValueError, "has no channels", {"x": torch.empty(B, G, S, 0).half(), "codes": torch.empty((B, G, S, 0)).char()}),
    (ValueError, "scale (2, 1, 5) does not belong", {"scale": torch.ones(G, 1, 5)}),
    (ValueError, "does not broadcast", {"zero": torch.ones(3, 1, 1)}),
    (ValueError, "in uint8, not torch.int8", {"levels": torch.ones(16)}),
]
ENCODE_TOKEN: list[Change] = [
    *TARGET,
    (ValueError, "scale (2, 2, 8, 0) does not belong", {"scale": torch.ones(B, G, S + 2, 0)}),
    (ValueError, "scale (2, 2, 8, 3) does not belong", {"scale": torch.ones(B, G, S + 2, 3)}),
    (ValueError, "scale (2, 2, 8) does not belong", {"scale": torch.ones(B, G, S + 2)}),
    (ValueError, "share memory", {"scale": torch.ones(1, 1, 1, 1).expand(B, G, S + 2, 1)}),
    (ValueError, "zero (1,) must be of the shape of scale", {"zero": torch.ones(1)}),
    (ValueError, "written as float32 or float16", {"scale": torch.ones(B, G, S + 2, 1).bfloat16()}),
]


def decode_arguments() -> Arguments:
    return {"codes": torch.zeros((B, G, S, D), dtype=torch.int8), "scale": torch.ones(G, 1, D), "zero": None}


DECODE: list[Change] = [
    (ValueError, "codes must have 4 dimensions", {"codes": torch.zeros((G, S, D), dtype=torch.int8)}),
    (ValueError, "token_group be positive", {"token_group": 0}),
    (ValueError, "token_group be positive", {"token_group": SMALLEST}),
    (ValueError, "fp8 or float values, not int64", {"codes": torch.zeros((B, G, S, D), dtype=torch.int64)}),
    (ValueError, "have no channels", {"codes": torch.zeros((B, G, S, 0), dtype=torch.int8)}),
    (ValueError, "2, 3 or 4 bits, not 64", {"codes": torch.zeros((B, G, S, D), dtype=torch.uint8), "bits": 64}),
    (ValueError, "in groups of 4", {"scale": torch.ones(B, G, S, 1), "token_group": 4}),
    (ValueError, "all tensors must be on", {"scale": torch.ones(G, 1, D, device="meta")}),
]


@contextmanager
def on_gpu() -> Iterator[None]:
    if triton is None:
        pytest.skip("Triton is not installed")
    with interpreted():
        yield


OPS: dict[str, OpCase] = {
    "attention": (
        attention_arguments,
        ATTENTION,
        (ops.attention, flat(attention_reference), flat(attention_cuda), partial(on_npu, ops.attention)),
    ),
    "attention_lse": (
        attention_arguments,
        ATTENTION,
        (ops.attention_lse, flat(attention_lse_reference), flat(attention_lse_cuda), None),
    ),
    "encode": (encode_arguments, ENCODE, (ops.encode, encode_reference, encode_cuda, encode_npu)),
    "encode_token": (
        encode_token_arguments,
        ENCODE_TOKEN,
        (ops.encode_token, encode_token_reference, encode_token_cuda, encode_token_npu),
    ),
    "decode": (decode_arguments, DECODE, (ops.decode, decode_reference, decode_cuda, decode_npu)),
    **LINEAR_OPS,
}
DEVICES = ("CPU", "reference", "CUDA", "NPU")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_every_version_refuses_the_same_in_one_line(op: str, device: str) -> None:
    arguments, changes, versions = OPS[op]
    run = versions[DEVICES.index(device)]
    if run is None:
        pytest.skip("no version of its own")
    with on_gpu() if device == "CUDA" else nullcontext():
        for error, reason, change in changes:
            wrong = arguments() | change
            kept = {name: wrong[name].clone() for name in ("codes", "scale") if name in wrong}
            with pytest.raises(error, match=re.escape(reason)) as caught:
                run(**wrong)
            assert "\n" not in str(caught.value)
            for name, part in kept.items():
                assert part.is_meta or torch.equal(wrong[name], part)


@pytest.mark.parametrize("op", OPS)
def test_what_is_refused_is_but_one_change_away_from_what_is_served(op: str) -> None:
    arguments, _, versions = OPS[op]
    versions[0](**arguments())
    versions[1](**arguments())


def storage_with_guards(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Storage `[1, 1, 8, width]` in the middle of memory that is three times as large, and all of it."""
    whole = torch.full((3, 8, width), 7).to(dtype)
    return whole[1][None, None], whole


BAD_POSITIONS = (LARGEST, LARGEST - 1, LARGEST - 2, SMALLEST, SMALLEST + 1, 2**62, 2**32, 2**31, -1, -3, 6, 8)
"""From which three tokens do not fit into storage of 8."""


@pytest.mark.parametrize("position", BAD_POSITIONS)
@pytest.mark.parametrize("is_reference", [False, True])
def test_tokens_that_do_not_fit_are_refused_and_nothing_is_written(position: int, is_reference: bool) -> None:
    codes, whole = storage_with_guards(64, torch.int8)
    scale, scales = storage_with_guards(1, torch.float32)
    x, at = torch.randn(1, 1, 3, 64), torch.tensor([position])
    calls = [
        lambda: (encode_reference if is_reference else ops.encode)(x, torch.ones(1), None, codes, position=at),
        lambda: (encode_token_reference if is_reference else ops.encode_token)(x, codes, scale, position=at),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=f"3 tokens from position {position} on do not fit into storage of 8"):
            call()
    assert (whole == 7).all() and (scales == 7).all()


@needs_triton
@pytest.mark.parametrize("position", BAD_POSITIONS)
def test_a_gpu_leaves_out_the_tokens_that_do_not_fit(position: int) -> None:
    codes, whole = storage_with_guards(16, torch.int8)
    scale, scales = storage_with_guards(1, torch.float32)
    x, at = torch.full((1, 1, 3, 16), 50.0), torch.tensor([position])
    with interpreted():
        encode_cuda(x, torch.ones(1), None, codes, position=at)
        encode_token_cuda(x, codes, scale, position=at)
    fit = {-1: [0, 1], 6: [6, 7]}.get(position, [])
    assert (codes[0, 0] != 7).any(dim=1).nonzero().flatten().tolist() == fit
    assert (scale[0, 0] != 7).flatten().nonzero().flatten().tolist() == fit
    assert (whole[::2] == 7).all() and (scales[::2] == 7).all()


def segment(queries: int, length: int, window: int) -> Arguments:
    torch.manual_seed(0)
    return attention_arguments() | {
        "query": torch.randn(B, H, queries, D),
        "key": torch.randint(-128, 128, (B, G, S, D), dtype=torch.int8),
        "value": torch.randint(-128, 128, (B, G, S, D), dtype=torch.int8),
        "key_scale": torch.full((G, 1, D), 0.01),
        "length": torch.tensor([length]),
        "window": window,
    }


@pytest.mark.parametrize("length", [LARGEST, 2**32 + 3, 2**31, S, 0, -1, -(2**32) + 3, SMALLEST])
@pytest.mark.parametrize("window", [0, 3, 2**31, 2**32 + 1, LARGEST])
def test_no_length_and_no_window_wraps(length: int, window: int) -> None:
    """Far behind the last stored token all of them are seen, but for a window that has left them; before it, none."""
    arguments = segment(2, length, window)
    expected = segment(2, max(-9, min(length, 99)), window if window < 9 else 0)
    output, _ = flat(attention_lse_reference)(**expected)
    for run in (ops.attention, flat(attention_reference)):
        torch.testing.assert_close(run(**arguments), output, rtol=1e-4, atol=1e-4)
    assert output.any() == (length > 0 and not (length > S and window == 3))


@needs_triton
@pytest.mark.parametrize(("length", "window"), [(LARGEST, 0), (2**32 + 3, 3), (-(2**32) + 3, 0), (S, 2**32 + 1)])
def test_no_length_and_no_window_wraps_on_a_gpu(length: int, window: int) -> None:
    arguments = segment(2, length, window)
    with interpreted():
        output = flat(attention_cuda)(**arguments)
    torch.testing.assert_close(output, flat(attention_reference)(**arguments), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", [LARGEST, LARGEST - 2, 2**32, -(2**32), SMALLEST])
def test_no_row_of_the_table_of_positions_wraps(start: int) -> None:
    arguments = segment(1, S, 0) | with_positions(position_start=torch.tensor([start]))
    nearest = arguments | {"position_start": torch.tensor([99 if start > 0 else -99])}
    expected = flat(attention_reference)(**nearest)
    for run in (ops.attention, flat(attention_reference)):
        torch.testing.assert_close(run(**arguments), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("empty", ["batch", "tokens", "queries", "heads"])
def test_where_there_is_nothing_there_is_no_work(empty: str) -> None:
    batch, tokens, queries, heads = (0 if name == empty else 2 for name in ("batch", "tokens", "queries", "heads"))
    codes = torch.zeros((batch, 2, tokens, 16), dtype=torch.int8)
    query, one = torch.randn(batch, heads, queries, 16), torch.ones(1)
    for run in (ops.attention_lse, flat(attention_lse_reference)):
        output, lse = run(query=query, key=codes, value=codes, scaling=1.0, key_scale=one, value_scale=one)
        assert output.shape == (batch, queries, heads, 16) and lse.shape == (batch, heads, queries)
        assert not output.any() and (lse == float("-inf")).all()
    for run in (ops.encode, encode_reference):
        run(torch.randn(batch, 2, tokens, 16), one, None, codes)
    for run in (ops.decode, decode_reference):
        assert run(codes, one, None).shape == codes.shape


def test_the_deepest_sums_of_products_of_codes_are_exact() -> None:
    weight = torch.full((2, LARGEST_IN_FEATURES), -128, dtype=torch.int8)
    weight[1] = 127
    rest = torch.ones(1), torch.zeros(1), torch.zeros(2, dtype=torch.int32), torch.ones(2)
    exact = torch.tensor([2**14 * LARGEST_IN_FEATURES, -127 * 128 * LARGEST_IN_FEATURES]).float()
    for rows in (1, 5, 17):  # one, four at once, and in panels
        assert (ops.linear_w8a8(torch.full((rows, LARGEST_IN_FEATURES), -128.0), weight, *rest) == exact).all()


@pytest.mark.parametrize("device", ["CPU", "reference", "CUDA"])
@pytest.mark.parametrize("in_features", [5, 64, 1100])
def test_what_is_no_number_shows_in_its_row_of_static_w8a8(device: str, in_features: int) -> None:
    x, weight = torch.randn(20, in_features), torch.randint(-128, 128, (3, in_features), dtype=torch.int8)
    x[1, in_features - 1], x[18, 0], x[3, 1] = float("nan"), float("nan"), float("inf")
    rest = torch.ones(1), torch.ones(1), torch.zeros(3, dtype=torch.int32), torch.ones(3)
    run = OPS["linear_w8a8"][2][DEVICES.index(device)]
    with on_gpu() if device == "CUDA" else nullcontext():
        is_nan = run(x, weight, *rest).isnan()
    assert is_nan.all(dim=1).nonzero().flatten().tolist() == [1, 18] and is_nan.sum() == 6
