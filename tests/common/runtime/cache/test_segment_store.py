"""Segments of floats and codes: which calls serve which queries, and a store against one that keeps all floats."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch.nn import functional

from octavo.common.runtime import attention
from octavo.common.runtime.attention import quantized_attention
from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.cache.quantized_layer import QuantizedLayer
from octavo.common.runtime.cache.segment_store import SegmentStore
from octavo.common.runtime.cache.views import as_segments, block_size, pieces
from octavo.common.runtime.schemes.kv_scheme import Scheme
from octavo.common.runtime.schemes.tensor_codec import Codec

from ....tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS, WIDTH = 2, 8
TOKEN = {"granularity": "token", "dynamic": True}
CODECS: dict[str, Codec | None] = {
    "float": None,
    "int8": Codec(**TOKEN),
    "int2": Codec("int2", **TOKEN, symmetric=False),
    "channel, 2 tokens": Codec("int4", dynamic=True, symmetric=False, group_size=2),
    "channel, 6 tokens": Codec("int8", dynamic=True, group_size=6),
    "channel, 12 tokens": Codec("int2", dynamic=True, symmetric=False, group_size=12),
    "channel, 6 tokens, in a byte": Codec(
        "int3", dynamic=True, symmetric=False, group_size=6, scale_dtype="fp8_e4m3", rule="mse"
    ),
}


@some.composite
def schemes(draw: Any) -> Scheme:
    """A scheme whose steps fit into one another, that keeps something in float or in groups."""
    window = draw(some.sampled_from([0, 1, 7, 20]))
    codecs = {part: CODECS[draw(some.sampled_from(sorted(CODECS)))] for part in ("key", "value")}
    return Scheme("random", **codecs, sinks=draw(some.sampled_from([0, 1, 4])), window=window)


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((1, GROUPS, tokens, WIDTH), generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=150)
@given(
    scheme=schemes(),
    chunks=some.lists(some.integers(1, 60), min_size=1, max_size=5),
    most=some.sampled_from([1, 5, 12, 64, 4096]),
)
def test_each_query_meets_each_slot_once(scheme: Scheme, chunks: list[int], most: int) -> None:
    layer, total = QuantizedLayer(scheme), 0
    for size in chunks:
        total += size
        keys, values = (as_segments(side) for side in layer.update(states(size), states(size, seed=1)))
        block = block_size(keys, values, most)
        met = torch.zeros((size, total), dtype=torch.int64)
        for piece in pieces(keys, values, size, block):
            (first, last), (start, stop) = piece.queries, piece.slots
            met[first:last, start:stop] += 1
            assert start < stop <= piece.seen <= total
            for side in (keys, values):
                begin, end = side.edges(piece.seen)
                assert stop <= begin or start >= end or begin <= start < stop <= end, "one segment"
                if begin <= start < end:
                    assert (start - begin) % side.body.group == 0, "whole groups from the start on"
                    if side.decoder is not None:
                        assert (start - begin) // block == (stop - begin - 1) // block, "one block"
                for query in (first, last - 1):
                    seen = total - size + query + 1
                    assert side.edges(seen) == (begin, end) or seen <= begin, "what a query sees as codes"
        assert met.max() == 1
        assert met.tril(total - size).eq(torch.ones_like(met).tril(total - size)).all()


class Naive:
    """K or V as floats, of which each call works out anew what stands as codes; the oracle of `SegmentStore`."""

    def __init__(self, scheme: Scheme, codec: Codec | None) -> None:
        self.scheme, self.codec = scheme, codec
        self.values = states(0)

    def append(self, values: torch.Tensor) -> None:
        self.values = torch.cat((self.values, values), dim=2)

    def seen(self, tokens: int) -> torch.Tensor:
        """What a query sees after which `tokens` tokens are stored, float32 `[1, G, tokens, D]`."""
        values = self.values[:, :, :tokens]
        if self.codec is None:
            return values
        first = min(tokens, self.scheme.sinks)
        step = self.codec.token_group if not self.scheme.window else -(-16 // self.codec.token_group)
        if self.scheme.window:
            step = next(n for n in range(16, 1000, 16) if n % self.codec.token_group == 0)
        last = first + max(0, tokens - self.scheme.sinks - self.scheme.window) // step * step
        store = CodeStore(self.codec)
        if last > first:
            is_half = self.scheme.window or step > 1
            body = values[:, :, first:last]
            store.append(body.half().float() if is_half else body)
            values = torch.cat((values[:, :, :first], store.decoded(0, last - first), values[:, :, last:]), dim=2)
        rounded = values.half().float()
        return torch.cat((rounded[:, :, :first], values[:, :, first:last], rounded[:, :, last:]), dim=2)


@settings(deadline=None, max_examples=60)
@given(scheme=schemes(), chunks=some.lists(some.integers(1, 40), min_size=1, max_size=4))
def test_attention_is_that_over_what_each_query_sees(scheme: Scheme, chunks: list[int]) -> None:
    if not scheme.is_segmented:
        return
    layer, naive, start = QuantizedLayer(scheme), [Naive(scheme, scheme.key), Naive(scheme, scheme.value)], 0
    for number, size in enumerate(chunks):
        key, value, query = (states(size, seed=10 * number + part) for part in range(3))
        naive[0].append(key), naive[1].append(value)
        found = quantized_attention(torch.nn.Module().eval(), query, *layer.update(key, value), None)[0]
        for row in range(size):
            seen = [side.seen(start + row + 1) for side in naive]
            wanted = functional.scaled_dot_product_attention(query[:, :, row : row + 1], *seen)
            torch.testing.assert_close(found[:, row], wanted[:, :, 0], atol=10 * TOLERANCES["attention"], rtol=0)
        start += size


@pytest.mark.parametrize("sides", [("channel, 6 tokens", "float"), ("channel, 12 tokens", "channel, 6 tokens"),
                                   ("float", "channel, 6 tokens"), ("channel, 12 tokens", "int8")])  # fmt: skip
@pytest.mark.parametrize("most", [16, 4])
def test_groups_that_do_not_divide_a_block(sides: tuple[str, str], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are decoded are cut between groups, whatever their size is; they make what a single call makes."""
    scheme = Scheme("mine", *(CODECS[side] for side in sides), sinks=3)
    query, key, value = (states(100, seed=seed) for seed in range(3))

    def attend() -> torch.Tensor:
        handles = QuantizedLayer(scheme).update(key, value)
        return quantized_attention(torch.nn.Module().eval(), query, *handles, None)[0]

    whole = attend()
    monkeypatch.setattr(attention, "DECODED_BLOCK", most)
    monkeypatch.setattr(attention, "_is_one_call", lambda *_: False)
    monkeypatch.setattr(Codec, "is_native_on", lambda codec, device: codec.is_native)
    torch.testing.assert_close(attend(), whole, atol=TOLERANCES["attention"], rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    scheme=schemes(),
    steps=some.lists(some.tuples(some.integers(0, 50), some.integers(0, 60)), min_size=1, max_size=5),
)
def test_appending_and_cropping_keep_the_count_and_the_place_of_codes(
    scheme: Scheme, steps: list[tuple[int, int]]
) -> None:
    store, length = SegmentStore(scheme, scheme.key, CodeStore(scheme.key), crop_room=20), 0
    longest = 0  # from which the room counts
    for added, left in steps:
        if added:
            store.append(states(added))
        length += added
        longest = max(longest, length)
        if left < length and not store.can_crop(left):
            assert left < longest - 20 and 0 < left < store.shortest()
            continue
        assert left == 0 or left >= store.shortest() or scheme.coded(scheme.key, left) in (0, left - store.sinks)
        length = min(length, left)
        store.crop(left)
        longest = longest if length else 0
        assert store.length == length
        if length and scheme.is_delayed(scheme.key):
            assert store.body.length == scheme.coded(scheme.key, length)


def test_the_dtype_of_the_window() -> None:
    scheme = Scheme("mine", CODECS["int8"], CODECS["int8"], sinks=2, window=4)
    for dtype, kept in ((torch.float32, torch.float16), (torch.float16, torch.float16), (torch.bfloat16,) * 2):
        keys, _ = QuantizedLayer(scheme).update(states(9).to(dtype), states(9).to(dtype))
        assert keys.front.dtype == keys.tail.dtype == kept
