"""Long passes in chunks: the logits and codes of one pass, and a pass that is more than its tokens goes whole."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from octavo.common.convert.source.probes import layer_arguments
from octavo.common.runtime import passes
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.rotary import changes_with_length
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.common.stock_model import prepare
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM
from octavo.models.qwen2.modeling_qwen2_fa3 import Qwen2ForCausalLM

from ...support import random_ids, randomized, tiny_config, tiny_llama, tiny_tokenizer, with_cache
from ...tolerances import TOLERANCES
from .cache.tiny import decoded, generate, tiny_mistral, tiny_qwen2

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK, TOKENS = 8, 77
"""Nine chunks and a part of one, which the groups of 64 tokens of some schemes and the sliding windows lie across."""
SCHEMES = ("float", "int8-token", "fp8-token", "octavo-4", "octavo-2")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "CHUNK", CHUNK)
    monkeypatch.setattr(passes, "SHORTEST_CHUNK", 4)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each pass, or chunk of one, as the layers see them."""
    found: list[int] = []
    original = passes.one_pass

    def counted(base: Any, forward: Any, arguments: dict[str, Any]) -> Any:
        given = arguments.get("input_ids")
        found.append((arguments["inputs_embeds"] if given is None else given).shape[1])
        return original(base, forward, arguments)

    monkeypatch.setattr(passes, "one_pass", counted)
    return found


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`whole(call)`: what a call gives where passes are not cut."""

    def run(call: Callable[[], Any]) -> Any:
        with monkeypatch.context() as context:
            context.setattr(passes, "CHUNK", 10**6)
            return call()

    return run


STOCK = {"llama": tiny_llama, "mistral": tiny_mistral, "qwen2": tiny_qwen2}


def stock(kind: str = "llama") -> torch.nn.Module:
    return prepare(STOCK[kind]().double())


def converted(scheme: str, model_class: type = LlamaForCausalLM) -> torch.nn.Module:
    """A model of ours with random weights in float64."""
    torch.manual_seed(0)
    config = tiny_config() if model_class is LlamaForCausalLM else tiny_qwen2().config
    config._attn_implementation = None
    config.octavo = {"scheme": scheme}
    return randomized(model_class(config)).double()


# The same numbers


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pass_in_chunks_gives_the_logits_and_codes_of_one_pass(
    scheme: str, kind: str, seen: list[int], whole: Callable
) -> None:
    model, ids = stock(kind), random_ids(1, TOKENS)
    caches = [QuantizedCache(model.config, scheme) for _ in range(2)]
    with torch.inference_mode():
        expected = whole(lambda: model(ids, **with_cache(caches[0])).logits)
        found = model(ids, **with_cache(caches[1])).logits
    assert seen == [TOKENS] + [CHUNK] * 9 + [5]
    torch.testing.assert_close(found, expected, atol=TOLERANCES["logits"], rtol=0)
    assert caches[1].get_seq_length() == TOKENS
    assert caches[1].nbytes() == caches[0].nbytes(), "room is made once"
    if scheme == "int8-token":
        for one, other in zip(decoded(caches[0], 1), decoded(caches[1], 1), strict=True):
            torch.testing.assert_close(one[..., -8:, :], other[..., -8:, :])


@pytest.mark.parametrize("scheme", ["int8-token", "octavo-4"])
@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_a_converted_model_chunks_and_equals_chunks_by_hand_bit_for_bit(
    scheme: str, model_class: type, seen: list[int]
) -> None:
    model, ids = converted(scheme, model_class).float(), random_ids(2, TOKENS)
    decoder, by_hand, given = model.model, model.new_cache(), model.new_cache()
    with torch.inference_mode():
        parts = [decoder(part, **with_cache(by_hand)).last_hidden_state for part in ids.split(CHUNK // 2, dim=1)]
        seen.clear()
        found = decoder(ids, **with_cache(given)).last_hidden_state
        assert seen == [CHUNK // 2] * 19 + [1]  # a batch of two shares the tokens of a chunk
        assert torch.equal(found, torch.cat(parts, dim=1))
        assert torch.equal(decoder(ids).last_hidden_state, found), "a pass that is given no cache"
        assert torch.equal(decoder(ids, return_dict=False)[0], found)
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(decoder(inputs_embeds=embedded).last_hidden_state, found)
        assert torch.equal(model(ids).logits, model.lm_head(found))


@pytest.mark.parametrize("kind", STOCK)
def test_batches_padded_at_the_left(kind: str, whole: Callable, seen: list[int]) -> None:
    """By more than a chunk, which is then of nothing but padding."""
    model, ids = stock(kind), random_ids(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def logits() -> torch.Tensor:
        return model(ids, **arguments, **with_cache(QuantizedCache(model.config, "int8-token"))).logits

    with torch.inference_mode():
        expected, found = whole(logits), logits()
    assert len(seen) == 1 + 20
    visible = mask.bool()
    torch.testing.assert_close(found[visible], expected[visible], atol=TOLERANCES["logits"], rtol=0)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunks of the caller": {"prefill_chunk_size": 20},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["int8-token"])
def test_generation(scheme: str, way: str, whole: Callable, seen: list[int]) -> None:
    model, ids = converted(scheme), random_ids(1, 15).repeat(1, 3)
    expected = whole(lambda: generate(model, ids, **WAYS[way]))
    seen.clear()
    assert torch.equal(generate(model, ids, **WAYS[way]), expected)
    assert max(seen) <= CHUNK


def test_a_cache_is_cropped_and_filled_again(whole: Callable) -> None:
    model, ids = stock(), random_ids(1, TOKENS)

    def logits() -> torch.Tensor:
        cache = QuantizedCache(model.config, "octavo-4")
        model(ids, **with_cache(cache))
        cache.crop(-20)
        return model(ids[:, -20:].flip(1), **with_cache(cache)).logits

    with torch.inference_mode():
        torch.testing.assert_close(logits(), whole(logits), atol=TOLERANCES["logits"], rtol=0)


def test_generate_asks_for_the_logits_of_the_last_token(seen: list[int]) -> None:
    """Of a prompt, whose other logits nothing reads."""
    model, shapes = stock(), []
    model.lm_head.register_forward_hook(lambda _, args, output: shapes.append(output.shape[1]))
    generate(model, random_ids(1, TOKENS), **with_cache(QuantizedCache(model.config, "int8-token")), max_new_tokens=3)
    assert shapes == [1, 1, 1] and max(seen) == CHUNK


def test_a_tokenizer_that_generate_hands_on_changes_nothing(seen: list[int]) -> None:
    """As for strings at which to stop, and as transformers' server gives it always."""
    model = stock()
    cache = with_cache(QuantizedCache(model.config, "int8-token"))
    generate(model, random_ids(1, TOKENS), **cache, max_new_tokens=3, tokenizer=tiny_tokenizer())
    assert max(seen) == CHUNK


