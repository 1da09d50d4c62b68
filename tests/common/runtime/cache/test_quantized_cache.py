"""QuantizedCache: transformers' cache contract on codes, against DynamicCache and against recomputing everything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from octavo.common.convert.calibration.observe import calibrate
from octavo.common.errors import OctavoError
from octavo.common.runtime.attention import Codes, quantized_attention
from octavo.common.runtime.cache.code_storage import SMALLEST_CAPACITY, capacity_for
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.checkpoint.ascend import scale_tensors
from octavo.common.runtime.decoder import attention_modules
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.common.runtime.static_scales import LayerScales, load_statistics, scales_of
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM
from octavo.ops.shared.codes import unpack_int4

from ....support import CACHE_NAME, random_ids, randomized, tiny_config, tiny_llama, with_cache
from ....tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = ("float", "int8-token", "int4-token", "fp8-token", "ascend-c8", "ascend-fa")
NEW_TOKENS = 24
LAYERS, GROUPS, WIDTH = 3, 2, 16  # of the tiny Llama

WAYS_TO_GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 7},
}


def two_lines(model: torch.nn.Module) -> torch.nn.Module:
    """The first of the two lines that make a stock model read codes; the second is the cache."""
    model.set_attn_implementation("octavo")
    return model


@pytest.fixture(scope="module")
def stock() -> torch.nn.Module:
    """The float oracle."""
    return tiny_llama()


@pytest.fixture(scope="module")
def reader() -> torch.nn.Module:
    """The same model, reading codes."""
    return two_lines(tiny_llama())


@pytest.fixture(scope="module")
def statistics(stock: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration statistics of the tiny Llama, as a file."""
    file = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    calibrate(stock, [], [{"input_ids": random_ids(1, 200, seed=seed)} for seed in range(4)]).save(file)
    return file


@pytest.fixture
def cache(reader: torch.nn.Module, statistics: Path) -> Callable[..., QuantizedCache]:
    """`cache(scheme, ...)`: an empty cache for the tiny Llama."""

    def make(scheme: str | Scheme, **arguments: Any) -> QuantizedCache:
        return QuantizedCache(reader.config, scheme, statistics=statistics, **arguments)

    return make


