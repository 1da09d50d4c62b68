"""Whatever transformers calls the cache, and whoever fails to give it: attention reads codes or says that it cannot."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from octavo.common.errors import OctavoError
from octavo.common.runtime import compatibility
from octavo.common.runtime import model as model_module
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sizes import kv_bits_per_element, kv_bytes_per_token
from octavo.common.runtime.compatibility import CACHE_ARGUMENTS, cache_argument, take_cache
from octavo.common.runtime.model import check_transformers
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.common.stock_model import prepare
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ...support import random_ids, randomized, tiny_config, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = random_ids(1, 24)


@pytest.fixture(scope="module")
def own() -> torch.nn.Module:
    """The zoo's Llama with an int8 cache."""
    config = tiny_config()
    config.octavo = {"scheme": "int8-token"}
    model = LlamaForCausalLM(config)
    model.load_state_dict(tiny_llama().state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def prepared() -> torch.nn.Module:
    """A stock Llama after the first of the two lines."""
    return prepare(tiny_llama())


def cache_of(output: Any) -> Any:
    """The cache in an output of a model, without the warning that the old name brings."""
    return next(output[name] for name in CACHE_ARGUMENTS if name in output.keys())  # noqa: SIM118, keys as they are


@torch.no_grad()
def test_a_plain_pass_stores_codes(own: torch.nn.Module) -> None:
    for arguments in ({}, {"labels": IDS}, {"attention_mask": torch.ones_like(IDS)}, {"output_hidden_states": True}):
        layers = cache_of(own(IDS, **arguments)).layers
        assert [layer.key_store.codes().codes.dtype for layer in layers] == [torch.int8] * 3
        assert layers[0].get_seq_length() == IDS.shape[1]


@torch.no_grad()
def test_a_pass_without_a_cache_reads_the_same_codes(own: torch.nn.Module) -> None:
    wanted = own(IDS)
    found = own(IDS, use_cache=False)
    assert torch.equal(found.logits, wanted.logits)
    assert not any(name in found.keys() for name in CACHE_ARGUMENTS)  # noqa: SIM118
    assert (wanted.logits - tiny_llama()(IDS).logits).abs().max() > 1e-3, "these are codes, not floats"


@torch.no_grad()
def test_the_decoder_takes_a_cache_by_either_name_and_by_its_place(own: torch.nn.Module) -> None:
    decoder = own.base_model
    wanted = decoder(IDS).last_hidden_state
    for name in CACHE_ARGUMENTS:
        cache = own.new_cache()
        assert torch.equal(decoder(IDS, **{name: cache}).last_hidden_state, wanted)
        assert cache.get_seq_length() == IDS.shape[1]
    cache = own.new_cache()
    assert torch.equal(decoder(IDS, None, None, cache).last_hidden_state, wanted)
    assert cache.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, max_cache_len=64)])
def test_the_own_class_refuses_other_caches(own: torch.nn.Module, name: str, make: Callable) -> None:
    cache = make(config=own.config)
    with pytest.raises(OctavoError, match=rf"is a {type(cache).__name__}; pass model.new_cache"):
        own.base_model(IDS, **{name: cache})


def test_layers_are_updated_with_the_arguments_of_every_version() -> None:
    states = torch.randn(1, 2, 5, 16)
    cache = QuantizedCache(tiny_config(), "int8-token")
    for more in ({}, {"cache_kwargs": {}}, {"kwargs": {"position_ids": None}}):
        cache.update(states, states, 0, **more)
    assert cache.get_seq_length() == 15


def test_two_caches_are_one_too_many(own: torch.nn.Module) -> None:
    with pytest.raises(OctavoError, match="both given"):
        own.base_model(IDS, **{name: own.new_cache() for name in CACHE_ARGUMENTS})
    assert take_cache({"past_key_values": None, "cache": None}) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_a_prepared_model_without_a_cache_of_codes_is_refused(
    prepared: torch.nn.Module, arguments: dict[str, Any]
) -> None:
    with pytest.raises(OctavoError, match="not the codes of a QuantizedCache"):
        prepared.generate(IDS, max_new_tokens=3, do_sample=False, **arguments)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, max_cache_len=64)])