def test_a_copy_of_a_model_has_passes_of_its_own() -> None:
    model = prepare(prepare(tiny_llama()))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.zero_()
    cache = QuantizedCache(model.config, "int8-token")
    assert other(random_ids(1, TOKENS), **with_cache(cache)).logits.abs().max() == 0
    assert model.model.forward.args[0] is model.model and other.model.forward.args[0] is other.model


# What goes whole


def goes_whole(model: torch.nn.Module, seen: list[int], scheme: str | Scheme = "int8-token", **arguments: Any) -> bool:
    seen.clear()
    with torch.inference_mode():
        model(random_ids(1, TOKENS), **with_cache(QuantizedCache(model.config, scheme)), **arguments)
    return seen == [TOKENS]


@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True}])
def test_outputs_of_layers(asked: dict[str, Any], seen: list[int]) -> None:
    assert goes_whole(stock(), seen, **asked) == bool(asked)


@pytest.mark.parametrize("field", ["prefill", "smooth_key"])
def test_schemes_whose_first_pass_decides(field: str, seen: list[int]) -> None:
    changed = {**load_scheme("int8-token").to_dict(), field: "float" if field == "prefill" else True}
    assert goes_whole(stock(), seen, load_scheme(changed))


def test_a_mask_of_queries_and_keys(seen: list[int], whole: Callable) -> None:
    """Chunks of it would have to be told from those of other forms."""
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    assert goes_whole(stock(), seen, attention_mask=mask)


def test_hooks_see_whole_passes(seen: list[int]) -> None:
    """Those of somebody who looks into a model; one on the decoder itself sees its pass in either way."""
    model, shapes = stock(), []
    model.model.register_forward_hook(lambda _, args, output: shapes.append(output[0].shape[1]))
    assert not goes_whole(model, seen)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _, args, output: shapes.append(output.shape[1]))
    assert goes_whole(model, seen)
    handle.remove()
    assert not goes_whole(model, seen)
    assert shapes == [TOKENS] * 4


def test_stand_ins_for_layers_see_whole_passes(seen: list[int]) -> None:
    """As a conversion asks what each layer is called with."""
    model = stock()
    arguments = layer_arguments(model, torch.zeros(1, TOKENS, 64).double(), **with_cache(QuantizedCache(model.config)))
    assert [found["position_ids"].shape[-1] for found in arguments] == [TOKENS] * 3
    assert not goes_whole(model, seen)


def test_angles_that_change_with_the_length_of_a_pass(seen: list[int]) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = prepare(tiny_llama(rope_parameters=rope, max_position_embeddings=TOKENS - 1))
    assert goes_whole(model, seen)
    assert not changes_with_length(model.config, TOKENS - 1)
    assert not goes_whole(prepare(tiny_llama(rope_parameters=rope, max_position_embeddings=TOKENS)), seen)


def test_a_forward_that_another_library_wraps(seen: list[int]) -> None:
    """As accelerate does with modules of a model on several devices, before and after."""
    accelerate = pytest.importorskip("accelerate")
    for is_before in (True, False):
        model = tiny_llama()
        if is_before:
            accelerate.hooks.add_hook_to_module(model.model, accelerate.hooks.ModelHook())
        prepare(model)
        if not is_before:
            accelerate.hooks.add_hook_to_module(model.model, accelerate.hooks.ModelHook())
        assert not goes_whole(model, seen)
        assert max(seen) == CHUNK
