"""What a user does with a converted directory and with a stock model, on whichever versions are installed.

`environments.py` runs this file with the oldest, the pinned and the newest versions. The linears of the directories are
in float, so that logits differ from those of the float model where the cache is quantized, and only there; everything
is computed in float64, so that rounding, which differs between versions, tips no code over.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from octavo.common.architecture import Architecture
from octavo.common.convert import api as conversion
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.stock_model import prepare
from octavo.models import llama3, mistral, phi3, qwen2, qwen3, smollm3

from ..metrics import rmse_in_std
from ..support import CACHE_NAME, convert_flags, random_ids, randomized, save_source, tiny_config, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = ("--w_bit", "16", "--a_bit", "16", "--use_kvcache_quant", "True")
LAYERS = ["full_attention", "full_attention", "sliding_attention"]
ARCHITECTURES: dict[str, tuple[Architecture, str, dict[str, Any]]] = {
    "llama3": (llama3.ARCHITECTURE, "Llama", {}),
    "mistral": (mistral.ARCHITECTURE, "Mistral", {"sliding_window": 13}),
    "phi3": (phi3.ARCHITECTURE, "Phi3", {"sliding_window": 13}),
    "qwen2": (qwen2.ARCHITECTURE, "Qwen2", {"use_sliding_window": True, "sliding_window": 11, "layer_types": LAYERS}),
    "qwen3": (qwen3.ARCHITECTURE, "Qwen3", {}),
    "smollm3": (smollm3.ARCHITECTURE, "SmolLM3", {"no_rope_layers": [1, 0, 1]}),
}
NEW_TOKENS = 16
EXACT = 1e-6
"""Logits in float64, however a sequence is cut."""
QUANTIZED = 1e-4
"""Less than 8-bit codes of k and v change the logits by."""


def build(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The tiny random float model of an architecture, of transformers' own class."""
    _, prefix, changes = ARCHITECTURES[name]
    torch.manual_seed(0)
    fields = {key: value for key, value in tiny_config().to_diff_dict().items() if key != "model_type"}
    config = getattr(transformers, f"{prefix}Config")(**{**fields, **changes})
    return randomized(getattr(transformers, f"{prefix}ForCausalLM")(config)).to(dtype)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`directory(architecture)`: a converted directory, made once."""
    root, made = tmp_path_factory.mktemp("contract"), {}

    def convert(name: str) -> Path:
        if name not in made:
            source = save_source(root / f"source_{name}", build(name, torch.float32))
            target = root / f"converted_{name}"
            assert conversion.main(ARCHITECTURES[name][0], convert_flags(source, target, *FLAGS)) == 0
            made[name] = target
        return made[name]

    return convert


@pytest.fixture(scope="module")
def load(directory: Callable[[str], Path]) -> Callable[[str], Any]:
    """`load(architecture)`: the model of a converted directory, with the code that lies there, loaded once."""
    loaded: dict[str, Any] = {}

    def load_remotely(name: str) -> Any:
        if name not in loaded:
            model = AutoModelForCausalLM.from_pretrained(directory(name), trust_remote_code=True, dtype=torch.float64)
            assert type(model).__module__.startswith("transformers_modules.")
            loaded[name] = model.eval()
        return loaded[name]

    return load_remotely


@pytest.fixture(scope="module")
def llama(load: Callable[[str], Any]) -> Any:
    """The converted Llama."""
    return load("llama3")


def logits(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Of a forward pass, `[B, S, V]`."""
    with torch.inference_mode():
        return model(ids, **arguments).logits