def test_a_prepared_model_refuses_other_caches(prepared: torch.nn.Module, make: Callable) -> None:
    with pytest.raises(OctavoError, match="not the codes of a QuantizedCache"), torch.no_grad():
        prepared(IDS, **{cache_argument(prepared): make(config=prepared.config)})


def test_a_scheme_of_floats_passes_where_codes_are_asked_for(prepared: torch.nn.Module) -> None:
    cache = QuantizedCache(prepared.config, "float")
    with torch.no_grad():
        found = prepared(IDS, **{cache_argument(prepared): cache}).logits
        torch.testing.assert_close(found, tiny_llama()(IDS).logits)


def test_prepare_needs_no_other_import() -> None:
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM; from octavo.common.stock_model import prepare;"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,"
        " num_attention_heads=2, num_key_value_heads=1)); print(prepare(model).config._attn_implementation)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "octavo", done.stderr


def test_packed_sequences_are_refused(own: torch.nn.Module) -> None:
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    with pytest.raises(OctavoError, match="packed sequences"):
        own(IDS, position_ids=positions)
    with torch.no_grad():
        whole = own(IDS, position_ids=torch.arange(24)[None]).logits
        assert torch.equal(whole, own(IDS).logits)


# Gradients.


def test_a_backward_pass_is_refused(own: torch.nn.Module, prepared: torch.nn.Module) -> None:
    for model in (own, prepared):
        cache = QuantizedCache(model.config, "int8-token")
        loss = model(IDS, labels=IDS, **{cache_argument(model): cache}).loss
        with pytest.raises(OctavoError, match="has no gradient"):
            loss.backward()


def test_so_is_one_that_would_reach_keys_and_values_alone() -> None:
    model = prepare(tiny_llama()).requires_grad_(False)
    model.base_model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    cache = QuantizedCache(model.config, "octavo-4")
    with pytest.raises(OctavoError, match="quantized attention has no gradient"):
        model(IDS, **{cache_argument(model): cache}).logits.sum().backward()


def test_so_is_one_through_a_quantized_linear(converted: Callable) -> None:
    model = LlamaForCausalLM.from_pretrained(converted("--is_dynamic", "True", "--scheme", "float"))
    layer = model.base_model.layers[0].mlp.up_proj
    x = torch.randn(2, layer.in_features, requires_grad=True)
    with pytest.raises(OctavoError, match="a W8A8_DYNAMIC linear has no gradient"):
        layer(x).sum().backward()


# What is not served says what to do instead.


def test_continuous_batching_is_refused(own: torch.nn.Module) -> None:
    for call in (own.generate_batch, own.init_continuous_batching):
        with pytest.raises(OctavoError, match="call generate with a batch"):
            call([[1, 2, 3]])


SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def tiny(kind: str) -> torch.nn.Module:
    """A random model of a class of transformers, about as large as the tiny Llama."""
    name = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    return randomized(getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**SIZES)))


@pytest.mark.filterwarnings("ignore:.*the bias of a:UserWarning")
@pytest.mark.parametrize("kind", ["Phi", "Phi3", "GPTNeoX", "GPT2", "Olmo", "Cohere", "Starcoder2", "SmolLM3"])
def test_decoders_of_many_kinds_are_served(kind: str) -> None:
    model = tiny(kind)
    with torch.no_grad():
        wanted = model(IDS).logits.log_softmax(-1)
        cache = QuantizedCache(prepare(model).config, "int8-token")
        found = model(IDS, **{cache_argument(model): cache}).logits.log_softmax(-1)
    assert cache.layers[0].key_store.codes().codes.dtype == torch.int8
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 0.05


@pytest.mark.parametrize("kind", ["Bloom", "Falcon"])
def test_decoders_with_attention_of_their_own_are_refused_by_name(kind: str) -> None:
    with pytest.raises(OctavoError, match=f"{kind}ForCausalLM is not served"):
        prepare(tiny(kind))


@pytest.mark.parametrize(("kind", "part"), [("GPTNeoX", "query_key_value"), ("Phi", "k_proj"), ("GPT2", "c_attn")])
def test_a_bias_that_stays_in_the_cache_is_named(kind: str, part: str) -> None:
    with pytest.warns(UserWarning, match=f"{part}: the bias of a"):
        prepare(tiny(kind))


# A transformers that nobody has tried yet.


@pytest.fixture
def unchecked() -> Any:
    """The check at load, as in a new process."""
    check_transformers.cache_clear()
    yield check_transformers
    check_transformers.cache_clear()


