"""Codebooks and ranges from a calibration with gradients, and the presets that need them."""

from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from octavo.common.convert.calibration import codebooks
from octavo.common.convert.calibration.codebooks import (
    MOST_VALUES,
    OUTSIDE,
    SKIPPED_TOKENS,
    fit_codebooks,
    weighted_levels,
)
from octavo.common.convert.calibration.observe import calibrate
from octavo.common.convert.measure.fidelity import compare
from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.dynamic_scales import gaussian_levels
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.rotary import rope_constants, rotated_by_slot
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.common.runtime.static_scales import Statistics, load_statistics, scales_of
from octavo.common.stock_model import prepare

from ....support import random_ids, randomized, tiny_config, tiny_llama, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")

PRESETS = ("kvquant-4", "kvquant-3", "kvquant-2")
LENGTHS = (300, 240)
SAMPLES = [{"input_ids": random_ids(1, length, seed=length)} for length in LENGTHS]


def tiny_qwen2() -> torch.nn.Module:
    """The tiny Llama's shapes, with biases in q, k and v."""
    torch.manual_seed(0)
    return randomized(Qwen2ForCausalLM(Qwen2Config(**tiny_config().to_dict() | {"model_type": "qwen2"})))


MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2}


@pytest.fixture(scope="module", params=MODELS)
def fitted(request: pytest.FixtureRequest) -> tuple[str, Statistics]:
    """Name of a model and all of its statistics."""
    model = MODELS[request.param]()
    return request.param, fit_codebooks(model, SAMPLES, calibrate(model, [], SAMPLES))


