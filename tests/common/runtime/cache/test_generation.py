"""Generation with the cache, against DynamicCache and against recomputing everything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.common.runtime.attention import quantized_attention
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.checkpoint.ascend import scale_tensors
from octavo.common.runtime.decoder import attention_modules
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.common.runtime.static_scales import load_statistics, scales_of
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM
from octavo.ops.shared.codes import unpack_int4

from ....metrics import rmse_in_std
from ....support import CACHE_NAME, random_ids, tiny_config, tiny_llama, with_cache
from ....tolerances import TOLERANCES
from .tiny import (
    LAYERS,
    NEW_TOKENS,
    SCHEMES,
    WIDTH,
    generate,
    states,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
    two_lines,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS_TO_GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 7},
}


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

    torch.testing.assert_close(attend(chunk), attend(520), atol=TOLERANCES["attention of many rows"], rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(chunk: int, quantized: torch.nn.Module) -> None:
    """Within 1e-4 in float32, but for the few codes that float noise of the linears tips over a rounding boundary.

    A linear layer of one token and one of many round differently, by 1e-7; where K or V lies that close to the middle
    between two codes, the code changes by 1. With one token at a time this happens to some codes in a thousand.
    """
    ids = random_ids(1, 90)  # of more, attention has another tolerance
    with torch.inference_mode():
        one, many = quantized.new_cache(), quantized.new_cache()
        whole = quantized(ids, **with_cache(one)).logits
        parts = torch.cat([quantized(part, **with_cache(many)).logits for part in ids.split(chunk, dim=1)], dim=1)
    if chunk > 8 or one.scheme.name == "float":  # up to 8 tokens go through all layers in one call, see decoder_step.py
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


def test_logits_of_many_tokens_hardly_depend_on_how_they_are_cut(quantized: torch.nn.Module) -> None:
    """Attention of many rows differs by 1e-4, which tips more codes over; it stays far below what quantization does."""
    ids = random_ids(1, 520)
    with torch.inference_mode():
        one, many = quantized.new_cache(), quantized.new_cache()
        whole = quantized(ids, **with_cache(one)).logits
        parts = torch.cat([quantized(part, **with_cache(many)).logits for part in ids.split(64, dim=1)], dim=1)
    assert rmse_in_std(parts, whole) <= TOLERANCES["logits rmse of many rows"]


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