def generate(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Tokens `[B, S + NEW_TOKENS]`, the likeliest unless arguments say otherwise."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    return model.generate(ids, **{**settings, **arguments})


def likeliest(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What greedy generation gives, by whole passes that keep no cache."""
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plain_forward_reads_codes(name: str, load: Callable[[str], Any]) -> None:
    model, ids = load(name), random_ids(2, 40)
    found, floats = logits(model, ids), logits(build(name), ids)
    assert (found - floats).abs().max() > QUANTIZED
    assert rmse_in_std(found, floats) < 0.15
    assert torch.equal(logits(model, ids, use_cache=False), found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_that_of_the_quantized_logits(name: str, load: Callable[[str], Any]) -> None:
    model, ids = load(name), random_ids(2, 40)
    with torch.inference_mode():
        found = model(ids, labels=ids).loss
    scores = logits(model, ids)[:, :-1].float().flatten(0, 1)  # transformers computes the loss in float32
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_takes_the_tokens_that_whole_passes_take(name: str, load: Callable[[str], Any]) -> None:
    ids = random_ids(2, 20)
    assert torch.equal(generate(load(name), ids), likeliest(load(name), ids))


def test_a_cache_is_handed_out_and_taken_back(llama: Any) -> None:
    ids = random_ids(1, 40)
    with torch.inference_mode():
        output = llama(ids[:, :30])
        cache = getattr(output, CACHE_NAME)
        rest = logits(llama, ids[:, 30:], **with_cache(cache))
        without = llama(ids, use_cache=False)
    assert cache.scheme.name == "ascend-c8" and cache.get_seq_length() == 40
    torch.testing.assert_close(rest, logits(llama, ids)[:, 30:], atol=EXACT, rtol=0)
    assert getattr(without, CACHE_NAME) is None
    assert len(llama(ids, return_dict=False)) == 2 and len(llama(ids, return_dict=False, use_cache=False)) == 1


def test_another_cache_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="DynamicCache"):
        llama(random_ids(1, 5), **with_cache(DynamicCache(config=llama.config)))
    with pytest.raises(ValueError, match="DynamicCache"):
        generate(llama, random_ids(1, 5), **with_cache(DynamicCache(config=llama.config)))


def test_sampling(llama: Any) -> None:
    ids, found = random_ids(2, 20), []
    for arguments in ({}, with_cache(llama.new_cache()), {"use_cache": False}):
        torch.manual_seed(0)
        found.append(generate(llama, ids, do_sample=True, **arguments))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], generate(llama, ids))


def test_beams(llama: Any) -> None:
    ids = random_ids(2, 20)
    assert torch.equal(generate(llama, ids, num_beams=3), generate(llama, ids, num_beams=3, use_cache=False))


def test_prompt_lookup(llama: Any) -> None:
    ids = random_ids(1, 12).repeat(1, 3)
    assert torch.equal(generate(llama, ids, prompt_lookup_num_tokens=3), generate(llama, ids))


@pytest.mark.parametrize("assistant", ["of transformers", "the model itself"])
def test_an_assistant(assistant: str, llama: Any) -> None:
    ids = random_ids(1, 20)
    draft = llama if assistant == "the model itself" else build("llama3")
    assert torch.equal(generate(llama, ids, assistant_model=draft), generate(llama, ids))


def test_an_assistant_of_a_stock_model(llama: Any) -> None:
    ids, stock = random_ids(1, 20), build("llama3")
    assert torch.equal(generate(stock, ids, assistant_model=llama), generate(stock, ids))


def test_a_static_cache(llama: Any) -> None:
    ids = random_ids(2, 20)
    assert torch.equal(generate(llama, ids, cache_implementation="static"), generate(llama, ids))


def test_a_batch_padded_at_the_left(llama: Any) -> None:
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    ids[1, :7], mask[1, :7] = 2, 0
    found = generate(llama, ids, attention_mask=mask)
    assert torch.equal(found[1:, 7:], generate(llama, ids[1:, 7:]))


def test_a_chat_goes_on_with_its_cache(llama: Any) -> None:
    cache = llama.new_cache()
    first = generate(llama, random_ids(1, 20), **with_cache(cache))
    second = torch.cat([first, random_ids(1, 9, seed=2)], dim=1)
    found = generate(llama, second, return_dict_in_generate=True, **with_cache(cache))
    assert getattr(found, CACHE_NAME) is cache
    assert cache.get_seq_length() == found.sequences.shape[1] - 1
    assert torch.equal(found.sequences, generate(llama, second))


@pytest.mark.parametrize("scheme", ["int8-token", "octavo-4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_lines_quantize_the_cache_of_a_stock_model(name: str, scheme: str) -> None:
    ids, model = random_ids(1, 150), build(name)
    floats = logits(model, ids)
    prepare(model)
    found = logits(model, ids, **with_cache(QuantizedCache(model.config, scheme)))
    assert (found - floats).abs().max() > QUANTIZED and rmse_in_std(found, floats) < 0.5
    cache = QuantizedCache(model.config, scheme)
    tokens = generate(model, ids, **with_cache(cache))
    assert cache.get_seq_length() == tokens.shape[1] - 1
    whole = logits(model, tokens, **with_cache(QuantizedCache(model.config, scheme)))
    assert torch.equal(whole[:, ids.shape[1] - 1 : -1].argmax(-1), tokens[:, ids.shape[1] :])