def generate(model: torch.nn.Module, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Generate with a fixed seed and without stopping early."""
    torch.manual_seed(5)
    return model.generate(ids, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **arguments})


def states(tokens: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random K and V of one layer."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn((batch, GROUPS, tokens, WIDTH), generator=generator) for _ in range(2))


def fill(cache: QuantizedCache, tokens: int, batch: int = 1, seed: int = 0) -> None:
    """Append random states to every layer."""
    for layer in range(len(cache.layers)):
        cache.update(*states(tokens, batch, seed + layer), layer)


def decoded(cache: QuantizedCache, layer: int = 0) -> list[torch.Tensor]:
    """K and V as the codes of a layer stand for them."""
    parts = []
    for store in (cache.layers[layer].key_store, cache.layers[layer].value_store):
        handle = store.codes()
        zero = 0 if handle.zero is None else handle.zero
        parts.append((handle.codes.float() - zero) * (1 if handle.scale is None else handle.scale))
    return parts


# Generation, with the float scheme: exactly what the stock model and DynamicCache give.


@pytest.mark.parametrize("way", WAYS_TO_GENERATE)
def test_float_cache_generates_what_dynamic_cache_does(
    way: str, stock: torch.nn.Module, reader: torch.nn.Module, cache: Callable
) -> None:
    ids = random_ids(2, 20)
    expected = generate(stock, ids, **WAYS_TO_GENERATE[way])
    assert torch.equal(generate(reader, ids, **with_cache(cache("float")), **WAYS_TO_GENERATE[way]), expected)


def test_float_cache_with_prompt_lookup(stock: torch.nn.Module, reader: torch.nn.Module, cache: Callable) -> None:
    ids = random_ids(1, 8).repeat(1, 4)
    expected = generate(stock, ids)
    given = cache("float")
    assert torch.equal(generate(reader, ids, **with_cache(given), prompt_lookup_num_tokens=3), expected)
    assert given.get_seq_length() < expected.shape[1], "rejected candidates must be cropped"


# Generation, with every scheme: what recomputing everything from codes at each step gives.


@pytest.fixture(scope="module", params=SCHEMES)
def quantized(request: pytest.FixtureRequest, statistics: Path) -> torch.nn.Module:
    """The zoo's own Llama with a scheme, its static scales loaded as from a checkpoint."""
    scheme = load_scheme(request.param)
    config = tiny_config()
    config.octavo = {"scheme": request.param}
    model = LlamaForCausalLM(config)
    scales = scales_of(scheme, load_statistics(statistics))
    model.load_state_dict({**tiny_llama().state_dict(), **scale_tensors(attention_modules(model), scheme, scales)})
    return model.eval()


@pytest.mark.parametrize("way", [*WAYS_TO_GENERATE, "static cache"])
def test_generation_equals_recomputation_without_a_cache(way: str, quantized: torch.nn.Module) -> None:
    ids = random_ids(2, 20)
    arguments = dict(WAYS_TO_GENERATE.get(way, {}))
    expected = generate(quantized, ids, **{**arguments, "prefill_chunk_size": None}, use_cache=False)
    if way == "static cache":
        arguments["cache_implementation"] = "static"
    assert torch.equal(generate(quantized, ids, **arguments), expected)


def test_prompt_lookup_equals_plain_decoding(quantized: torch.nn.Module) -> None:
    ids = random_ids(1, 8).repeat(1, 4)
    assert torch.equal(generate(quantized, ids, prompt_lookup_num_tokens=3), generate(quantized, ids))


def test_an_assistant_changes_nothing(quantized: torch.nn.Module) -> None:
    """Its candidates that are wrong (nearly all, of another random model) are cropped from the codes."""
    ids = random_ids(1, 20)
    assert torch.equal(generate(quantized, ids, assistant_model=tiny_llama(seed=1)), generate(quantized, ids))


def test_a_left_padded_row_equals_the_row_alone(quantized: torch.nn.Module) -> None:
    long, short = random_ids(1, 20, seed=3), random_ids(1, 11, seed=4)
    padding = torch.full((1, 9), quantized.config.pad_token_id)
    ids = torch.cat([long, torch.cat([padding, short], dim=1)])
    mask = torch.cat([torch.ones_like(long), torch.cat([torch.zeros_like(padding), torch.ones_like(short)], 1)])
    together = generate(quantized, ids, attention_mask=mask)
    assert torch.equal(together[:1], generate(quantized, long))
    assert torch.equal(together[1:, 9:], generate(quantized, short))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        padded = quantized(ids, attention_mask=mask, position_ids=positions).logits[1, 9:]
        alone = quantized(short).logits[0]
    torch.testing.assert_close(padded, alone, atol=TOLERANCES["logits"], rtol=0)


def test_going_on_from_a_cache_equals_one_generation(quantized: torch.nn.Module) -> None:
    ids = random_ids(1, 20)
    expected = generate(quantized, ids)
    cache = quantized.new_cache()
    first = generate(quantized, ids, **with_cache(cache), max_new_tokens=9)
    assert cache.get_seq_length() == 28, "the last token is not stored yet"
    again = generate(quantized, first, **with_cache(cache), max_new_tokens=NEW_TOKENS - 9)
    assert torch.equal(again, expected)


def test_generate_returns_the_quantized_cache(quantized: torch.nn.Module) -> None:
    result = generate(quantized, random_ids(1, 5), return_dict_in_generate=True)
    assert isinstance(getattr(result, CACHE_NAME), QuantizedCache)
    assert getattr(result, CACHE_NAME).get_seq_length() == 5 + NEW_TOKENS - 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_attention_does_not_depend_on_how_tokens_are_cut(
    chunk: int, scheme: str, cache: Callable[..., QuantizedCache]
) -> None:
    query = torch.randn((1, 4, 520, WIDTH), generator=torch.Generator().manual_seed(1))
    key, value = states(520)

    def attend(size: int) -> torch.Tensor:
        filled, outputs = cache(scheme), []
        for q, k, v in zip(*(part.split(size, dim=2) for part in (query, key, value)), strict=True):
            handles = filled.update(k, v, 0)
            outputs.append(quantized_attention(torch.nn.Module().eval(), q, *handles, None)[0])
        return torch.cat(outputs, dim=1)

    torch.testing.assert_close(attend(chunk), attend(520), atol=TOLERANCES["attention"], rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(chunk: int, quantized: torch.nn.Module) -> None:
    """Within 1e-4 in float32, but for the few codes that float noise of the linears tips over a rounding boundary.

    A linear layer of one token and one of many round differently, by 1e-7; where K or V lies that close to the middle
    between two codes, the code changes by 1. With one token at a time this happens to some codes in a thousand.
    """
    ids = random_ids(1, 520)
    with torch.inference_mode():
        one, many = quantized.new_cache(), quantized.new_cache()
        whole = quantized(ids, **with_cache(one)).logits
        parts = torch.cat([quantized(part, **with_cache(many)).logits for part in ids.split(chunk, dim=1)], dim=1)
    if chunk > 1 or one.scheme.name == "float":
        torch.testing.assert_close(parts, whole, atol=TOLERANCES["logits"], rtol=0)
    for layer in range(LAYERS if one.scheme.key else 0):
        for name in ("key_store", "value_store"):
            first, second = (getattr(used.layers[layer], name).codes().codes for used in (one, many))
            if first.dtype == torch.uint8:
                first, second = (unpack_int4(codes, WIDTH) for codes in (first, second))
            difference = (first.float() - second.float()).abs()
            # The small codes of fp8 lie closer together than the noise of the layers behind a code that tipped over.
            assert difference.max() <= 1 or one.scheme.name == "fp8-token"
            assert difference.count_nonzero() <= TOLERANCES["codes tipped over"] * difference.numel()
    assert (parts - whole).square().mean().sqrt() <= TOLERANCES["logits rmse with codes tipped over"] * whole.std()


def test_chunks_would_matter_if_the_first_pass_were_in_float(
    reader: torch.nn.Module, cache: Callable[..., QuantizedCache]
) -> None:
    scheme = Scheme.from_dict({**load_scheme("ascend-c8").to_dict(), "prefill": "float"})
    ids = random_ids(1, 64)
    with torch.inference_mode():
        whole = reader(ids, **with_cache(cache(scheme))).logits
        codes = reader(ids, **with_cache(cache("ascend-c8"))).logits
        plain = reader(ids, **with_cache(cache("float"))).logits
    assert torch.equal(whole, plain)
    assert (codes - plain).abs().max() > 1e-3


@pytest.mark.parametrize("scheme", ["int8-token", "ascend-c8", "ascend-fa"])
def test_every_scheme_is_close_to_float_and_none_is_float(
    scheme: str, stock: torch.nn.Module, reader: torch.nn.Module, cache: Callable[..., QuantizedCache]
) -> None:
    ids = random_ids(2, 100)
    with torch.inference_mode():
        expected = stock(ids).logits
        error = (reader(ids, **with_cache(cache(scheme))).logits - expected).square().mean().sqrt() / expected.std()
    assert 1e-4 < error < 5e-2


# Stock models of other architectures, in two lines.


def tiny_mistral() -> torch.nn.Module:
    config = transformers.MistralConfig(**{**tiny_config().to_diff_dict(), "model_type": "mistral"})
    config.sliding_window = 13
    return randomized(transformers.MistralForCausalLM(config))


def tiny_qwen2() -> torch.nn.Module:
    settings = {k: v for k, v in tiny_config().to_diff_dict().items() if k not in ("model_type", "head_dim")}
    layers = ["full_attention", "sliding_attention", "full_attention"]
    config = transformers.Qwen2Config(**settings, use_sliding_window=True, sliding_window=11, layer_types=layers)
    return randomized(transformers.Qwen2ForCausalLM(config))


def tiny_qwen3() -> torch.nn.Module:
    settings = {k: v for k, v in tiny_config().to_diff_dict().items() if k != "model_type"}
    return randomized(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings)))