def loss_of(values: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> float:
    """The sum that k-means minimizes."""
    nearest = (values[:, None].double() - levels.double()).abs().amin(dim=1)
    return float((weights.double() * nearest.square()).sum())


def best_loss(values: torch.Tensor, weights: torch.Tensor, count: int) -> float:
    """The smallest loss of all ways to cut the sorted values into clusters."""
    values, order = values.double().sort()
    weights, losses = weights.double()[order], []
    for cuts in combinations(range(1, len(values)), count - 1):
        parts = [slice(*pair) for pair in pairwise((0, *cuts, len(values)))]
        levels = torch.stack([(values[part] * weights[part]).sum() / weights[part].sum() for part in parts])
        losses.append(loss_of(values, weights, levels))
    return min(losses)


@pytest.mark.parametrize("seed", range(8))
def test_no_clusters_are_better_where_there_are_any(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([-0.9, -0.2, 0.3, 0.8]).repeat_interleave(4)
    values = (centres + 0.15 * torch.rand(16, generator=generator))[torch.randperm(16, generator=generator)]
    weights = torch.rand(16, generator=generator) + 0.1
    found = loss_of(values, weights, weighted_levels(values, weights, 4))
    assert found == pytest.approx(best_loss(values, weights, 4), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_a_normal_distribution_are_those_of_lloyd_and_max(bits: int) -> None:
    ranks = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    values = torch.special.ndtri(ranks)
    levels = weighted_levels(values, torch.ones_like(values), 2**bits)
    torch.testing.assert_close(levels, gaussian_levels(bits, levels.device), atol=0.02, rtol=0)


def test_a_weight_counts_as_so_many_values_and_draws_levels_near() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(200, generator=generator) * 2 - 1
    weights = torch.randint(0, 5, (200,), generator=generator)
    repeated = values.repeat_interleave(weights)
    levels = weighted_levels(values, weights, 8)
    torch.testing.assert_close(levels, weighted_levels(repeated, torch.ones_like(repeated), 8))
    plain = weighted_levels(values, torch.ones_like(values), 8)
    drawn = weighted_levels(values, 1 + 99 * (values > 0.5), 8)
    assert (plain > 0.5).sum() == 2 and (drawn > 0.5).sum() >= 4
    assert torch.equal(weighted_levels(values, torch.zeros_like(values), 8), plain)


def test_fewer_values_than_levels() -> None:
    for values in (torch.zeros(5), torch.tensor([0.5]), torch.tensor([-1.0, 1.0, 1.0])):
        levels = weighted_levels(values, torch.ones_like(values), 4)
        assert levels.isfinite().all() and (levels.diff() >= 0).all()
        assert loss_of(values, torch.ones_like(values), levels) < 1e-4


def test_everything_is_found_and_can_be_saved(fitted: tuple[str, Statistics], tmp_path: Path) -> None:
    statistics = fitted[1]
    statistics.save(tmp_path / "statistics.safetensors")
    back = load_statistics(tmp_path / "statistics.safetensors")
    for layer in range(3):
        for name in ("low", "high"):
            assert back.tensors[f"layers.{layer}.k.before.{name}"].shape == (2, 16)
        for name in ("k", "v"):
            for bits in (2, 3, 4):
                levels = back.tensors[f"layers.{layer}.{name}.levels.{bits}"]
                assert levels.dtype == torch.float32 and levels.shape == (2**bits,)
                assert (levels.diff() > 0).all() and levels.abs().amax() < 1.2
    assert back.tensors["layers.0.q.radius"].shape == (4, 8)


@pytest.mark.parametrize("name", MODELS)
def test_one_percent_of_k_lies_outside_its_range(name: str) -> None:
    statistics = fit_codebooks(MODELS[name](), SAMPLES, Statistics({}, {}), bits=())
    model, seen = prepare(MODELS[name]()), []  # its k_proj leaves out what is folded
    linear = model.model.layers[1].self_attn.k_proj
    linear.register_forward_hook(lambda _, args, output: seen.append(output[0, SKIPPED_TOKENS:]))
    with torch.inference_mode():
        for sample in SAMPLES:
            model(**sample, **with_cache(QuantizedCache(model.config, "float")))
    keys = torch.cat(seen)
    low, high = (statistics.tensors[f"layers.1.k.before.{end}"].flatten() for end in ("low", "high"))
    expected = int(len(keys) * OUTSIDE / 2)
    assert expected >= 2
    assert ((keys > high + 1e-3).sum(0) <= expected).all() and ((keys > high - 1e-3).sum(0) > expected).all()
    assert ((keys < low - 1e-3).sum(0) <= expected).all() and ((keys < low + 1e-3).sum(0) > expected).all()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_projections(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = MODELS[name](), random_ids(1, 40)
    linears, outputs = model.model.layers[1].self_attn, {}
    for side in "kv":
        getattr(linears, f"{side}_proj").register_forward_hook(
            lambda _, args, output, side=side: outputs.update({side: output}) or output.retain_grad()
        )
    logits = model(ids).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    for part in outputs.values():
        part.retained = part.grad[0, SKIPPED_TOKENS:].unflatten(-1, (2, 16))
    expected = {side: part.retained for side, part in outputs.items()}
    model = MODELS[name]()
    found = {}
    monkeypatch.setattr(
        codebooks._StateSampler,
        "tensors",
        lambda self, bits: found.setdefault(len(found), (self._sampled("k"), self._sampled("v"))) and {},
    )
    fit_codebooks(model, [{"input_ids": ids}], Statistics({}, {}))
    for side, (_, gradients, heads) in zip("kv", found[1], strict=True):
        for head in range(2):  # rows come in any order
            rows = gradients[0, 0, heads == head]
            own = expected[side][:, head]
            assert rows.shape == own.shape
            assert torch.cdist(own, rows).amin(dim=1).amax() < 1e-3 * own.norm(dim=1).amax()


def test_the_model_is_left_as_it_was() -> None:
    model, statistics = tiny_llama(), Statistics({"other": torch.ones(1)}, {"num_hidden_layers": "3"})
    model.model.norm.weight.requires_grad_(False)
    model.train()
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.inference_mode():
        before = model(**SAMPLES[0]).logits
        found = fit_codebooks(model, SAMPLES, statistics, bits=(2,))
        assert torch.equal(model(**SAMPLES[0]).logits, before)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert trained == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(hasattr(module, "state_sampler") for module in model.modules())
    assert len(statistics.tensors) == 1 and len(found.tensors) == 1 + 3 * 4
    with pytest.raises(IndexError):
        fit_codebooks(model, [{"input_ids": torch.full((1, 9), 100_000)}], statistics)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "state_sampler") for module in model.modules())


def test_texts_that_are_too_short_are_left_out() -> None:
    model, statistics = tiny_llama(), Statistics({}, {"num_hidden_layers": "3"})
    short = [{"input_ids": random_ids(1, length)} for length in (1, 2)]
    with pytest.raises(OctavoError, match="at least three tokens"):
        fit_codebooks(model, short, statistics)
    alone, both = (fit_codebooks(model, texts, statistics, bits=(3,)) for texts in (SAMPLES, [*short, *SAMPLES]))
    assert all(torch.equal(both.tensors[name], tensor) for name, tensor in alone.tensors.items())


def test_many_tokens_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebooks, "MOST_VALUES", 2048)
    kept = []
    whole = codebooks._StateSampler.tensors
    monkeypatch.setattr(
        codebooks._StateSampler,
        "tensors",
        lambda self, bits: kept.append(self._sampled("k")[0].numel()) or whole(self, bits),
    )
    fit_codebooks(tiny_llama(), SAMPLES, Statistics({}, {}), bits=(2,))
    assert MOST_VALUES > 2048 and all(abs(count - 2048) <= 32 for count in kept)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_generate(fitted: tuple[str, Statistics], preset: str) -> None:
    """Prompt and single tokens give the logits of a pass over all of them."""
    name, statistics = fitted
    scheme = load_scheme(preset)
    model, scales = prepare(MODELS[name]()), scales_of(scheme, statistics)
    ids = random_ids(1, 50, seed=7)
    cache = QuantizedCache(model.config, scheme, scales=scales)
    tokens = model.generate(ids, **with_cache(cache), max_new_tokens=8, do_sample=False, eos_token_id=None,
                            output_logits=True, return_dict_in_generate=True)  # fmt: skip
    with torch.inference_mode():
        whole = model(tokens.sequences, **with_cache(QuantizedCache(model.config, scheme, scales=scales))).logits
    torch.testing.assert_close(torch.stack(tokens.logits, dim=1), whole[:, 49:-1], atol=2e-3, rtol=2e-3)


def test_more_bits_are_nearer_to_the_float_model(fitted: tuple[str, Statistics]) -> None:
    name, statistics = fitted
    stock, model = MODELS[name](), prepare(MODELS[name]())
    found = []
    for preset in PRESETS:
        scheme = load_scheme(preset)
        scales = scales_of(scheme, statistics)
        result = compare(
            lambda ids: stock(ids).logits,
            lambda ids, scheme=scheme, scales=scales: (
                model(ids, **with_cache(QuantizedCache(model.config, scheme, scales=scales))).logits
            ),
            [random_ids(1, 200, seed=9)],
        )
        found.append(result.kl)
    assert found[0] < found[1] < found[2]
    assert found[0] < 0.08  # 0.054 and less measured


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_token_and_outliers_are_kept(fitted: tuple[str, Statistics], preset: str) -> None:
    scheme = load_scheme(preset)
    cache = QuantizedCache(MODELS[fitted[0]]().config, scheme, scales=scales_of(scheme, fitted[1]))
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn((1, 2, 30, 16), generator=generator) for _ in range(2))
    values[:, :, torch.arange(30), torch.arange(30) % 16] = 50.0
    read, _ = cache.update(keys, values, 0)
    assert torch.equal(read.front, keys[:, :, :1].half())
    decoded = cache.layers[0].value_store.body.decoded(0, 29)
    expected = values[:, :, 1:].half().float()
    assert torch.equal(decoded[expected == 50], expected[expected == 50])
    rest = expected != 50
    assert (decoded - expected)[rest].abs().amax() < 2 * expected[rest].abs().amax()


