"""Attention of CUDA GPUs against its reference, over codes of every kind: interpreted, and translated for GPUs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import attention, attention_lse
from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.cuda import attention_cuda, attention_lse_cuda
from octavo.ops.attention.reference import attention_lse_reference, attention_reference
from octavo.ops.shared.codes import to_codes

from ..tolerances import TOLERANCES
from .cuda_double import SHARED_MEMORY, compiled, interpreted, needs_gpu, needs_triton

BATCH, GROUPS = 2, 2
CODES = {
    "int8": (torch.int8, 40.0),
    "int4": (torch.uint8, 3.0),
    "e4m3": (torch.float8_e4m3fn, 100.0),
    "e5m2": (torch.float8_e5m2, 100.0),
}
"""By kind: dtype, and the codes of a value of 1."""


def storage(kind: str, capacity: int, width: int, query: torch.dtype) -> torch.Tensor:
    """Random codes `[B, G, capacity, D]` of a kind, or float values of the query's dtype or in float32."""
    values = torch.randn(BATCH, capacity, GROUPS, width).transpose(1, 2)
    if kind in CODES:
        return to_codes(values * CODES[kind][1], CODES[kind][0], width)
    return values.to(query if kind == "own" else torch.float32)


def part(form: str, capacity: int, width: int, factor: float, is_zero: bool, token_group: int) -> torch.Tensor | None:
    """A random scale, or zero, of a form."""
    rows = -(-capacity // token_group)
    shapes = {
        "none": None,
        "head": (GROUPS, 1, 1),
        "channel": (GROUPS, 1, width),
        "token": (BATCH, GROUPS, rows, 1),
        "token and channels": (BATCH, GROUPS, rows, 2),
        "token and few channels": (BATCH, GROUPS, rows, width // 8),
        "tokens and channel": (BATCH, GROUPS, rows, width),
    }
    if shapes[form] is None:
        return None
    return torch.randn(shapes[form]) * 2 if is_zero else (torch.rand(shapes[form]) + 0.5) / factor


def call(
    key: str = "int8",
    value: str = "int8",
    forms: tuple[str, str, str, str] = ("channel", "none", "channel", "none"),
    dtype: torch.dtype = torch.float32,
    queries: int = 3,
    tokens: int = 40,
    width: int = 32,
    ratio: int = 3,
    token_groups: tuple[int, int] = (1, 1),
    unused: int = 0,
) -> dict[str, Any]:
    """Arguments of the op, by name; `unused` tokens of capacity hold NaN or garbage."""
    capacity = tokens + unused
    factors = [CODES[kind][1] if kind in CODES else 1.0 for kind in (key, value)]
    states = [storage(kind, capacity, width, dtype) for kind in (key, value)]
    for kind, codes in zip((key, value), states, strict=True):
        codes[:, :, tokens:] = float("nan") if kind not in ("int8", "int4") else 77
    parts = [
        part(form, capacity, width, factors[index // 2], index % 2 == 1, token_groups[index // 2])
        for index, form in enumerate(forms)
    ]
    for one, group in zip(parts, (token_groups[0],) * 2 + (token_groups[1],) * 2, strict=True):
        if one is not None and one.shape[-2] > 1:
            one[:, :, -(-tokens // group) :] = float("nan")
    return {
        "query": torch.randn(BATCH, queries, GROUPS * ratio, width).transpose(1, 2).to(dtype),
        "key": states[0],
        "value": states[1],
        "key_scale": parts[0],
        "key_zero": parts[1],
        "value_scale": parts[2],
        "value_zero": parts[3],
        "query_scale": None,
        "mask": None,
        "scaling": width**-0.5,
        "causal": True,
        "length": torch.full((BATCH,), tokens, dtype=torch.int32) if unused else None,
        "window": 0,
        "key_group": token_groups[0],
        "value_group": token_groups[1],
        "position_query": None,
        "position_table": None,
        "position_start": None,
    }


def with_positions(arguments: dict[str, Any], width: int, rows: int = 90, size: float = 1.0) -> dict[str, Any]:
    """The call with random scores by position, which start elsewhere in each sequence."""
    batch, heads, queries, _ = arguments["query"].shape
    return {
        **arguments,
        "position_query": torch.randn(batch, queries, heads, width).transpose(1, 2) * size,
        "position_table": torch.randn(rows, width),
        "position_start": torch.tensor([-7, 40]),
    }


def attend(arguments: dict[str, Any]) -> torch.Tensor:
    return attention_cuda(ATTENTION_CALL.of(**arguments))


def attend_lse(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_lse_cuda(ATTENTION_CALL.of(**arguments))


def run(arguments: dict[str, Any], capability: int = 90, processors: int = 4) -> torch.Tensor:
    with interpreted(capability, processors):
        return attend(arguments)


def run_lse(arguments: dict[str, Any], capability: int = 90, processors: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    with interpreted(capability, processors):
        return attend_lse(arguments)


def relative_rmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def assert_close(actual: torch.Tensor, arguments: dict[str, Any], tolerance: str | None = None) -> None:
    """Within the tolerance of the query's dtype of the reference in float32."""
    expected = attention_reference(ATTENTION_CALL.of(**{**arguments, "query": arguments["query"].float()}))
    assert (actual.shape, actual.dtype) == (expected.shape, arguments["query"].dtype)
    assert relative_rmse(actual, expected) <= TOLERANCES[tolerance or f"cuda attention {str(actual.dtype)[6:]}"]


def assert_both_close(
    actual: tuple[torch.Tensor, torch.Tensor], arguments: dict[str, Any], tolerance: str | None = None
) -> None:
    """Output and log-sum-exp, an error in which is one of the weights."""
    assert_close(actual[0], arguments, tolerance)
    expected = attention_lse_reference(ATTENTION_CALL.of(**{**arguments, "query": arguments["query"].float()}))[1]
    assert actual[1].shape == expected.shape and actual[1].dtype == torch.float32
    sees = expected > float("-inf")
    assert torch.equal(actual[1] > float("-inf"), sees)
    limit = TOLERANCES[tolerance or f"cuda attention {str(arguments['query'].dtype)[6:]}"]
    torch.testing.assert_close(actual[1][sees], expected[sees], rtol=limit, atol=10 * limit)


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
    many_in_fp8 = quantizes_query and capability == 90 and set(kinds) <= {"e4m3", "e5m2"} and ratio * queries > 64
    arguments = with_positions(arguments, positions) if positions else arguments
    assert_both_close(run_lse(arguments, capability), arguments, "cuda attention in fp8" if many_in_fp8 else None)


@needs_triton
@pytest.mark.parametrize("processors", [1, 40])
def test_parts_of_the_keys_are_merged(processors: int) -> None:
    arguments = call("int8", "int4", ("token", "none", "token", "token"), torch.float16, 1, 700, 64, 4)
    assert_both_close(run_lse(arguments, processors=processors), arguments)
    assert torch.equal(run(arguments, processors=processors), run_lse(arguments, processors=processors)[0])


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


PRESETS = {
    "int8 per channel": ("int8", "int8", ("channel", "channel", "channel", "channel"), (1, 1), False),
    "int8 per token": ("int8", "int8", ("token", "none", "token", "none"), (1, 1), False),
    "int8 queries": ("int8", "int8", ("head", "none", "head", "none"), (1, 1), True),
    "int8 and int4 in groups": ("int8", "int4", ("token", "none") + ("token and channels",) * 2, (1, 1), False),
    "int4 as KIVI": ("int4", "int4", ("tokens and channel",) * 2 + ("token and few channels",) * 2, (32, 1), False),
    "e4m3": ("e4m3", "e4m3", ("head", "none", "head", "none"), (1, 1), False),
    "e4m3 queries": ("e4m3", "e4m3", ("head", "none", "head", "none"), (1, 1), True),
    "own": ("own", "own", ("none",) * 4, (1, 1), False),
}


def preset_call(name: str, queries: int, tokens: int, dtype: torch.dtype, unused: int = 0) -> dict[str, Any]:
    """A preset at the shape of a model with head_dim 128 and 4 query heads per KV head."""
    key, value, forms, token_groups, quantizes = PRESETS[name]
    arguments = call(key, value, forms, dtype, queries, tokens, 128, 4, token_groups, unused)
    if quantizes:
        arguments["query_scale"] = torch.full((GROUPS * 4, 1, 1), 4 / {"int8": 127, "e4m3": 448}[key])
    return arguments


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int) -> None:
    """Every preset at decode and prefill; types that do not fit and tiles that do not, show here."""
    with compiled(capability) as kernels:
        for name in PRESETS:
            for queries in (1, 64):
                arguments = preset_call(name, queries, 128, torch.bfloat16, unused=512)
                attend(arguments)
    assert len(kernels) >= 2 * len(PRESETS)
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED_MEMORY[capability] * 1024


@needs_triton
@pytest.mark.slow
def test_a_cache_that_grows_compiles_nothing_anew() -> None:
    """From two parts of the keys on: other numbers of parts, 2 to 32, are the same kernel."""
    arguments = preset_call("int8 per token", 1, 4096, torch.bfloat16)
    of_tokens = ("key", "value", "key_scale", "value_scale")
    with compiled(90, 132) as kernels:
        for tokens in (130, 300, 700, 4096):
            attention_cuda(
                ATTENTION_CALL.of(**{**arguments, **{name: arguments[name][:, :, :tokens] for name in of_tokens}})
            )
    assert len(kernels) == 8 and len({kernel.hash for kernel in kernels[::2]}) == 1
    assert len({kernel.hash for kernel in kernels[1::2]}) == 4  # those that merge up to 2, 4, 8 and 32


@needs_triton
@pytest.mark.slow
def test_other_widths_masks_and_types_compile() -> None:
    """For the GPUs with the least shared memory."""
    with compiled(89) as kernels:
        masked = call("e5m2", "int8", ("token", "channel", "tokens and channel", "none"), torch.float16, 1, 300, 80)
        attend({**masked, "mask": torch.ones(1, 300, dtype=torch.bool), "length": None})
        wide = call("own", "own", ("none",) * 4, torch.bfloat16, 64, 300, 256, 1)
        attend({**wide, "window": 100})
        attention_cuda(
            ATTENTION_CALL.of(**call("int8", "float32", ("channel", "token", "none", "none"), torch.float32, 64))
        )
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED_MEMORY[89] * 1024


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_scores_by_position_compile(capability: int) -> None:
    """Beside the largest tiles of K and V, with log-sum-exp, split and whole."""
    with compiled(capability) as kernels:
        for name, width in (("int8 per token", 64), ("int4 as KIVI", 16), ("own", 128), ("e4m3 queries", 256)):
            for queries in (1, 64):
                arguments = with_positions(preset_call(name, queries, 512, torch.bfloat16, unused=512), width)
                attend_lse(arguments)
        wide = call("own", "own", ("none",) * 4, torch.bfloat16, 64, 300, 256, 1)
        attend_lse(with_positions(wide, 256))
        attention_lse_cuda(
            ATTENTION_CALL.of(**with_positions(call("float32", "float32", ("none",) * 4, queries=64), 128))
        )
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED_MEMORY[capability] * 1024


def to_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@needs_gpu
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("queries", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(name: str, queries: int, dtype: torch.dtype) -> None:
    """The shapes of a model, with memory behind the last token that is NaN."""
    torch.manual_seed(0)
    arguments = preset_call(name, queries, 3000, dtype, unused=1096)
    arguments["length"] = torch.tensor([3000, 2500], dtype=torch.int32)
    in_fp8 = name == "e4m3 queries" and queries >= 64
    tolerance = "cuda attention in fp8" if in_fp8 else None
    assert_close(attention(**to_gpu(arguments)).cpu(), arguments, tolerance)
    arguments = with_positions(arguments, 64, rows=4096)
    output, lse = attention_lse(**to_gpu(arguments))
    assert_both_close((output.cpu(), lse.cpu()), arguments, tolerance)


@needs_gpu
@pytest.mark.parametrize("name", PRESETS)
def test_opcheck_and_compile_on_a_gpu(name: str) -> None:
    arguments = to_gpu(preset_call(name, 1, 200, torch.bfloat16, unused=56))
    torch.library.opcheck(torch.ops.octavo.attention.default, (), arguments)
    positions = to_gpu(with_positions(arguments, 32))
    torch.library.opcheck(torch.ops.octavo.attention_lse.default, (), positions)

    def step(query: torch.Tensor) -> torch.Tensor:
        return attention(**{**arguments, "query": query * 1}) * 1

    compiled_step = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled_step(arguments["query"]), step(arguments["query"]))


@needs_gpu
@pytest.mark.parametrize("name", PRESETS)
def test_a_graph_replays_as_the_cache_grows(name: str) -> None:
    arguments = preset_call(name, 1, 2000, torch.bfloat16, unused=48)
    on_gpu = to_gpu(arguments)
    graph = torch.cuda.CUDAGraph()
    attention(**on_gpu)  # compiles
    with torch.cuda.graph(graph):
        output = attention(**on_gpu)
    for length in (1, 130, 1999, 2000):
        on_gpu["length"].fill_(length)
        graph.replay()
        assert_close(output.cpu(), {**arguments, "length": torch.tensor([length])})
