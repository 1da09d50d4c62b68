"""The contract of the cache for every preset, and what each costs: sinks, windows, groups and codebooks included."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from octavo.common.convert.calibration.codebooks import fit_codebooks
from octavo.common.convert.calibration.observe import calibrate
from octavo.common.errors import OctavoError
from octavo.common.runtime.attention import quantized_attention
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.segment_store import SegmentStore
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM, PRESETS, Scheme, load_scheme
from octavo.common.runtime.static_scales import Statistics, scales_of
from octavo.common.stock_model import prepare

from ....metrics import rmse_in_std
from ....support import random_ids, randomized, tiny_config, tiny_llama, with_cache
from ....tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 200  # more than a window of 128 and a group of 64
LAYERS, HEADS, GROUPS, WIDTH = 2, 4, 2, 32
CHUNKS = (37, 83, 1, 79)
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": HEADS * WIDTH, "head_dim": WIDTH}
KINDS = ("llama", "qwen2", "qwen2 folded")
REPRESENTATIVES = ("float", "int8-token", "llamacpp-q4_1", "vllm-fp8-head", "kivi-2", "kvquant-3", "octavo-4")
"""One preset of each way to store K and V; the others of the models' tests are marked as slow."""
SMALL_STEPS = ("float", "ascend-c8", "ascend-fa", "int8-token", "llamacpp-q8_0", "lmdeploy-int8", "octavo-8")


def presets(*others: str) -> list[Any]:
    """All presets but `others`, those that are not representative as slow."""
    chosen = [name for name in PRESETS if name not in others]
    return [name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.slow) for name in chosen]


def build(kind: str) -> torch.nn.Module:
    """A tiny model in float32; Qwen2 with biases of k that are large beside its keys."""
    if kind == "llama":
        return tiny_llama(**SIZES)
    settings = {k: v for k, v in tiny_config(**SIZES).to_diff_dict().items() if k not in ("model_type", "head_dim")}
    torch.manual_seed(0)
    model = randomized(Qwen2ForCausalLM(Qwen2Config(**settings)))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_(std=5)
    return model


@pytest.fixture(scope="module")
def found() -> dict[str, Statistics]:
    """Statistics of each model, codebooks included."""
    samples = [{"input_ids": random_ids(1, 250, seed=seed)} for seed in (7, 8)]
    result = {}
    for kind in ("llama", "qwen2"):
        model = build(kind)
        result[kind] = fit_codebooks(model, samples, calibrate(model, [], samples))
    return {**result, "qwen2 folded": result["qwen2"]}


@pytest.fixture(scope="module")
def readers() -> dict[str, torch.nn.Module]:
    """Each model, reading codes."""
    made = {kind: build(kind) for kind in KINDS}
    for kind, model in made.items():
        prepare(model) if kind == "qwen2 folded" else model.set_attn_implementation("octavo")
    return made


Make = Callable[..., QuantizedCache]


def scheme_for(kind: str, preset: str) -> Scheme:
    """The preset, with biases in the cache where the model has them there."""
    scheme = load_scheme(preset)
    if kind == "qwen2" and scheme.has_codebooks:
        pytest.skip("codebooks are for K without its bias")
    return scheme if kind == "llama" else load_scheme({**scheme.to_dict(), "fold_bias": kind == "qwen2 folded"})


@pytest.fixture(scope="module")
def cache(found: dict[str, Statistics], readers: dict[str, torch.nn.Module]) -> Make:
    """`cache(preset, kind, ...)`: an empty cache."""

    def make(preset: str, kind: str = "llama", **arguments: Any) -> QuantizedCache:
        scheme = scheme_for(kind, preset)
        scales = scales_of(scheme, found[kind]) if scheme.is_static else None
        return QuantizedCache(readers[kind].config, scheme, scales=scales, **arguments)

    return make


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
    tolerance = TOLERANCES["logits" if scheme.rotate_key or scheme.rotate_value else "attention"]
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
    used, scheme = cache(preset), load_scheme(preset)
    for layer in range(LAYERS):
        used.update(*(part.to(half) for part in states(tokens, seed=layer)), layer)
    total = slack = 0
    for layer in used.layers:
        for store in (layer.key_store, layer.value_store):
            body = store.body if isinstance(store, SegmentStore) else store
            floats = 0 if body is store else store.sinks + store._kept
            rows = body.length // (1 if body.codec is None else body.codec.token_group)
            total += 16 * floats * GROUPS * WIDTH
            parts = [(part, body.length) for part in (body._codes, body._outliers, body._channels)]
            parts += [(part, rows) for part in (body._scale, body._zero)]
            total += sum(8 * part[:, :, :count].numel() * part.itemsize for part, count in parts if part is not None)
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


