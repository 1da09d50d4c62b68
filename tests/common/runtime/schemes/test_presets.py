"""The contract of the cache for every preset, and what each costs: sinks, windows, groups and codebooks included."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from octavo.common.errors import OctavoError
from octavo.common.runtime.attention import quantized_attention
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.segment_store import SegmentStore
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM, PRESETS, Scheme, load_scheme

from ....support import tiny_config
from ....tolerances import TOLERANCES
from .models import (
    CHUNKS,
    GROUPS,
    HEADS,
    LAYERS,
    SIZES,
    TOKENS,
    WIDTH,
    Make,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def states(tokens: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random K and V of one layer; K with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn((batch, GROUPS, tokens, WIDTH), generator=generator) for _ in range(2))
    key[..., 3] += 4
    return key, value


def fill(cache: QuantizedCache, tokens: int, batch: int = 1, seed: int = 0) -> None:
    """Append random states to every layer."""
    for layer in range(len(cache.layers)):
        cache.update(*states(tokens, batch, seed + layer), layer)


def segments(cache: QuantizedCache, layer: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of K and of V: the first tokens in float, what the codes stand for, and the newest tokens in float."""
    for store in (cache.layers[layer].key_store, cache.layers[layer].value_store):
        body = store.body if isinstance(store, SegmentStore) else store
        decoded = body.decoded(0, body.length)
        front, tail = (None, None) if body is store else (store._front, store._tail[:, :, : store._kept])
        if body is not store and store._is_delayed:
            tail = tail[:, :, body.length - store._offset :]
        empty = decoded[:, :, :0]
        yield tuple(empty if part is None else part for part in (front, decoded, tail))


def stored(cache: QuantizedCache, layer: int = 0) -> list[torch.Tensor]:
    """K and V as a layer stores them, float32 `[B, G, S, D]`."""
    return [torch.cat((front.float(), body, tail.float()), dim=2) for front, body, tail in segments(cache, layer)]


# On states: exactly.


@pytest.mark.parametrize("preset", PRESETS)
def test_attention_does_not_depend_on_how_tokens_are_cut(preset: str, cache: Make) -> None:
    query = torch.randn((2, HEADS, TOKENS, WIDTH), generator=torch.Generator().manual_seed(1))
    key, value = states(TOKENS, batch=2)

    def attend(sizes: tuple[int, ...]) -> torch.Tensor:
        filled, outputs = cache(preset), []
        for q, k, v in zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True):
            outputs.append(quantized_attention(torch.nn.Module().eval(), q, *filled.update(k, v, 0), None)[0])
        return torch.cat(outputs, dim=1)

    whole = attend((TOKENS,))
    # Rotating one token and many rounds differently, which tips float16 of the window and fp8 of the queries over.
    scheme = load_scheme(preset)
    is_rotated = scheme.rotate_key or scheme.rotate_value
    has_zero = any(codec is not None and codec.has_zero for codec in (scheme.key, scheme.value))
    tips = (is_rotated and has_zero) or scheme.has_bases  # zeros in float16 over, too, and single codes with them
    tolerance = TOLERANCES["codes tipped over" if tips else "logits" if is_rotated else "attention of many rows"]
    torch.testing.assert_close(attend(CHUNKS), whole, atol=tolerance, rtol=0)
    torch.testing.assert_close(attend((1,) * TOKENS), whole, atol=tolerance, rtol=0)


def feed(cache: QuantizedCache, states: tuple[torch.Tensor, torch.Tensor], *sizes: int) -> None:
    """Give the first layer tokens of these numbers, and then the others."""
    rest = states[0].shape[2] - sum(sizes)
    for key, value in zip(*(part.split((*sizes, rest), dim=2) for part in states), strict=True):
        if key.shape[2]:
            cache.update(key, value, 0)


