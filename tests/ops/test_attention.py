"""Attention over codes on the CPU: equal to its reference, to softmax in float64, and to itself said otherwise."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import attention
from octavo.ops.attention.reference import attention_reference

from ..tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("build")
UNUSED = 9
"""Tokens of capacity behind those in use: K and V are views of storage, as the cache hands them out."""


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

    def run(self) -> torch.Tensor:
        return attention(*vars(self).values())

    def reference(self) -> torch.Tensor:
        return attention_reference(*vars(self).values())

    def oracle(self) -> torch.Tensor:
        """Softmax over decoded K and V in float64, with the mask or causality written out."""
        ratio = self.query.shape[1] // self.key.shape[1]
        key, value = (
            (codes.double() - (0 if zero is None else zero)) * (1 if scale is None else scale)
            for codes, scale, zero in (
                (self.key, self.key_scale, self.key_zero),
                (self.value, self.value_scale, self.value_zero),
            )
        )
        scores = self.query.double() @ key.repeat_interleave(ratio, dim=1).mT * self.scaling
        mask = causal_mask(*scores.shape[-2:]) if self.causal and self.mask is None else self.mask
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(dim=-1) @ value.repeat_interleave(ratio, dim=1)).transpose(1, 2)


def causal_mask(queries: int, keys: int) -> torch.Tensor:
    """True where query i, the last of which is the newest token, sees a key."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def int8_call(
    queries: int = 3, keys: int = 40, groups: int = 2, ratio: int = 3, width: int = 32, batch: int = 2
) -> Call:
    """Random codes with scales per channel."""
    key, value = (
        torch.randint(-128, 128, (batch, groups, keys + UNUSED, width), dtype=torch.int8)[:, :, :keys] for _ in range(2)
    )
    query = torch.randn(batch, queries, groups * ratio, width).transpose(1, 2)
    scales = (torch.rand(groups, 1, width) * 0.02 + 0.01 for _ in range(2))
    return Call(query, key, value, key_scale=next(scales), value_scale=next(scales), scaling=width**-0.5)


def relative_rmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference, expected = actual.double() - expected, expected.double()
    return (difference.square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.numel() == 0 or relative_rmse(actual, expected) < TOLERANCES["attention"]


FORMS = st.sampled_from(["none", "per channel", "per head", "per token"])
MASKS = st.sampled_from(["none", "none", "bool", "bool per head", "float", "lowest float", "sees nothing"])


def part_of(form: str, call: Call, is_zero: bool) -> torch.Tensor | None:
    """Random scales, or zero points, of one form."""
    batch, groups, keys, width = call.key.shape
    if form == "none":
        return None
    shape = {"per channel": (groups, 1, width), "per head": (groups, 1, 1), "per token": (batch, groups, keys + 9, 1)}
    part = torch.randn(shape[form]) * 20 if is_zero else torch.rand(shape[form]) * 0.02 + 0.01
    return part[:, :, :keys] if form == "per token" else part


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


@settings(max_examples=100, deadline=None)
@given(
    batch=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 3]),
    ratio=st.sampled_from([1, 2, 3, 4, 5, 7, 8]),
    width=st.sampled_from([7, 16, 24, 32, 64, 80, 128, 256]),
    keys=st.sampled_from([0, 1, 2, 63, 96, 97, 127, 300, 1100]),
    queries=st.sampled_from([1, 1, 2, 5, 17, 64]),
    dtype=st.sampled_from([torch.int8, torch.int8, torch.float32, torch.bfloat16, torch.float16]),
    forms=st.tuples(FORMS, FORMS, FORMS, FORMS),
    quantized_query=st.booleans(),
    mask=MASKS,
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(
    batch: int,
    groups: int,
    ratio: int,
    width: int,
    keys: int,
    queries: int,
    dtype: torch.dtype,
    forms: tuple[str, str, str, str],
    quantized_query: bool,
    mask: str,
    causal: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    call = int8_call(queries, keys, groups, ratio, width, batch)
    if dtype == torch.int8:
        forms = tuple("per channel" if form == "none" and not index % 2 else form for index, form in enumerate(forms))
    else:
        call.key, call.value = (torch.randn(codes.shape).to(dtype) for codes in (call.key, call.value))
    call.key_scale, call.key_zero = part_of(forms[0], call, False), part_of(forms[1], call, True)
    call.value_scale, call.value_zero = part_of(forms[2], call, False), part_of(forms[3], call, True)
    call.query_scale = torch.rand(groups * ratio, 1, 1) * 0.02 + 0.01 if quantized_query else None
    call.mask, call.causal = mask_of(mask, call), causal
    assert_close(call.run(), call.reference())


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
    with pytest.raises(ValueError, match="not both per token and per channel"):
        replace(call, key_scale=torch.ones(2, 2, 40, 32)).run()


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.octavo.attention.default, tuple(vars(int8_call()).values()))


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
    unused = [None] * 6
    output = attention(*parts.values(), *unused, 0.25, True)
    expected = attention_reference(*parts.values(), *unused, 0.25, True)
    assert torch.equal(output.isfinite(), expected.isfinite())
    assert not output.isfinite().all()