# On models.


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: torch.Tensor, used: QuantizedCache, *sizes: int, **more: Any) -> torch.Tensor:
    """Of all tokens, which come in chunks."""
    parts = ids.split(sizes or (ids.shape[1],), dim=1)
    return torch.cat([model(part, **with_cache(used), **more).logits for part in parts], dim=1)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """Logits of the float models."""
    with torch.inference_mode():
        return {kind: build(kind)(random_ids(1, TOKENS)).logits for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", presets())
def test_logits_are_close_to_float_and_do_not_depend_on_chunks(
    preset: str, kind: str, cache: Make, readers: dict[str, torch.nn.Module], expected: dict[str, torch.Tensor]
) -> None:
    ids = random_ids(1, TOKENS)
    whole = logits(readers[kind], ids, cache(preset, kind))
    cut = logits(readers[kind], ids, cache(preset, kind), *CHUNKS)
    assert rmse_in_std(cut, whole) <= 10 * TOLERANCES["logits rmse with codes tipped over"]
    error = rmse_in_std(whole, expected[kind])
    if kind != "qwen2":
        assert error < (0.08 if preset in SMALL_STEPS else 1.2 if preset.endswith("2") else 0.7)
    assert (error < 1e-4) == (preset == "float")


@pytest.mark.parametrize("kind", ["llama", "qwen2 folded"])
@pytest.mark.parametrize("preset", presets())
def test_a_left_padded_row_is_as_good_as_the_row_alone(
    preset: str, kind: str, cache: Make, readers: dict[str, torch.nn.Module], expected: dict[str, torch.Tensor]
) -> None:
    """Equal to it where each token has a scale of its own; groups, sinks and slots of tokens are others otherwise."""
    model, ids, pad = readers[kind], random_ids(1, TOKENS), 21
    other = random_ids(1, TOKENS + pad, seed=9)
    both = torch.cat((other, torch.cat((torch.full((1, pad), 2), ids), dim=1)))
    mask = torch.ones_like(both)
    mask[1, :pad] = 0
    positions, scheme = (mask.cumsum(1) - 1).clamp_min(0), load_scheme(preset)
    padded = {"attention_mask": mask, "position_ids": positions, **with_cache(cache(preset, kind))}
    if scheme.key is not None and scheme.key.before_rope:
        with pytest.raises(OctavoError, match="padding at the left"):
            model(both, **padded)
        return
    with torch.inference_mode():
        together = model(both, **padded).logits
    alone = logits(model, ids, cache(preset, kind))
    if not (scheme.is_segmented or scheme.has_codebooks):
        assert rmse_in_std(together[1:, pad:], alone) <= 10 * TOLERANCES["logits rmse with codes tipped over"]
    else:
        own, beside = (rmse_in_std(found, expected[kind]) for found in (alone, together[1:, pad:]))
        assert beside < 1.7 * own + 0.02


def score(model: torch.nn.Module, ids: torch.Tensor, prompt: int, used: QuantizedCache) -> torch.Tensor:
    """Log-probabilities of what was generated, in one pass over everything, `[B, S - prompt]`."""
    found = logits(model, ids, used)[:, prompt - 1 : -1].float().log_softmax(dim=-1)
    return found.gather(-1, ids[:, prompt:, None])[..., 0], found.amax(dim=-1)


@pytest.mark.parametrize("kind", ["llama", "qwen2 folded"])
@pytest.mark.parametrize("preset", presets())
def test_generation_and_beams_give_what_one_pass_says(
    preset: str, kind: str, cache: Make, readers: dict[str, torch.nn.Module]
) -> None:
    model, ids = readers[kind], random_ids(2, 150)
    arguments = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    greedy = model.generate(ids, **with_cache(cache(preset, kind)), **arguments).sequences
    chosen, best = score(model, greedy, 150, cache(preset, kind))
    # Float noise tips a code over now and then, which at 2 bits is a third of the range of its group.
    assert ((best - chosen) < 2e-2).float().mean() > (0.85 if preset.endswith("2") else 0.999)
    fixed = model.generate(ids, **with_cache(cache(preset, kind, max_length=170)), **arguments).sequences
    assert torch.equal(fixed, greedy)
    beams = {**arguments, "num_beams": 3, "length_penalty": 0.0, "output_scores": True}
    result = model.generate(ids, **with_cache(cache(preset, kind)), **beams)
    found = score(model, result.sequences, 150, cache(preset, kind))[0].sum(dim=1)
    tolerance = 1.0 if preset.endswith("2") else 5e-2
    torch.testing.assert_close(result.sequences_scores, found, atol=tolerance, rtol=0)


@pytest.mark.parametrize("preset", presets("float"))
def test_folded_biases_leave_less_to_lose(
    preset: str, cache: Make, readers: dict[str, torch.nn.Module], expected: dict[str, torch.Tensor]
) -> None:
    ids = random_ids(1, TOKENS)
    with_bias, folded = (
        rmse_in_std(logits(readers[kind], ids, cache(preset, kind)), expected[kind])
        for kind in ("qwen2", "qwen2 folded")
    )
    assert folded < (with_bias if load_scheme(preset).key.granularity != "channel" else 1.3 * with_bias)