@pytest.mark.parametrize("build", [tiny_mistral, tiny_qwen2, tiny_qwen3])
@pytest.mark.parametrize("padded", [False, True])
def test_stock_models_with_the_float_scheme_equal_sdpa(build: Callable[[], torch.nn.Module], padded: bool) -> None:
    torch.manual_seed(0)
    model = build()
    model.set_attn_implementation("sdpa")
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :17] = 0
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
    tokens = generate(model, ids, attention_mask=mask)
    two_lines(model)
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask, **with_cache(QuantizedCache(model.config, "float"))).logits
    seen = mask.bool()
    torch.testing.assert_close(logits[seen], expected[seen], atol=TOLERANCES["logits"], rtol=1e-4)
    cache = QuantizedCache(model.config, "float")
    assert torch.equal(generate(model, ids, attention_mask=mask, **with_cache(cache)), tokens)


@pytest.mark.parametrize("build", [tiny_mistral, tiny_qwen2])
def test_int8_codes_keep_the_sliding_window(build: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    ids = random_ids(1, 60)
    with torch.inference_mode():
        expected = model(ids).logits
        logits = two_lines(model)(ids, **with_cache(QuantizedCache(model.config, "int8-token"))).logits
    assert (logits - expected).square().mean().sqrt() < 0.05 * expected.std()


# The methods of the contract, on codes.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_update_returns_handles_to_all_tokens(scheme: str, cache: Callable[..., QuantizedCache]) -> None:
    filled = cache(scheme)
    key, value = states(10)
    filled.update(key[:, :, :7], value[:, :, :7], 0)
    k, v = filled.update(key[:, :, 7:], value[:, :, 7:], 0)
    codec = load_scheme(scheme).key
    width, dtype = (codec.stored_width(WIDTH), codec.stored_dtype) if codec else (WIDTH, torch.float32)
    assert isinstance(k, Codes) and k.codes.shape == v.codes.shape == (1, GROUPS, 10, width)
    assert k.codes.dtype == v.codes.dtype == dtype
    assert (k.query_scale is not None) == (scheme == "ascend-fa")
    assert filled.get_seq_length() == 10 and filled.get_seq_length(1) == 0
    assert filled.get_mask_sizes(5, 0) == (15, 0)


def test_dynamic_codes_decode_within_half_a_step(cache: Callable[..., QuantizedCache]) -> None:
    filled = cache("int8-token")
    key, value = states(50)
    filled.update(key, value, 0)
    for values, back in zip((key, value), decoded(filled), strict=True):
        step = values.abs().amax(-1, keepdim=True) / 127
        assert ((back - values).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_crop_forgets_the_newest(scheme: str, cache: Callable[..., QuantizedCache]) -> None:
    filled, fresh = cache(scheme), cache(scheme)
    key, value = states(30)
    filled.update(key, value, 0)
    filled.layers[0].crop(-12)
    assert filled.get_seq_length() == 18
    filled.update(key[:, :, :5], value[:, :, :5], 0)
    fresh.update(torch.cat([key[:, :, :18], key[:, :, :5]], 2), torch.cat([value[:, :, :18], value[:, :, :5]], 2), 0)
    for a, b in zip(decoded(filled), decoded(fresh), strict=True):
        assert torch.equal(a, b)


def test_crop_as_dynamic_cache_does(stock: torch.nn.Module, cache: Callable[..., QuantizedCache]) -> None:
    filled, oracle = cache("float"), DynamicCache(config=stock.config)
    for each in (filled, oracle):
        for layer in range(LAYERS):
            each.update(*states(30, seed=layer), layer)
    for amount in (0, -1, -11):
        filled.crop(amount), oracle.crop(amount)
        assert filled.get_seq_length() == oracle.get_seq_length()
    for layer in range(LAYERS):
        assert torch.equal(decoded(filled, layer)[0], oracle.layers[layer].keys)
    with pytest.raises(ValueError, match="negative"):
        filled.crop(5)


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_reset_forgets_everything(scheme: str, max_length: int | None, cache: Callable[..., QuantizedCache]) -> None:
    used, fresh = cache(scheme, max_length=max_length), cache(scheme, max_length=max_length)
    fill(used, 40)
    used.reset()
    assert used.get_seq_length() == 0
    for each in (used, fresh):
        fill(each, 9, seed=8)
    for layer in range(LAYERS):
        assert torch.equal(decoded(used, layer)[0], decoded(fresh, layer)[0])


def test_a_reset_cache_takes_another_batch_size(cache: Callable[..., QuantizedCache]) -> None:
    used = cache("int8-token")
    fill(used, 9, batch=2)
    used.reset()
    fill(used, 9, batch=3)
    assert decoded(used)[0].shape[0] == 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("max_length", [None, 64])
def test_a_batch_of_another_size_is_refused(
    scheme: str, max_length: int | None, cache: Callable[..., QuantizedCache]
) -> None:
    used = cache(scheme, max_length=max_length)
    fill(used, 9, batch=1)
    with pytest.raises((ValueError, RuntimeError)):
        fill(used, 9, batch=3)


SELECTIONS: dict[str, Callable[[Any], None]] = {
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(3),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "batch_select_indices by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "offload and prefetch": lambda cache: [(layer.offload(), layer.prefetch()) for layer in cache.layers],
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_batch_methods_do_to_codes_what_they_do_to_floats(
    selection: str, scheme: str, stock: torch.nn.Module, cache: Callable[..., QuantizedCache]
) -> None:
    changed, oracle = cache(scheme), DynamicCache(config=stock.config)
    fill(changed, 20, batch=3)
    for layer in range(LAYERS):
        oracle.update(*decoded(changed, layer), layer)
    SELECTIONS[selection](changed), SELECTIONS[selection](oracle)
    rows = oracle.layers[0].keys.shape[0]
    for layer in range(LAYERS):
        for a, b in zip(decoded(changed, layer), (oracle.layers[layer].keys, oracle.layers[layer].values), strict=True):
            assert torch.equal(a, b)
    fill(changed, 1, batch=rows, seed=3)
    assert changed.get_seq_length() == 21


def test_batch_methods_before_the_first_token_do_nothing(cache: Callable[..., QuantizedCache]) -> None:
    for change in SELECTIONS.values():
        empty = cache("ascend-c8")
        change(empty)
        assert empty.get_seq_length() == 0
        fill(empty, 3, batch=2)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("max_length", [None, 50])
def test_early_initialization_allocates_and_changes_nothing(
    scheme: str, max_length: int | None, cache: Callable[..., QuantizedCache]
) -> None:
    early, late = cache(scheme, max_length=max_length), cache(scheme, max_length=max_length)
    early.early_initialization(2, GROUPS, WIDTH, torch.float32, torch.device("cpu"))
    assert early.is_initialized and early.get_seq_length() == 0 and early.nbytes() > 0
    allocated = early.nbytes()
    for each in (early, late):
        fill(each, 12, batch=2)
    assert early.nbytes() == allocated
    assert torch.equal(decoded(early)[1], decoded(late)[1])


# Memory.


def storage_sizes(cache: QuantizedCache) -> list[int]:
    """Bytes of every storage behind what the handles of a cache show, each storage once."""
    storages = {}
    for layer in cache.layers:
        for store in (layer.key_store, layer.value_store):
            handle = store.codes()
            for part in (handle.codes, handle.scale if store.codec and store.codec.dynamic else None):
                if part is not None:
                    storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return list(storages.values())


@pytest.mark.parametrize("step", [2048, 1])
def test_c8_takes_a_byte_per_value(step: int, cache: Callable[..., QuantizedCache]) -> None:
    filled = cache("ascend-c8")
    for _ in range(0, 2048, step):
        fill(filled, step)
    assert storage_sizes(filled) == [2048 * GROUPS * WIDTH] * (2 * LAYERS)
    assert filled.nbytes() == 2048 * 2 * GROUPS * WIDTH * LAYERS
    static = sum(store.codes().scale.nbytes for part in filled.layers for store in (part.key_store, part.value_store))
    assert static == 2 * LAYERS * GROUPS * WIDTH * 4, "the scales are a constant, whatever the length"


def test_dynamic_scales_take_four_bytes_per_token_and_head(cache: Callable[..., QuantizedCache]) -> None:
    filled = cache("int8-token")
    fill(filled, 2048)
    assert filled.nbytes() == sum(storage_sizes(filled)) == 2048 * 2 * GROUPS * (WIDTH + 4) * LAYERS


def test_a_fixed_length_is_allocated_once_and_refuses_more(cache: Callable[..., QuantizedCache]) -> None:
    fixed = cache("ascend-c8", max_length=100)
    fill(fixed, 1)
    place = fixed.layers[0].key_store.codes().codes.data_ptr()
    for _ in range(99):
        fill(fixed, 1)
    assert fixed.layers[0].key_store.codes().codes.data_ptr() == place
    assert fixed.nbytes() == 100 * 2 * GROUPS * WIDTH * LAYERS
    assert fixed.layers[0].get_max_length() == 100
    with pytest.raises(OctavoError, match="max_length=100"):
        fill(fixed, 1)


def test_appending_copies_a_bounded_number_of_times(cache: Callable[..., QuantizedCache]) -> None:
    growing = cache("ascend-c8")
    store = growing.layers[0].key_store
    places, copied, last = 0, 0, None
    key, value = states(1)
    for length in range(3000):
        growing.update(key, value, 0)
        place = store.codes().codes.data_ptr()
        if place != last:
            places, copied, last = places + 1, copied + length, place
    assert places <= 4 * 7 + 1, "four sizes per power of two between 64 and 4096"
    assert copied <= 6 * 3000, "each token is moved a bounded number of times"


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 80, 81, 127, 128, 129, 1000, 2047, 2048, 2049, 100_000])
def test_capacity_wastes_less_than_a_quarter(tokens: int) -> None:
    assert tokens <= capacity_for(tokens) <= max(2 * SMALLEST_CAPACITY, tokens * 1.25)
    assert capacity_for(capacity_for(tokens)) == capacity_for(tokens)


# What is refused.


def test_a_static_scheme_needs_statistics(reader: torch.nn.Module) -> None:
    with pytest.raises(OctavoError, match="statistics"):
        QuantizedCache(reader.config, "ascend-c8")


def test_statistics_of_another_depth_are_refused(statistics: Path) -> None:
    with pytest.raises(OctavoError, match="another model: 3 layers, and this model has 5"):
        QuantizedCache(tiny_config(num_hidden_layers=5), "ascend-c8", statistics=statistics)
    with pytest.raises(OctavoError, match="1 layers"):
        QuantizedCache(tiny_config(), "ascend-c8", scales=[LayerScales()])


def test_an_unknown_scheme_is_refused(reader: torch.nn.Module) -> None:
    with pytest.raises(OctavoError, match="int8-token"):
        QuantizedCache(reader.config, "int7")


def test_linear_attention_is_refused() -> None:
    config = tiny_config()
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(OctavoError, match="linear_attention"):
        QuantizedCache(config)


@pytest.mark.parametrize("scheme", ["int8-token", "octavo-4"])
def test_a_cache_that_holds_more_than_the_prompt_is_refused_in_one_line(
    scheme: str, reader: torch.nn.Module, cache: Callable[..., QuantizedCache]
) -> None:
    ids, used = random_ids(1, 10), cache(scheme)
    expected = generate(reader, ids, **with_cache(used))
    with pytest.raises(OctavoError, match=r"no token comes .* which holds 20: call cache\.reset\(\)"):
        used.crop(20 - used.get_seq_length())
        generate(reader, ids, **with_cache(used))
    used.reset()
    assert torch.equal(generate(reader, ids, **with_cache(used)), expected)


def test_a_mask_that_does_not_cover_the_cache_is_refused(
    reader: torch.nn.Module, cache: Callable[..., QuantizedCache]
) -> None:
    used = cache("int8-token")
    reader(random_ids(1, 10), **with_cache(used))
    with pytest.raises(OctavoError, match="attention_mask is of 5 tokens, and 5 come to the 10 in the cache"):
        reader(random_ids(1, 5), attention_mask=torch.ones((1, 5), dtype=torch.long), **with_cache(used))
