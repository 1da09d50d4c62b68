"""A cache goes through all layers in one call only if it is of the decoder, and nothing keeps what it gives back."""

import gc
import weakref
from typing import Any

import pytest
import torch

from octavo.common.errors import OctavoError
from octavo.common.runtime import decoder_step
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.fused_decoder import IS_ZOO
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.ops.decoder.cpu import DECODER_KERNEL

from ...support import with_cache
from .fused_models import model_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(DECODER_KERNEL.supports() is not None, reason="there is no C compiler"),
]


def run(model: torch.nn.Module, cache: QuantizedCache, tokens: int = 1, batch: int = 1) -> torch.Tensor:
    """Last states of a pass, whichever way it goes."""
    with torch.no_grad():
        ids = torch.arange(batch * tokens).view(batch, tokens) % 64
        return model.base_model(input_ids=ids, use_cache=True, **with_cache(cache)).last_hidden_state


@pytest.mark.parametrize("is_zoo", [True, False])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 2}, "the cache is of 2 layers and the model has more"),
        ({"num_key_value_heads": 1}, "sequences of 1 heads"),
        ({"head_dim": 8}, "in 8 columns"),
        ({"sliding_window": 4}, "sliding_window"),
    ],
)
def test_a_cache_of_another_model(is_zoo: bool, changes: dict[str, Any], match: str) -> None:
    """The lines are those of the modules."""
    model, other = model_of("mistral, sliding"), model_of("mistral, sliding", **changes)
    cache = QuantizedCache(other.config, crop_room=0)
    for _ in range(65):  # its window has slid by now
        run(other, cache)
    setattr(model.base_model, IS_ZOO, is_zoo)
    with pytest.raises(OctavoError, match=match):
        run(model, cache)


def test_a_cache_of_another_model_that_has_more_layers() -> None:
    """As in transformers, the first layers serve."""
    model, other = model_of("llama3"), model_of("llama3", num_hidden_layers=5)
    ways = []
    for is_zoo in (True, False):
        setattr(model.base_model, IS_ZOO, is_zoo)
        ways.append(run(model, QuantizedCache(other.config, "float")))
    torch.testing.assert_close(*ways, rtol=1e-3, atol=1e-3)


def test_a_scheme_that_counts_biases_in() -> None:
    model = model_of("qwen2")
    scheme = load_scheme({**load_scheme("int8-token").to_dict(), "fold_bias": False})
    with pytest.raises(OctavoError, match="fold_bias=False"):
        run(model, QuantizedCache(model.config, scheme))


@pytest.mark.parametrize("is_zoo", [True, False])
def test_a_sliding_cache_of_a_fixed_length_ends(is_zoo: bool) -> None:
    model = model_of("mistral, sliding")
    setattr(model.base_model, IS_ZOO, is_zoo)
    cache = QuantizedCache(model.config, max_length=90, crop_room=0)
    for _ in range(90):
        run(model, cache)
    with pytest.raises(OctavoError, match="max_length=90"):
        run(model, cache)


def storage_of(cache: QuantizedCache) -> list[weakref.ref]:
    """All storage of codes, as long as it lives."""
    return [weakref.ref(layer.key_store.storage) for layer in cache.layers]


def test_storage_that_grows_or_is_reset_is_given_back() -> None:
    model = model_of("llama3")
    cache = QuantizedCache(model.config)
    run(model, cache)
    before, alive = storage_of(cache), []
    allocate = type(cache.layers[-1].value_store).allocate

    def watched(like: torch.Tensor, tokens: int) -> None:
        alive.append(sum(ref() is not None for ref in before))
        allocate(cache.layers[-1].value_store, like, tokens)

    cache.layers[-1].value_store.allocate = watched
    for _ in range(64):
        run(model, cache)
    assert alive and not any(alive), "the last to grow finds that the others have been given back"
    now = storage_of(cache)
    cache.reset()
    assert not any(ref() is not None for ref in now)


def test_a_cache_does_not_keep_its_model() -> None:
    model = model_of("llama3")
    cache = QuantizedCache(model.config)
    run(model, cache)
    weight = weakref.ref(model.base_model.layers[0].mlp)
    del model
    gc.collect()
    assert weight() is None


def test_a_cache_is_shared_by_models_in_turns() -> None:
    one, other = model_of("llama3"), model_of("llama3", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    caches = [QuantizedCache(one.config) for _ in range(2)]
    for is_zoo, cache in zip((True, False), caches, strict=True):
        for model in (one, other):
            setattr(model.base_model, IS_ZOO, is_zoo)
        found = [run(model, cache) for model in (one, other, one, other)]
        if is_zoo:
            wanted = found
    for mine, theirs in zip(wanted, found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_room_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_step, "FLOAT_TOKENS", 70)
    model, moved = model_of("llama3"), []
    cache = QuantizedCache(model.config)
    for layer in cache.layers:
        layer.key_store._move = lambda *args: moved.append(args)
    run(model, cache, 70)
    assert cache.get_seq_length() == 70 and not moved
