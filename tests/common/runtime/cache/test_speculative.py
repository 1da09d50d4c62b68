"""Speculative decoding, which crops what it rejects, gives token for token what plain greedy decoding gives.

In float64, where passes of one token and of several agree but for 1e-16: in float32 the linears of transformers round
differently for different numbers of tokens, and a difference of 1e-7 may tip a code over.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import PRESETS, load_scheme
from octavo.common.runtime.static_scales import scales_of
from octavo.common.stock_model import prepare

from ....support import random_ids, tiny_llama, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
         "vocab_size": 64, "intermediate_size": 64, "tie_word_embeddings": True}  # fmt: skip
NEW_TOKENS = 200
PROMPT = random_ids(1, 12, vocabulary=64).repeat(1, 4)

Make = Callable[..., QuantizedCache]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A model that reads codes, in float64."""
    return prepare(tiny_llama(**SIZES)).double()


@pytest.fixture(scope="module")
def assistant() -> torch.nn.Module:
    """A model near that one, which is right about many tokens and wrong about others."""
    near = tiny_llama(**SIZES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    near.generation_config.num_assistant_tokens = 5
    near.generation_config.assistant_confidence_threshold = 0
    return near


@pytest.fixture(scope="module")
def cache(model: torch.nn.Module) -> Make:
    """`cache(preset, ...)`: an empty cache."""
    float_model, samples = tiny_llama(**SIZES), [{"input_ids": random_ids(1, 250, vocabulary=64)}]
    statistics = calibrate_whole(float_model, samples, map(load_scheme, PRESETS))

    def make(preset: str, **arguments: Any) -> QuantizedCache:
        scheme = load_scheme(preset)
        scales = scales_of(scheme, statistics) if scheme.is_static else None
        return QuantizedCache(model.config, scheme, scales=scales, **arguments)

    return make


def generate(model: torch.nn.Module, ids: torch.Tensor, used: QuantizedCache, **arguments: Any) -> torch.Tensor:
    """Greedily, without stopping early."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **arguments}
    return model.generate(ids, **with_cache(used), **settings)


@pytest.fixture(scope="module")
def plain(model: torch.nn.Module, cache: Make) -> Callable[[str], torch.Tensor]:
    """`plain(preset)`: what plain decoding makes of the prompt."""
    return lru_cache(lambda preset: generate(model, PROMPT, cache(preset)))


def assert_equals_plain(model: torch.nn.Module, used: QuantizedCache, plain: torch.Tensor, **way: Any) -> None:
    """Speculative decoding gives the tokens of plain decoding, though much of what it tries is rejected."""
    amounts, crop = [], used.crop
    used.crop = lambda amount: (amounts.append(-int(amount)), crop(amount))
    assert torch.equal(generate(model, PROMPT, used, **way), plain)
    assert sum(amounts) > 20 and used.get_seq_length() == plain.shape[1] - 1


@pytest.mark.parametrize("preset", PRESETS)
def test_prompt_lookup_equals_plain_decoding(preset: str, model: torch.nn.Module, cache: Make, plain: Any) -> None:
    assert_equals_plain(model, cache(preset), plain(preset), prompt_lookup_num_tokens=7)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_assistant_changes_nothing(
    preset: str, model: torch.nn.Module, assistant: torch.nn.Module, cache: Make, plain: Any
) -> None:
    assert_equals_plain(model, cache(preset), plain(preset), assistant_model=assistant)


def test_more_tokens_at_a_time_than_there_is_room_for_are_refused_in_one_line(
    model: torch.nn.Module, cache: Make, plain: Any
) -> None:
    with pytest.raises(OctavoError, match=r"crop_room=3 keeps floats for .* make the cache with crop_room=") as error:
        generate(model, PROMPT, cache("kivi-4", crop_room=3), prompt_lookup_num_tokens=40)
    assert "\n" not in str(error.value)
    assert_equals_plain(model, cache("kivi-4", crop_room=40), plain("kivi-4"), prompt_lookup_num_tokens=40)
