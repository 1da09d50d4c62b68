"""KL of one coded layer: what whole passes of the same scheme give, without computing the layers before it."""

import pytest
import torch

from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.stock_model import prepare
from octavo.searching.probe import Probe, kl_rows, only_layer
from octavo.searching.sides import Side, sides_of

from ...support import random_ids, tiny_llama, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")

SIDES = sides_of([load_scheme("octavo-2")])


def test_kl_is_that_of_the_definition_and_keeps_its_digits_where_logits_hardly_differ() -> None:
    torch.manual_seed(0)
    before = torch.randn(100, 50) * 4
    for size in (1.0, 1e-2, 1e-3):
        after = before + size * torch.randn(100, 50)
        wanted, found = (logits.double().log_softmax(-1) for logits in (before, after))
        exact = (wanted.exp() * (wanted - found)).sum(-1)
        assert float(kl_rows(before, after).double().mean()) == pytest.approx(float(exact.mean()), rel=1e-3)
    assert kl_rows(before, before + 7.0).abs().max() < 1e-8


@pytest.mark.parametrize("side", SIDES, ids=["key", "value"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_alone_costs_what_whole_passes_say(side: Side, layer: int) -> None:
    model, ids = prepare(tiny_llama()), random_ids(2, 150)
    probe = Probe(model, list(ids), scored=40)
    caches = [QuantizedCache(model.config, scheme) for scheme in ("float", only_layer(layer, side.scheme))]
    rows = []
    with torch.inference_mode():
        for window in ids:
            for cache in caches:
                cache.reset()
            expected, found = (model(window[None], **with_cache(cache)).logits[0, -40:].double() for cache in caches)
            shares = expected.log_softmax(-1)
            rows.append((shares.exp() * (shares - found.log_softmax(-1))).sum(-1))
    wanted = float(torch.cat(rows).mean())
    assert wanted > 1e-5
    assert probe.kl_of_layer(layer, side.scheme) == pytest.approx(wanted, rel=1e-3)
    assert probe.kl(only_layer(layer, side.scheme)) == pytest.approx(wanted, rel=1e-3)


def test_layers_compute_again_once_a_measurement_is_done() -> None:
    model, ids = prepare(tiny_llama()), random_ids(1, 90)
    with torch.inference_mode():
        before = model(ids, **with_cache(QuantizedCache(model.config, "float"))).logits
        Probe(model, [ids[0]], scored=20).kl_of_layer(2, SIDES[0].scheme)
        after = model(ids, **with_cache(QuantizedCache(model.config, "float"))).logits
        other = model(ids.flip(1), **with_cache(QuantizedCache(model.config, "float"))).logits
    assert torch.equal(before, after) and not torch.equal(before, other)


def test_a_model_of_unknown_layers_is_refused() -> None:
    with pytest.raises(OctavoError, match="model_type 'llama': octavo search does not know which modules"):
        Probe(tiny_llama(), [random_ids(1, 20)[0]], scored=4)