@pytest.mark.parametrize("sinks", [0, 1, 40])
def test_k_before_rope_is_that_of_its_position(sinks: int) -> None:
    """Tokens behind the sinks are rotated back from where they stand, into the range that was calibrated."""
    config = tiny_config()
    before = torch.randn((1, 2, 90, 16), generator=torch.Generator().manual_seed(3)).clamp(-2, 2)
    before[..., 3] += 30
    low, high = before.amin(dim=2)[0], before.amax(dim=2)[0]
    tensors = {"k.before.low": low, "k.before.high": high, "k.radius": high[:, :8], "q.radius": high[:, :8],
               "v.low": low, "v.high": high, "k.levels.4": torch.linspace(-1, 1, 16),
               "v.levels.4": torch.linspace(-1, 1, 16)}  # fmt: skip
    named = {f"layers.{layer}.{name}": tensor for layer in range(3) for name, tensor in tensors.items()}
    scheme = load_scheme({**load_scheme("kvquant-4").to_dict(), "sinks": sinks})
    scales = scales_of(scheme, Statistics(named, {"num_hidden_layers": "3"}))
    cache = QuantizedCache(config, scheme, scales=scales)
    frequencies, _ = rope_constants(config, 16)
    keys = rotated_by_slot(before, frequencies, 0)
    for part in (slice(0, 50), slice(50, 90)):
        cache.update(keys[:, :, part], keys[:, :, part], 0)
    store = cache.layers[0].key_store
    found = (store.body if sinks else store).decoded(0, 90 - sinks)
    assert (found - keys[:, :, sinks:]).abs().amax() < 2 * (4 / 15 / 2)


def test_codebooks_are_of_affine_codes_of_k_before_rope() -> None:
    with pytest.raises(OctavoError, match="'symmetric'"):
        Codec("int4", "token", dynamic=True, levels="calibrated")
    plain = load_scheme("kvquant-4").to_dict()
    for key in ({**plain["key"], "before_rope": False}, plain["value"]):
        with pytest.raises(OctavoError, match="static scales per channel before RoPE"):
            load_scheme({**plain, "key": key})


def test_codebooks_of_k_are_without_its_bias(fitted: tuple[str, Statistics]) -> None:
    scheme = load_scheme({**load_scheme("kvquant-4").to_dict(), "fold_bias": False})
    if fitted[0] == "llama":
        assert len(scales_of(scheme, fitted[1])) == 3
        return
    with pytest.raises(OctavoError, match="leave 'fold_bias' at true"):
        scales_of(scheme, fitted[1])
