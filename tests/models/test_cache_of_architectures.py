"""Every architecture with a `QuantizedCache`: a stock model in two lines, and the contract of the cache, on codes.

In float64, where the number of tokens in a pass tips no code over (see `test_chunking.py`).
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from octavo import QuantizedCache, prepare
from octavo.common.convert.calibration.observe import calibrate
from octavo.common.convert.measure.fidelity import compare
from octavo.common.runtime.checkpoint.ascend import scale_tensors
from octavo.common.runtime.decoder import attention_modules
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.static_scales import scales_of

from ..support import random_ids, with_cache
from ..tolerances import TOLERANCES
from .test_architectures import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = ("int8-token", "octavo-4", "ascend-c8", "ascend-fa")
TOKENS = 100
"""More than octavo-4 needs before any of them are codes."""
Cached = tuple[torch.nn.Module, Callable[[], QuantizedCache]]


def two_lines(name: str) -> torch.nn.Module:
    """A stock model that reads codes."""
    return prepare(KINDS[name].build_double())


@cache
def cached(name: str, scheme: str) -> Cached:
    """A model, and what makes its empty caches: in two lines, or with static scales as a converted model has them."""
    if not load_scheme(scheme).is_static:
        model = two_lines(name)
        return model, lambda: QuantizedCache(model.config, scheme)
    stock = KINDS[name].build()
    scales = scales_of(load_scheme(scheme), calibrate(stock, [], [{"input_ids": random_ids(1, TOKENS, seed=7)}]))
    config = type(stock.config)(**{**stock.config.to_dict(), "octavo": {"scheme": scheme}})
    model = KINDS[name].architecture.model_class(config).double()
    stored = scale_tensors(attention_modules(model), load_scheme(scheme), scales)
    model.load_state_dict({**KINDS[name].build_listed().state_dict(), **stored})
    return model.eval(), model.new_cache


@torch.inference_mode()
def logits(model: torch.nn.Module, given: QuantizedCache, *parts: torch.Tensor) -> torch.Tensor:
    """Of tokens that come in parts."""
    return torch.cat([model(part, **with_cache(given)).logits for part in parts], dim=1)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCES["logits"], rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_cache_of_floats_changes_nothing(name: str, padded: bool) -> None:
    stock, ids = KINDS[name].build_double(), random_ids(2, 40)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :17] = 0
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = stock.generate(ids, attention_mask=mask, **arguments)
    with torch.inference_mode():
        expected = stock(ids, attention_mask=mask).logits
    model = two_lines(name)
    with torch.inference_mode():
        found = model(ids, attention_mask=mask, **with_cache(QuantizedCache(model.config, "float"))).logits
    assert_same(found[mask.bool()], expected[mask.bool()])
    given = with_cache(QuantizedCache(model.config, "float"))
    assert torch.equal(model.generate(ids, attention_mask=mask, **given, **arguments), tokens)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", KINDS)
def test_logits_do_not_depend_on_how_a_prompt_is_cut(name: str, scheme: str) -> None:
    (model, new_cache), ids = cached(name, scheme), random_ids(2, TOKENS)
    assert_same(logits(model, new_cache(), *ids.split((9, 1, 60, 1, 29), dim=1)), logits(model, new_cache(), ids))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", KINDS)
def test_what_is_cropped_never_was(name: str, scheme: str) -> None:
    (model, new_cache), ids, others = cached(name, scheme), random_ids(1, TOKENS), random_ids(1, 30, seed=5)
    used = new_cache()
    logits(model, used, ids)
    used.crop(-40)
    expected = logits(model, new_cache(), torch.cat((ids[:, :-40], others), dim=1))
    assert_same(logits(model, used, others), expected[:, -30:])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_reordered(name: str, scheme: str) -> None:
    (model, new_cache), ids, others = cached(name, scheme), random_ids(3, TOKENS), random_ids(3, 5, seed=5)
    used, order = new_cache(), torch.tensor([2, 0, 0])
    logits(model, used, ids)
    used.reorder_cache(order)
    expected = logits(model, new_cache(), torch.cat((ids[order], others), dim=1))
    assert_same(logits(model, used, others), expected[:, -5:])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", KINDS)
def test_generation_is_that_of_passes_over_all_tokens(name: str, scheme: str) -> None:
    (model, new_cache), ids = cached(name, scheme), random_ids(2, TOKENS - 6)
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **with_cache(new_cache()), **arguments)
    for _ in range(8):
        ids = torch.cat((ids, logits(model, new_cache(), ids)[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("scheme", ["int8-token", "ascend-c8", "ascend-fa"])  # octavo-4 counts padding as sinks
@pytest.mark.parametrize("name", KINDS)
def test_rows_padded_at_the_left_are_as_alone(name: str, scheme: str) -> None:
    (model, new_cache), ids = cached(name, scheme), random_ids(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with torch.inference_mode():
        found = model(ids, attention_mask=mask, position_ids=positions, **with_cache(new_cache())).logits
    assert_same(found[:1], logits(model, new_cache(), ids[:1]))
    assert_same(found[1:, 17:], logits(model, new_cache(), ids[1:, 17:]))


@pytest.mark.parametrize("scheme", ["int8-token", "octavo-4"])
@pytest.mark.parametrize("name", KINDS)
def test_fidelity(name: str, scheme: str) -> None:
    stock, (model, new_cache) = KINDS[name].build_double(), cached(name, scheme)
    samples = [random_ids(1, TOKENS, seed=seed) for seed in range(3)]
    found = compare(lambda ids: stock(ids).logits, lambda ids: logits(model, new_cache(), ids), samples)
    print(found)
    assert 0 < found.kl < TOLERANCES[f"kl of a tiny model, {scheme}"]
