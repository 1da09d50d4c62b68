"""Attention on the CPU over floats and codes in one call, over codes of 2 and 3 bits and over codebooks."""

import random

import pytest
import torch

from octavo.ops import attention_lse, strict
from octavo.ops.attention.call import ATTENTION_CALL, AttentionCall, Coded, Ends, PositionScores, Visibility
from octavo.ops.attention.reference import attention_lse_reference
from octavo.ops.shared.codes import from_codes, pack_indices

from .attention_calls import assert_close, assert_lse_close

pytestmark = pytest.mark.usefixtures("build")

GROUPS, WIDTH = 2, 64
STORED = {"float32": 0, "bfloat16": 0, "int8": 8, "int4": 4, "int3": 3, "int2": 2, "4 bits of levels": 4,
          "3 bits of levels": 3, "2 bits of levels": 2}  # fmt: skip
"""Bits of the codes of each kind of storage."""
SCALES = ("channel", "token", "group of tokens", "group of channels")


def coded(kind: str, scale: str, tokens: int, width: int = WIDTH, batch: int = 1, has_zero: bool = True) -> Coded:
    """Random values of a kind of storage."""
    bits = STORED[kind]
    if not bits:
        return Coded(torch.randn(batch, GROUPS, tokens, width).to(getattr(torch, kind)))
    indices = torch.randint(0, 2**bits, (batch, GROUPS, tokens, width))
    codes = (indices - 128).to(torch.int8)
    if bits < 8:
        codes = pack_indices(indices, bits, width)
    group = 64 if scale == "group of tokens" else 1
    shape = {
        "channel": (GROUPS, 1, width),
        "token": (batch, GROUPS, tokens, 1),
        "group of tokens": (batch, GROUPS, -(-tokens // 64), width),
        "group of channels": (batch, GROUPS, tokens, width // 32),
    }[scale]
    levels = torch.randn(2**bits).sort().values if "levels" in kind else None
    scales = (torch.rand(shape) + 0.5) * 2 ** (1 - bits)
    return Coded(codes, scales, torch.randn(shape) if has_zero else None, group, min(bits, 4), levels)


def assert_served(call: AttentionCall) -> None:
    """The kernel serves a call, and gives what the reference does in float64."""
    with strict():
        output, lse = attention_lse(*ATTENTION_CALL.flat(call))
    expected, expected_lse = attention_lse_reference(call._replace(query=call.query.double()))
    assert_close(output, expected)
    assert_lse_close(lse, expected_lse)


@pytest.mark.parametrize("width", [32, 64, 128, 256, 104])
@pytest.mark.parametrize("kind", [kind for kind, bits in STORED.items() if bits])
def test_codes_of_few_bits_and_codebooks(kind: str, width: int) -> None:
    for scale, queries in zip(SCALES, (1, 2, 40, 3), strict=True):
        sides = [
            coded(kind, scale if width % 32 == 0 else "token", 300, width, has_zero=has_zero) for has_zero in (1, 0)
        ]
        assert_served(AttentionCall(torch.randn(1, 6, queries, width), *sides, width**-0.5))


@pytest.mark.parametrize("seed", range(60))
def test_floats_before_and_behind_codes(seed: int) -> None:
    """Codes of K and V begin and end at slots of their own; of any part there may be no token."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokens, queries, batch = draw.choice([5, 40, 300, 1300]), draw.choice([1, 1, 2, 7, 40]), draw.choice([1, 2])

    def side() -> tuple[Coded, torch.Tensor | None, torch.Tensor | None]:
        front = min(draw.choice([0, 1, 4]), tokens)
        tail = min(tokens - front, draw.choice([0, 1, 8, 130]))
        ends = (
            torch.randn(batch, GROUPS, count, WIDTH).to(draw.choice([torch.float32, torch.float16]))
            if count or draw.random() < 0.5
            else None
            for count in (front, tail)
        )
        return coded(draw.choice(list(STORED)), draw.choice(SCALES), tokens - front - tail, WIDTH, batch), *ends

    (key, *key_ends), (value, *value_ends) = side(), side()
    query = torch.randn(batch, 2 * GROUPS, queries, WIDTH)
    mask = torch.rand(batch, 1, queries, tokens) < 0.7 if draw.random() < 0.3 else None
    length = torch.randint(0, tokens + 3, (batch,)) if draw.random() < 0.3 else None
    visibility = Visibility(mask, draw.random() < 0.8, length, draw.choice([0, 0, 20, 200]))
    position = PositionScores()
    if draw.random() < 0.3:
        position = PositionScores(torch.randn(*query.shape[:3], 16), torch.randn(tokens, 16), torch.tensor([-5]))
    ends = Ends(*key_ends, *value_ends)
    assert_served(AttentionCall(query, key, value, 0.125, None, visibility, position, ends))


def test_floats_and_codes_are_what_the_codes_decoded_are() -> None:
    """The reference too, against values put together by hand."""
    key, value = coded("int3", "group of tokens", 128), coded("2 bits of levels", "token", 130)
    ends = Ends(*(torch.randn(1, GROUPS, count, WIDTH) for count in (4, 9, 1, 10)))
    query = torch.randn(1, 2 * GROUPS, 3, WIDTH)

    def values(side: Coded, front: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        codes = from_codes(side.codes, WIDTH, torch.float32, side.bits, side.levels)
        scale, zero = (part.repeat_interleave(side.group, dim=-2) for part in (side.scale, side.zero))
        return torch.cat((front, (codes - zero) * scale, tail), dim=2)

    keys, others = values(key, *ends[:2]), values(value, *ends[2:])
    whole = attention_lse_reference(AttentionCall(query, Coded(keys), Coded(others), 0.125))
    call = AttentionCall(query, key, value, 0.125, ends=ends)
    for output, lse in (attention_lse_reference(call), attention_lse(*ATTENTION_CALL.flat(call))):
        assert_close(output, whole[0])
        assert_lse_close(lse, whole[1])


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["key_front", "value_tail", "key_scale", "key_zero", "value_zero"])
def test_what_is_no_number_reaches_the_output(where: str, what: float) -> None:
    key, value = coded("int2", "channel", 128), coded("int4", "token", 128)
    ends = Ends(*(torch.randn(1, GROUPS, 4, WIDTH) for _ in range(4)))
    parts = {"key_scale": key.scale, "key_zero": key.zero, "value_zero": value.zero, **ends._asdict()}
    parts[where][..., 0, 0] = what
    query = torch.randn(1, 2 * GROUPS, 1, WIDTH).abs()
    output, _ = attention_lse(*ATTENTION_CALL.flat(AttentionCall(query, key, value, 0.125, ends=ends)))
    assert not output.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_front": torch.zeros(1, GROUPS, 3, WIDTH)}, "do not go together"),
        ({"key_tail": torch.zeros(1, GROUPS, 4, 32)}, "key_tail"),
        ({"value_tail": torch.zeros(1, GROUPS, 4, WIDTH, dtype=torch.int8)}, "value_tail"),
        ({"query_scale": torch.ones(1)}, "query_scale goes with codes"),
        ({"key_bits": 3}, "int3"),
        ({"key_bits": 7}, "2, 3 or 4 bits"),
        ({"value_levels": torch.zeros(4)}, "value_levels"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict, message: str) -> None:
    floats = torch.zeros(1, GROUPS, 4, WIDTH)
    arguments = {
        "query": torch.randn(1, 4, 1, WIDTH), "scaling": 1.0, "key_bits": 2, "key_front": floats, "value_front": floats,
        "key": coded("int2", "token", 8).codes, "value": coded("int8", "token", 8).codes,
    }  # fmt: skip
    arguments.update(change)
    if change.keys() & {"key_tail", "value_tail"}:
        arguments.update({"key_tail": floats, "value_tail": floats} | change)
    with pytest.raises(ValueError, match=message):
        attention_lse(**arguments)
