"""Attention over codes on the CPU: equal to its reference, to softmax in float64, and to itself said otherwise."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import attention, attention_lse
from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.reference import attention_lse_reference, attention_reference

from ..tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("build")
UNUSED = 9
"""Tokens of capacity behind those in use: K and V are views of storage, as the cache hands them out."""


CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = {torch.int8: 0.02, torch.uint8: 0.3, torch.float8_e4m3fn: 0.1, torch.float8_e5m2: 0.1}
"""Scales with which random codes come out of about the size of normal values."""


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Codes in float64; those of int4 lie in the halves of bytes."""
    if codes.dtype != torch.uint8:
        return codes.double()
    return torch.cat((codes & 15, codes >> 4), dim=-1).double() - 8


def expanded(part: torch.Tensor, keys: int, width: int, group: int) -> torch.Tensor:
    """A scale or zero for each token and channel, in float64."""
    part = part.double().repeat_interleave(width // part.shape[-1], dim=-1)
    return part.expand(*part.shape[:-2], keys, width) if part.shape[-2] == 1 else tokens_of(part, keys, group)


def tokens_of(part: torch.Tensor, keys: int, group: int) -> torch.Tensor:
    return part.repeat_interleave(group, dim=-2)[..., :keys, :]


@dataclass
class Call:
    """Arguments of the op, by name."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    key_zero: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    value_zero: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    scaling: float = 0.125
    causal: bool = True
    length: torch.Tensor | None = None
    window: int = 0
    key_group: int = 1
    value_group: int = 1
    position_query: torch.Tensor | None = None
    position_table: torch.Tensor | None = None
    position_start: torch.Tensor | None = None

    def run(self) -> torch.Tensor:
        return attention(**vars(self))

    def run_lse(self) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_lse(**vars(self))

    def reference(self) -> torch.Tensor:
        return attention_reference(ATTENTION_CALL.of(**vars(self)))

    def reference_lse(self) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_lse_reference(ATTENTION_CALL.of(**vars(self)))

    def oracle(self) -> torch.Tensor:
        return self.oracle_lse()[0]

    def oracle_lse(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax over decoded K and V in float64, with the mask or causality written out, and log-sum-exp."""
        heads, queries, width = self.query.shape[1:]
        keys, ratio = self.key.shape[2], heads // self.key.shape[1]
        key, value = (
            (unpacked(codes) - (0 if zero is None else expanded(zero, keys, width, group)))
            * (1 if scale is None else expanded(scale, keys, width, group))
            for codes, scale, zero, group in (
                (self.key, self.key_scale, self.key_zero, self.key_group),
                (self.value, self.value_scale, self.value_zero, self.value_group),
            )
        )
        scores = self.query.double() @ key.repeat_interleave(ratio, dim=1).mT * self.scaling
        if self.position_query is not None:
            rows = self.position_start.view(-1, 1) + torch.arange(keys)
            table = self.position_table.double()[rows.clamp(0, self.position_table.shape[0] - 1)]
            scores = scores + self.position_query.double() @ table[:, None].mT * self.scaling
        mask = self.mask
        if self.causal and mask is None:
            mask = causal_mask(queries, keys)
            mask = mask.triu(keys - queries - self.window + 1) if self.window else mask
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        output = (scores.softmax(dim=-1) @ value.repeat_interleave(ratio, dim=1)).transpose(1, 2)
        return output, scores.logsumexp(dim=-1)


def causal_mask(queries: int, keys: int) -> torch.Tensor:
    """True where query i, the last of which is the newest token, sees a key."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def poison(codes: torch.Tensor) -> None:
    """All bits are set: NaN in every float type."""
    codes.view(torch.uint8).fill_(255)


def stored(dtype: torch.dtype, batch: int, groups: int, keys: int, width: int, token_major: bool) -> torch.Tensor:
    """Random codes, or values, as a view of a storage with poisoned tokens behind the last."""
    shape = (batch, groups, keys + UNUSED, width)
    if dtype in (torch.int8, torch.uint8):
        shape = shape if dtype == torch.int8 else (*shape[:3], width // 2)
        storage = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, shape, dtype=dtype)
    else:
        storage = (torch.randn(shape) * (10 if dtype in CODES else 1)).to(dtype)
    if token_major:
        storage = storage.transpose(1, 2).contiguous().transpose(1, 2)
    poison(storage[:, :, keys:])
    return storage[:, :, :keys]


def call_of(
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    queries: int = 3,
    keys: int = 40,
    groups: int = 2,
    ratio: int = 3,
    width: int = 32,
    batch: int = 2,
    token_major: bool = False,
) -> Call:
    """Random codes with scales per channel."""
    key, value = (stored(dtype, batch, groups, keys, width, token_major) for dtype in (key_dtype, value_dtype))
    call = Call(torch.randn(batch, queries, groups * ratio, width).transpose(1, 2), key, value, scaling=width**-0.5)
    call.key_scale = part_of("per channel", call, key, 1)
    call.value_scale = part_of("per channel", call, value, 1)
    return call


def int8_call(
    queries: int = 3, keys: int = 40, groups: int = 2, ratio: int = 3, width: int = 32, batch: int = 2
) -> Call:
    return call_of(torch.int8, torch.int8, queries, keys, groups, ratio, width, batch)


def relative_rmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference, expected = actual.double() - expected, expected.double()
    return (difference.square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.numel() == 0 or relative_rmse(actual, expected) < TOLERANCES["attention"]


def assert_lse_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Both say alike who sees nothing, and how much is seen. All keys at the lowest float are as good as none."""
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    lowest = torch.finfo(torch.float32).min / 2
    sees = expected > lowest
    assert torch.equal(actual > lowest, sees)
    assert torch.equal(actual == float("-inf"), expected == float("-inf"))
    torch.testing.assert_close(actual[sees].double(), expected[sees].double(), rtol=1e-6, atol=TOLERANCES["attention"])


FORMS = (
    "per channel",
    "per head",
    "per group of channels",
    "per token",
    "per group of tokens",
    "per token and group of channels",
    "per channel and group of tokens",
)
MASKS = ("none", "none", "none", "bool", "bool per head", "float", "lowest float", "sees nothing")


def part_of(
    form: str, call: Call, codes: torch.Tensor, group: int, is_zero: bool = False, half: bool = False
) -> torch.Tensor | None:
    """Random scales of codes, or zero points, of one form; float tensors have none."""
    if form == "none" or codes.dtype in FLOATS:
        return None
    batch, groups, keys = codes.shape[:3]
    width = call.query.shape[3]
    columns = {"per channel": width, "per group of channels": 2, "per token and group of channels": 4}
    columns["per channel and group of tokens"] = width
    rows = -(-keys // group) if "token" in form else 1
    shape = (groups, rows, columns.get(form, 1))
    shape = shape if rows == 1 else (batch, *shape)
    limits = {torch.int8: 20, torch.uint8: 3}
    part = torch.randn(shape) * limits.get(codes.dtype, 1) if is_zero else torch.rand(shape) + 0.5
    part = part if is_zero else part * SCALES[codes.dtype]
    return part.half() if half else part


def mask_of(kind: str, call: Call) -> torch.Tensor | None:
    """A random mask of one kind for a call."""
    batch, heads, queries, _ = call.query.shape
    keys = call.key.shape[2]
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(batch, 1, queries, keys)
    if kind == "sees nothing":
        return torch.zeros((1, 1, queries, keys), dtype=torch.bool)
    seen = torch.rand((batch, heads if kind == "bool per head" else 1, queries, keys)) < 0.7
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape).masked_fill(~seen, lowest) if kind == "lowest float" else seen


def query_scale_of(form: str, call: Call) -> torch.Tensor | None:
    """Random scales that quantize the query."""
    batch, heads, queries, _ = call.query.shape
    shapes = {"per head": (heads, 1, 1), "per token": (batch, heads, queries, 1)}
    return None if form == "none" else torch.rand(shapes[form]) * 0.02 + 0.01


def length_of(form: str, call: Call) -> torch.Tensor | None:
    """Random tokens in use; what lies behind is poisoned, scales per token too."""
    batch, _, keys = call.key.shape[:3]
    if form == "none":
        return None
    length = torch.randint(0, keys + 1, (batch if form == "per sequence" else 1,))
    for b in range(batch):
        used = int(length[b % len(length)])
        poison(call.key[b, :, used:])
        poison(call.value[b, :, used:])
        for parts, group in (
            ((call.key_scale, call.key_zero), call.key_group),
            ((call.value_scale, call.value_zero), call.value_group),
        ):
            for part in parts:
                if part is not None and part.dim() == 4:
                    part[b, :, -(-used // group) :] = float("nan")
    return length.int() if form == "one, int32" else length


def add_positions(call: Call, width: int, rows: int = 500, size: float = 1.0) -> Call:
    """The call with random scores by position, which start elsewhere in each sequence."""
    batch, heads, queries, _ = call.query.shape
    call.position_query = torch.randn(batch, queries, heads, width).transpose(1, 2) * size
    call.position_table = torch.randn(rows, width)
    call.position_start = torch.randint(-20, rows, (batch,))
    return call


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
    assert_close(output, expected)
    assert_lse_close(lse, expected_lse)


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


def segments_of(call: Call, cuts: tuple[int, ...]) -> list[Call]:
    """The call cut along its keys."""
    keys = call.key.shape[2]
    length = torch.tensor([keys]) if call.length is None else call.length
    segments = []
    for start, stop in zip((0, *cuts), (*cuts, keys), strict=True):
        parts = {name: getattr(call, name)[:, :, start:stop] for name in ("key", "value")}
        for name in ("key_scale", "key_zero", "value_scale", "value_zero"):
            part = getattr(call, name)
            parts[name] = part if part is None or part.shape[-2] == 1 else part[..., start:stop, :]
        parts["mask"] = None if call.mask is None else call.mask[..., start:stop]
        if call.position_start is not None:
            parts["position_start"] = call.position_start + start
        segments.append(replace(call, length=length - start, **parts))
    return segments


def merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Outputs of segments as one, weighted by their log-sum-exp."""
    lses = torch.stack([lse for _, lse in parts])
    weights = (lses - lses.logsumexp(dim=0).clamp_min(-1e30)).exp().transpose(-1, -2)[..., None]
    return (torch.stack([output for output, _ in parts]) * weights).sum(dim=0)


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("lengths", [None, [300, 300], [90, 260], [7, 30]])
@pytest.mark.parametrize("what", ["causal", "window", "small window", "mask", "float mask", "not causal"])
@pytest.mark.parametrize("positions", [False, True])
def test_segments_are_merged_by_their_log_sum_exp(
    what: str, lengths: list[int] | None, queries: int, positions: bool
) -> None:
    call = call_of(torch.int8, torch.int8, queries, keys=300)
    call.key_scale, call.value_scale = (part_of("per token", call, call.key, 1) for _ in range(2))
    call.mask = mask_of({"mask": "bool per head", "float mask": "float"}.get(what, "none"), call)
    call.window = {"window": 200, "small window": 9}.get(what, 0)
    call.causal = what != "not causal"
    call.length = None if lengths is None else torch.tensor(lengths)
    if positions:
        add_positions(call, 32)
    expected, expected_lse = (part.double() for part in call.reference_lse())
    for kernel in (Call.run_lse, Call.reference_lse):
        parts = [kernel(segment) for segment in segments_of(call, (20, 283))]
        assert_close(merged(parts), expected)
        assert_lse_close(torch.stack([lse for _, lse in parts]).logsumexp(dim=0), expected_lse)


def test_segments_of_codes_between_floats() -> None:
    """Float tokens at both ends of a sequence whose middle is in codes."""
    call = call_of(torch.int8, torch.uint8, queries=4, keys=300, batch=1)
    decoded = [
        (unpacked(codes) * expanded(scale, 300, 32, 1)).float()
        for codes, scale in ((call.key, call.key_scale), (call.value, call.value_scale))
    ]
    floats = replace(call, key=decoded[0], value=decoded[1], key_scale=None, value_scale=None)
    (first, _, last), (_, codes, _) = segments_of(floats, (16, 200)), segments_of(call, (16, 200))
    assert_close(merged([segment.run_lse() for segment in (first, codes, last)]), call.oracle())


def test_log_sum_exp_of_a_query_in_float64() -> None:
    call = int8_call()
    output, lse = replace(call, query=call.query.double()).run_lse()
    expected, expected_lse = call.oracle_lse()
    assert lse.dtype == output.dtype == torch.float64
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_log_sum_exp_of_no_keys() -> None:
    call = int8_call(keys=0)
    output, lse = call.run_lse()
    assert not output.any() and (lse == float("-inf")).all()
    for length in ([0, 40], [-3, 40]):
        output, lse = replace(int8_call(), length=torch.tensor(length)).run_lse()
        assert not output[0].any() and (lse[0] == float("-inf")).all() and lse[1].isfinite().all()


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
    assert_close(call.run(), call.oracle())


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(("keys", "window"), [(45, 0), (700, 0), (1100, 77), (1100, 401), (5000, 0)])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", CODES)
def test_groups_of_tokens_with_scales_per_channel(
    dtype: torch.dtype, group: int, keys: int, window: int, queries: int
) -> None:
    """Blocks and windows begin anywhere in a group; zeros move with the group, so that they do not cancel."""
    call = call_of(dtype, dtype, queries, keys, width=64, batch=1, ratio=1 if queries == 40 else 5)
    call.window, call.key_group = window, group
    for part in ("scale", "zero"):
        form = "per channel and group of tokens"
        setattr(call, f"key_{part}", part_of(form, call, call.key, group, is_zero=part == "zero", half=True))
    output, lse = call.run_lse()
    expected, expected_lse = call.oracle_lse()
    assert_close(output, expected)
    assert_lse_close(lse, expected_lse)


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(("keys", "window"), [(45, 0), (1100, 401), (3000, 0)])
@pytest.mark.parametrize(("width", "span"), [(64, 32), (96, 32), (128, 32), (256, 64), (160, 80)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_tokens_with_scales_per_group_of_channels(
    dtype: torch.dtype, width: int, span: int, keys: int, window: int, queries: int
) -> None:
    call = call_of(dtype, dtype, queries, keys, width=width, batch=1, ratio=1 if queries == 40 else 5)
    call.window = window
    for side in ("key", "value"):
        spread = torch.rand(1, 2, keys, width // span) + 0.5
        setattr(call, f"{side}_scale", (spread * SCALES[dtype]).half())
        setattr(call, f"{side}_zero", torch.randn(1, 2, keys, width // span) * 3)
    output, lse = call.run_lse()
    expected, expected_lse = call.oracle_lse()
    assert_close(output, expected)
    assert_lse_close(lse, expected_lse)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["query", "key_scale", "key_zero", "value_scale", "value_zero"])
@pytest.mark.parametrize("queries", [1, 15, 40])
@pytest.mark.parametrize("form", ["per channel and group of tokens", "per token and group of channels"])
def test_grouped_codes_keep_what_is_no_number(form: str, queries: int, broken: str, what: float) -> None:
    call = call_of(torch.int8, torch.int8, queries, keys=300, width=128)
    call.key_group = 64 if form.startswith("per channel") else 1
    for part in ("scale", "zero"):
        for side in ("key", "value"):
            setattr(call, f"{side}_{part}", part_of(form, call, call.key, call.key_group, is_zero=part == "zero"))
    call.value_group = call.key_group
    getattr(call, broken)[..., 0, 3] = what
    output, lse = call.run_lse()
    expected, expected_lse = call.reference_lse()
    if broken.startswith("value"):  # whole numbers spread it over all channels of a row
        assert torch.equal(output.isfinite().all(dim=-1), expected.isfinite().all(dim=-1))
    else:
        assert torch.equal(output.isfinite(), expected.isfinite())
        assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    assert not output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_whole_numbers_keep_a_query_of_very_different_channels(dtype: torch.dtype) -> None:
    """Digits of a common step per row are as good as floats."""
    call = call_of(dtype, dtype, queries=1, keys=500, width=128)
    call.query = call.query * torch.logspace(-4, 1, 128)
    call.scaling = 0.02
    assert_close(call.run(), call.oracle())


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


@pytest.mark.parametrize("queries", [1, 3, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_softmax_in_float64(queries: int, causal: bool) -> None:
    call = replace(int8_call(queries, keys=333), causal=causal)
    assert_close(call.run(), call.oracle())


def test_many_keys_are_split_over_threads_and_merged() -> None:
    call = int8_call(queries=1, keys=5000, groups=1, ratio=4, width=64, batch=1)
    assert_close(call.run(), call.oracle())


@pytest.mark.parametrize("queries", [2, 40])
def test_causality_equals_its_mask(queries: int) -> None:
    call = int8_call(queries, keys=130)
    assert_close(call.run(), replace(call, mask=causal_mask(queries, 130)).run())


@pytest.mark.parametrize("queries", [1, 20])
def test_a_chunk_of_a_prompt_sees_what_the_whole_prompt_sees(queries: int) -> None:
    call = int8_call(queries=130, keys=130)
    last = replace(call, query=call.query[:, :, -queries:])
    assert_close(last.run(), call.run()[:, -queries:])


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