def assert_equal(first: QuantizedCache, second: QuantizedCache) -> None:
    """The first layers of two caches store the same, bit by bit."""
    assert first.get_seq_length() == second.get_seq_length()
    for ours, theirs in zip(segments(first), segments(second), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("left", [199, 180, 136, 128, 70, 5, 2, 1])
def test_after_a_crop_all_is_as_if_the_tokens_had_never_come(preset: str, left: int, cache: Make) -> None:
    cropped, fresh, wrong = cache(preset, crop_room=TOKENS), cache(preset), states(TOKENS, seed=5)
    key, value = states(TOKENS)
    first, rest = (key[:, :, :left], value[:, :, :left]), (key[:, :, left:], value[:, :, left:])
    feed(cropped, first), feed(fresh, first)
    for tokens in (TOKENS, 90, 1):
        feed(cropped, tuple(part[:, :, :tokens] for part in wrong), min(tokens, 33))
        cropped.layers[0].crop(-tokens)
        assert_equal(cropped, fresh)
    feed(cropped, rest), feed(fresh, rest)
    assert_equal(cropped, fresh)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_newest_tokens_can_always_be_cropped_and_all_of_them(preset: str, cache: Make) -> None:
    used, fresh = cache(preset), cache(preset)
    for start in range(0, 3 * TOKENS, 29):
        feed(used, states(29, seed=start))
        feed(used, states(CROP_ROOM, seed=1), 1, 1, 37)
        used.layers[0].crop(-CROP_ROOM)
        feed(fresh, states(29, seed=start))
    assert_equal(used, fresh)
    used.layers[0].crop(-10000)
    feed(used, states(TOKENS)), fresh.reset(), feed(fresh, states(TOKENS))
    assert_equal(used, fresh)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_deeper_crop_is_exact_or_refused_and_changes_nothing_then(preset: str, cache: Make) -> None:
    scheme = load_scheme(preset)
    is_delayed = any(scheme.is_delayed(codec) for codec in (scheme.key, scheme.value))
    used, untouched = cache(preset, crop_room=7), cache(preset, crop_room=7)
    for each in (used, untouched):
        fill(each, TOKENS)
    if is_delayed:
        step = max(scheme.step(codec) for codec in (scheme.key, scheme.value))
        with pytest.raises(OctavoError, match=r"crop\(-190\): crop_room=7 .* not 190; .*crop_room=\d+ \(") as refused:
            used.crop(-190)
        assert "\n" not in str(refused.value)
        needed = int(str(refused.value).split("crop_room=")[2].split(" ")[0])
        assert 190 <= needed < 190 + step
        for layer in range(LAYERS):
            assert used.layers[layer].get_seq_length() == TOKENS
        assert_equal(used, untouched)
        used = cache(preset, crop_room=needed)
        fill(used, TOKENS)
    used.crop(-190)
    if scheme.rotate_key or scheme.rotate_value:  # rotating 10 tokens and 200 rounds differently
        assert used.get_seq_length() == 10
    else:
        fresh = cache(preset)
        feed(fresh, tuple(part[:, :, :10] for part in states(TOKENS)))
        assert_equal(used, fresh)


def test_layers_are_cropped_together_or_not_at_all(cache: Make) -> None:
    """The first layer could be, of which each token has a scale of its own."""
    scheme = Scheme.from_dict({**load_scheme("octavo-4").to_dict(), "layers": {"0": "int8-token"}})
    used = cache(scheme)
    fill(used, TOKENS)
    with pytest.raises(OctavoError, match="crop_room=64 keeps floats for"):
        used.crop(-150)
    assert [layer.get_seq_length() for layer in used.layers] == [TOKENS] * LAYERS
    used.crop(-CROP_ROOM)
    assert [layer.get_seq_length() for layer in used.layers] == [TOKENS - CROP_ROOM] * LAYERS


def test_a_crop_into_the_first_pass_of_smoothed_keys_is_refused(cache: Make) -> None:
    scheme = Scheme.from_dict({**load_scheme("int8-token").to_dict(), "smooth_key": True})
    used, fresh = cache(scheme), cache(scheme)
    feed(used, states(30), 20), feed(fresh, states(30), 20)
    for amount in (-11, -29):
        with pytest.raises(OctavoError, match="first 20 tokens"):
            used.crop(amount)
    used.layers[0].crop(-10)
    feed(used, tuple(part[:, :, 20:] for part in states(30)))
    assert_equal(used, fresh)
    used.layers[0].crop(-30)
    feed(used, states(25, seed=3)), fresh.reset(), feed(fresh, states(25, seed=3))
    assert_equal(used, fresh)


@pytest.mark.parametrize("room", [-1, 1.5, None, True])
def test_a_room_that_is_no_number_of_tokens_is_refused(room: Any, cache: Make) -> None:
    with pytest.raises(OctavoError, match="crop_room"):
        cache("octavo-4", crop_room=room)


SELECTIONS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "by mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "offload and prefetch": (lambda cache: [(one.offload(), one.prefetch()) for one in cache.layers], [0, 1, 2]),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tokens", [3, TOKENS])
def test_batch_methods_choose_rows(preset: str, tokens: int, cache: Make) -> None:
    for change, rows in SELECTIONS.values():
        used = cache(preset)
        change(used)
        fill(used, tokens, batch=3)
        before = [stored(used, layer) for layer in range(LAYERS)]
        change(used)
        for layer in range(LAYERS):
            for now, then in zip(stored(used, layer), before[layer], strict=True):
                assert torch.equal(now, then[rows])
        fill(used, 2, batch=len(rows), seed=3)
        assert used.get_seq_length() == tokens + 2


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("max_length", [None, 230])
def test_reset_forgets_everything(preset: str, max_length: int | None, cache: Make) -> None:
    used, fresh = cache(preset, max_length=max_length), cache(preset)
    fill(used, TOKENS)
    used.reset()
    assert used.get_seq_length() == 0
    for change, _ in SELECTIONS.values():
        if change is not SELECTIONS["batch_repeat_interleave"][0] and max_length is None:
            change(used)
    for each in (used, fresh):
        fill(each, TOKENS, seed=8)
    for layer in range(LAYERS):
        for a, b in zip(stored(used, layer), stored(fresh, layer), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("preset", [name for name in PRESETS if load_scheme(name).is_segmented])
def test_rows_are_chosen_in_a_fixed_cache_that_was_reset(preset: str, cache: Make) -> None:
    used = cache(preset, max_length=230)
    fill(used, 150, batch=2)
    used.reset()
    used.reorder_cache(torch.tensor([1, 0]))
    fill(used, 150, batch=2)
    assert used.get_seq_length() == 150


@pytest.mark.parametrize("preset", PRESETS)
def test_what_does_not_fit_is_refused(preset: str, cache: Make) -> None:
    small = cache(preset, max_length=100)
    fill(small, 100)
    with pytest.raises(ValueError, match="max_length=100"):
        fill(small, 1)
    with pytest.raises(ValueError, match="1 sequences"):
        fill(cache_with(cache, preset), 1, batch=3)


def cache_with(cache: Make, preset: str) -> QuantizedCache:
    """A cache that holds 9 tokens of one sequence."""
    used = cache(preset)
    fill(used, 9)
    return used


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tokens", [150, 160, 200, 219])
def test_counted_bits_are_what_is_stored(preset: str, tokens: int, cache: Make) -> None:
    """Of tokens in use: not less than is counted for, but for the float window, which is counted at its mean size."""
    half = torch.float16
    used = cache(preset)
    scheme = used.scheme
    for layer in range(LAYERS):
        used.update(*(part.to(half) for part in states(tokens, seed=layer)), layer)
    total = slack = 0
    for layer in used.layers:
        for store in (layer.key_store, layer.value_store):
            body = store.body if isinstance(store, SegmentStore) else store
            floats = 0 if body is store else store.sinks + store._kept
            total += 16 * floats * GROUPS * WIDTH
            for part in body.parts():
                rows = body.length * part.shape[2] // body.storage.shape[2]
                total += 8 * part[:, :, :rows].numel() * part.itemsize
            constants = (body._static_scale, body._static_zero, body._levels)
            is_counted = body.codec is not None and body.codec.is_calibrated
            total += sum(8 * part.nbytes for part in constants if part is not None) if is_counted else 0
            slack += (scheme.step(store.codec) - 1) / 2 * GROUPS * (16 * WIDTH)
    bits = kv_bits_per_element(readers_config(used), scheme, tokens, crop_room=CROP_ROOM)
    counted = bits * 2 * LAYERS * tokens * GROUPS * WIDTH
    assert abs(counted - total) <= slack + 1e-6 * total
    if not scheme.is_segmented:
        assert counted == pytest.approx(total)


def readers_config(used: QuantizedCache) -> Any:
    """The config of the tiny Llama, whose sizes those of the states are."""
    return tiny_config(**SIZES)
