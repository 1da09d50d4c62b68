"""Passes in other dtypes: a whole model in 16 bits or in float64, autocast, and one cache that several of them use."""

import copy

import pytest
import torch

from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.segment_store import SegmentStore
from octavo.common.runtime.precision import kept_dtype
from octavo.common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from octavo.common.runtime.static_scales import scales_of
from octavo.common.stock_model import prepare
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ....support import random_ids, tiny_config, tiny_llama, with_cache
from ....tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "head_dim": 32}
FLOAT32, FLOAT16, BFLOAT16, FLOAT64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
CUTS = (190, 1, 39)  # more tokens than any window, one, and some
SCHEMES = [name for name in PRESETS if not load_scheme(name).is_static]
Way = tuple[tuple[torch.dtype, torch.dtype | None], ...]
WAYS: dict[str, Way] = {
    "float16": ((FLOAT16, None),) * 3,
    "bfloat16": ((BFLOAT16, None),) * 3,
    "float64": ((FLOAT64, None),) * 3,
    "autocast to bfloat16": ((FLOAT32, BFLOAT16),) * 3,
    "autocast to float16": ((FLOAT32, FLOAT16),) * 3,
    "autocast of a model in bfloat16": ((BFLOAT16, BFLOAT16),) * 3,
    "autocast goes on": ((FLOAT32, None), (FLOAT32, BFLOAT16), (FLOAT32, FLOAT16)),
    "autocast goes off": ((FLOAT32, BFLOAT16), (FLOAT32, None), (FLOAT32, None)),
    "the model is moved to bfloat16": ((FLOAT32, None), (BFLOAT16, None), (BFLOAT16, None)),
    "the model is moved to wider types": ((BFLOAT16, None), (FLOAT32, None), (FLOAT64, None)),
}
"""For each pass the dtype of the model, and that of autocast around it."""


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, torch.nn.Module]:
    """One model that reads codes, in each dtype."""
    model = prepare(tiny_llama(**SIZES))
    return {dtype: copy.deepcopy(model).to(dtype) for dtype in (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)}


@torch.no_grad()
def logits(models: dict[torch.dtype, torch.nn.Module], used: QuantizedCache, way: Way) -> torch.Tensor:
    """Of 230 tokens, in three passes over one cache."""
    parts = []
    for ids, (dtype, autocast) in zip(random_ids(2, sum(CUTS)).split(CUTS, dim=1), way, strict=True):
        with torch.autocast("cpu", autocast or BFLOAT16, enabled=autocast is not None):
            parts.append(models[dtype](ids, **with_cache(used)).logits.float())
    return torch.cat(parts, dim=1)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """KL in nats per token."""
    wanted, found = wanted.log_softmax(dim=-1), found.log_softmax(dim=-1)
    return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean())


@pytest.mark.parametrize("preset", SCHEMES)
def test_passes_in_other_dtypes_are_as_good_as_those_dtypes(
    preset: str, models: dict[torch.dtype, torch.nn.Module]
) -> None:
    config = models[FLOAT32].config
    wanted = logits(models, QuantizedCache(config, preset), ((FLOAT32, None),) * 3)
    storages = [{}, {"max_length": 240, "compileable": True}]
    for arguments in storages[: 1 + load_scheme(preset).is_compileable]:
        for name, way in WAYS.items():
            found = divergence(wanted, logits(models, QuantizedCache(config, preset, **arguments), way))
            assert found < TOLERANCES["kl of a tiny model in 16 bits"], name


@pytest.mark.parametrize("preset", ["float", "octavo-4", "octavo-8", "kivi-2"])
@pytest.mark.parametrize("way", [name for name, way in WAYS.items() if all(autocast is None for _, autocast in way)])
def test_tokens_that_stay_in_float_are_in_the_dtype_of_the_last_pass(
    way: str, preset: str, models: dict[torch.dtype, torch.nn.Module]
) -> None:
    used = QuantizedCache(models[FLOAT32].config, preset)
    logits(models, used, WAYS[way])
    last = WAYS[way][-1][0]
    for store in (store for layer in used.layers for store in (layer.key_store, layer.value_store)):
        if isinstance(store, SegmentStore):
            floats = [part for part in (store._front, store._tail) if part is not None]
            assert {part.dtype for part in floats} == {kept_dtype(last)}
        elif store.codec is None:
            assert store.codes().codes.dtype == last


@pytest.mark.parametrize("preset", ["octavo-4c", "octavo-4tc"])
@pytest.mark.parametrize("way", WAYS)
def test_centered_keys_in_other_dtypes(way: str, preset: str, models: dict[torch.dtype, torch.nn.Module]) -> None:
    scheme, samples = load_scheme(preset), [{"input_ids": random_ids(1, 250)}]
    scales = scales_of(scheme, calibrate_whole(tiny_llama(**SIZES), samples, [scheme]))
    config = models[FLOAT32].config
    wanted = logits(models, QuantizedCache(config, scheme, scales=scales), ((FLOAT32, None),) * 3)
    found = logits(models, QuantizedCache(config, scheme, scales=scales), WAYS[way])
    assert divergence(wanted, found) < TOLERANCES["kl of a tiny model in 16 bits"]


@pytest.mark.parametrize("way", WAYS)
def test_smoothed_keys_in_other_dtypes(way: str, models: dict[torch.dtype, torch.nn.Module]) -> None:
    scheme = Scheme.from_dict({**load_scheme("int8-token").to_dict(), "smooth_key": True})
    config = models[FLOAT32].config
    wanted = logits(models, QuantizedCache(config, scheme), ((FLOAT32, None),) * 3)
    found = logits(models, QuantizedCache(config, scheme), WAYS[way])
    assert divergence(wanted, found) < TOLERANCES["kl of a tiny model in 16 bits"]


@pytest.mark.parametrize("autocast", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("preset", ["int8-token", "octavo-4", "octavo-2", "kivi-4"])
def test_the_own_class_under_autocast(
    preset: str, autocast: torch.dtype, models: dict[torch.dtype, torch.nn.Module]
) -> None:
    config = tiny_config(**SIZES)
    config.octavo = {"scheme": preset}
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(models[FLOAT32].state_dict())
    ids = random_ids(1, 200)
    with torch.no_grad():
        wanted = model(ids).logits
        with torch.autocast("cpu", autocast):
            found = model(ids).logits.float()
            tokens = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert divergence(wanted, found) < TOLERANCES["kl of a tiny model in 16 bits"] and tokens.shape[1] == 205


@pytest.mark.parametrize("preset", SCHEMES)
def test_a_cache_that_an_inference_mode_made_serves_outside_of_it(
    preset: str, models: dict[torch.dtype, torch.nn.Module]
) -> None:
    model, ids = models[FLOAT32], random_ids(2, 230)
    used, wanted = QuantizedCache(model.config, preset), QuantizedCache(model.config, preset)
    with torch.inference_mode():
        model(ids[:, :190], **with_cache(used))
        used.reorder_cache(torch.tensor([1, 0]))
        used.crop(-5)
    with torch.no_grad():
        model(ids.flip(0)[:, :190], **with_cache(wanted))
        wanted.crop(-5)
        found, expected = (model(ids.flip(0)[:, 185:], **with_cache(each)).logits for each in (used, wanted))
    torch.testing.assert_close(found, expected, atol=TOLERANCES["logits"], rtol=0)