def test_this_transformers_is_understood(unchecked: Callable) -> None:
    unchecked(LlamaForCausalLM)


def test_one_that_takes_no_cache_by_a_known_name_is_refused(
    unchecked: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, "CACHE_ARGUMENTS", ("memory",))
    with pytest.raises(OctavoError, match=r"is not understood: .* no cache by a name that is known; install one that"):
        unchecked(LlamaForCausalLM)


def test_one_that_does_not_call_the_hook_is_refused(unchecked: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "_provide_cache", lambda decoder, args, kwargs: (args, kwargs))
    with pytest.raises(OctavoError, match="is not understood: quantized attention is given float keys"):
        unchecked(LlamaForCausalLM)


def test_one_that_hands_out_another_cache_is_refused(unchecked: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "_new_cache", lambda decoder: QuantizedCache(decoder.config, "float"))
    with pytest.raises(OctavoError, match="does not store its keys as codes"):
        unchecked(LlamaForCausalLM)


def test_the_tested_versions_are_those_of_the_requirements() -> None:
    from ... import support

    oldest, newest = compatibility.TESTED_TRANSFORMERS
    pinned = (support.REPOSITORY / "requirements.txt").read_text()
    ranges = (support.REPOSITORY / "pyproject.toml").read_text()
    assert re.search(rf"^transformers=={re.escape(newest)}$", pinned, re.MULTILINE), pinned
    assert f'"transformers>={oldest.removesuffix(".0")}' in ranges


@torch.no_grad()
def test_a_model_that_computes_with_keys_and_values_by_itself_is_refused() -> None:
    model = prepare(tiny("DiffLlama"))
    with pytest.raises(OctavoError, match="codes, which have no 'chunk'"):
        model(IDS, **{cache_argument(model): QuantizedCache(model.config, "octavo-4")})
    with pytest.raises(OctavoError, match="is not served"):
        model(IDS, **{cache_argument(model): QuantizedCache(model.config, "int8-token")})


# What a cache keeps.


def test_no_storage_holds_the_graph_of_a_pass() -> None:
    model = prepare(tiny_llama())
    scheme = Scheme.from_dict({**load_scheme("octavo-4").to_dict(), "smooth_key": True, "float_layers": [0]})
    cache = QuantizedCache(model.config, scheme)
    for part in IDS.split(6, dim=1):
        model(part, **{cache_argument(model): cache})
    parts = [part for layer in cache.layers for store in (layer.key_store, layer.value_store) for part in store.parts()]
    assert not any(part.requires_grad for part in (*parts, cache.layers[1]._key_mean))


def test_bits_and_bytes_are_counted_for_models_that_name_no_kv_heads() -> None:
    config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2)
    scheme = load_scheme("int8-token")
    assert kv_bytes_per_token(config, scheme, 4) == 2 * 2 * 4 * (16 + 4)
    assert kv_bits_per_element(config, scheme) == pytest.approx(8 * (16 + 4) / 16)


def test_a_list_of_sizes_that_no_cache_needs_is_no_matter() -> None:
    config = tiny_config()
    vars(config)["intermediate_size"] = [64, 128, 64]  # as in models whose layers differ
    assert len(QuantizedCache(config, "int8-token").layers) == 3


# Candidates that are verified.


def own_llama(scheme: str | dict[str, Any]) -> LlamaForCausalLM:
    config = tiny_config()
    config.octavo = {"scheme": scheme}
    model = LlamaForCausalLM(config)
    model.load_state_dict(tiny_llama().state_dict())
    return model.eval()


def test_more_candidates_than_a_cache_can_forget_by_itself() -> None:
    model = own_llama("octavo-4")
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompt = random_ids(1, 150).repeat(1, 3)
    wanted = model.generate(prompt, **arguments)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=120, **arguments), wanted)


@pytest.mark.parametrize("field", [{"prefill": "float"}, {"smooth_key": True}])
def test_schemes_whose_first_pass_decides_what_follows_verify_no_candidates(field: dict[str, Any]) -> None:
    model = own_llama({**load_scheme("int8-token").to_dict(), **field})
    with pytest.raises(OctavoError, match="would not give what plain decoding does"):
        model.generate(IDS, max_new_tokens=3, prompt_lookup_num_tokens=3)
