"""The mean of K and bases of K and V stay out of what attention computes: exact in float, whatever they are."""

from typing import Any

import pytest
import torch

from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.errors import OctavoError
from octavo.common.runtime.cache import segment_store
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.key_center import KeyCenter
from octavo.common.runtime.rotary import rotated_by_slot
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.common.runtime.static_scales import LayerScales, scales_of
from octavo.common.stock_model import prepare

from ...support import random_ids, tiny_llama, with_cache
from ...tolerances import TOLERANCES
from .test_bias_fold import tiny_qwen2

pytestmark = pytest.mark.usefixtures("one_thread", "floats_stay")

TOKEN = Codec("int4", "token", dynamic=True)
ALL_FLOAT = 1000
"""Sinks, so that nothing becomes codes, and what is stored is exact but for its basis and mean."""


@pytest.fixture
def floats_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept in float is kept as it comes, where it otherwise is in 16 bits."""
    monkeypatch.setattr(segment_store, "kept_dtype", lambda dtype: dtype)


def scales(model: torch.nn.Module) -> list[LayerScales]:
    """Means far larger than K, and bases far from orthogonal."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    groups, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def basis() -> torch.Tensor:
        return torch.linalg.qr(random(groups, width, width))[0] * torch.linspace(0.2, 5, width)

    return [
        LayerScales(key_mean=10 * random(groups, 1, width), key_basis=basis(), value_basis=basis())
        for _ in range(config.num_hidden_layers)
    ]


def exact_cache(model: torch.nn.Module) -> QuantizedCache:
    """A cache of floats, K less its mean, K and V in bases."""
    scheme = Scheme("exact", TOKEN, TOKEN, sinks=ALL_FLOAT, center_key=True, key_basis="balanced", value_basis="oscar")
    return QuantizedCache(model.config, scheme, scales=scales(model))


MODELS = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "yarn": lambda: tiny_qwen2("yarn"),
    "dynamic": lambda: tiny_qwen2("dynamic"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(60,), (9, 1, 30, 20)])
@torch.inference_mode()
def test_logits_are_those_of_the_model(name: str, sizes: tuple[int, ...]) -> None:
    ids, model = random_ids(2, 60), MODELS[name]()
    expected = model(ids).logits
    prepare(model)
    cache = exact_cache(model)
    found = torch.cat([model(part, **with_cache(cache)).logits for part in ids.split(sizes, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, atol=20 * TOLERANCES["logits"], rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rows_of_different_lengths(name: str) -> None:
    plain, model = MODELS[name](), prepare(MODELS[name]())
    rows = [random_ids(1, length, seed=length) for length in (30, 17, 4)]
    ids = torch.cat([torch.nn.functional.pad(row, (30 - row.shape[1], 0), value=2) for row in rows])
    mask = torch.stack([(torch.arange(30) >= 30 - row.shape[1]).long() for row in rows])
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(ids, attention_mask=mask, **with_cache(exact_cache(model)), **arguments)
    for row, found in zip(rows, tokens, strict=True):
        assert torch.equal(plain.generate(row, **arguments)[0], found[30 - row.shape[1] :])


def test_scales_without_what_the_scheme_stores_by_are_refused() -> None:
    model = prepare(tiny_llama())
    layers = model.config.num_hidden_layers
    cache = QuantizedCache(model.config, load_scheme("octavo-2c").counted(layers), scales=[LayerScales()] * layers)
    with pytest.raises(OctavoError, match="hold nothing for 'center_key'; give statistics="):
        model(random_ids(1, 5), **with_cache(cache))


@torch.inference_mode()
def test_scales_with_more_than_the_scheme_stores_by_change_nothing() -> None:
    model, ids = prepare(tiny_llama()), random_ids(1, 30)
    found = [
        model(ids, **with_cache(QuantizedCache(model.config, "int8-token", scales=given))).logits
        for given in (None, scales(model))
    ]
    assert torch.equal(*found)


@torch.inference_mode()
def test_angles_that_are_not_those_of_the_config_are_refused() -> None:
    model = prepare(tiny_qwen2())
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    with pytest.raises(OctavoError, match="turns by other angles than its config says"):
        model(random_ids(1, 200), **with_cache(exact_cache(model)))


@torch.inference_mode()
def test_codes_without_floats_beside_them() -> None:
    model, ids, codec = prepare(tiny_llama()), random_ids(2, 60), Codec("int8", "token", dynamic=True)
    plain = Scheme("plain", codec, codec)
    based = Scheme("based", codec, codec, center_key=True, key_basis="balanced", value_basis="oscar")
    found = scales_of(based, calibrate_whole(tiny_llama(), [{"input_ids": random_ids(1, 200)}], [based]))
    caches = QuantizedCache(model.config, plain), QuantizedCache(model.config, based, scales=found)
    wanted = tiny_llama()(ids).logits
    errors = [model(ids, **with_cache(cache)).logits - wanted for cache in caches]
    assert errors[1].square().mean() < 4 * errors[0].square().mean(), "a wrong term would be as large as the logits"


@pytest.mark.parametrize("turned", [16, 8])
def test_scores_of_the_mean_are_those_that_are_left_out(turned: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 5, 16, generator=generator) for heads in (4, 2))
    mean, frequencies = torch.randn(2, 1, 16, generator=generator), 0.3 ** torch.arange(turned / 2)
    center = KeyCenter(mean, frequencies)
    left = key - center.left_out(key, 7)
    torch.testing.assert_close(left, rotated_by_slot(mean[None].expand_as(key), frequencies, 7))
    terms = center.terms(query, center.rows(12, query.device))
    found = terms.query @ terms.table[7:12].T
    expected = query @ left.repeat_interleave(2, dim=1).transpose(2, 3)
    beside = query[..., turned:] @ mean[:, :, turned:].repeat_interleave(2, dim=0).transpose(1, 2)
    torch.testing.assert_close(found, expected - beside, msg="what nothing turns is the same for all keys")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"key_basis": "best"}, "key_basis 'best' is none of balanced, oscar"),
        ({"value_basis": "balanced"}, "value_basis 'balanced' is none of oscar"),
        ({"key_basis": "oscar", "rotate_key": True}, "excludes 'rotate_key'"),
        ({"key_basis": "oscar", "key": Codec("int8", "channel")}, "'key_basis' is of dynamic scales after RoPE"),
        ({"value_basis": "oscar", "value": None}, "'value_basis' is of dynamic scales"),
        ({"center_key": True, "smooth_key": True}, "excludes 'smooth_key'"),
        ({"center_key": True, "key": None}, "'center_key' is of dynamic scales"),
        ({"center_key": True, "prefill": "float"}, "prefill 'float' excludes 'center_key'"),
    ],
)
def test_what_excludes_each_other(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(OctavoError, match=says):
        Scheme(**{"name": "mine", "key": TOKEN, "value": TOKEN, **fields})
