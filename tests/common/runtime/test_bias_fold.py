"""Biases of k and v that stay out of the cache: exact in float, whatever the batch, the angles and the chunks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from octavo.common.architecture import stated_or_known
from octavo.common.convert.calibration.observe import calibrate
from octavo.common.convert.output.shards import header_of
from octavo.common.convert.weights.quantize import quantize_linear
from octavo.common.errors import OctavoError
from octavo.common.runtime.bias_fold import FOLD, fold_biases
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.checkpoint.ascend import linear_layout
from octavo.common.runtime.checkpoint.buffers import attach_buffers
from octavo.common.runtime.foldable_linear import FoldableLinear
from octavo.common.runtime.linear_kinds import QUANTIZED_LINEARS
from octavo.common.runtime.quantized_linear import QuantizedLinear
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.common.runtime.schemes.linear_scheme import LinearScheme
from octavo.common.runtime.static_scales import scales_of
from octavo.common.stock_model import prepare
from octavo.models.qwen2.modeling_qwen2_fa3 import Qwen2ForCausalLM as QuantizedQwen2

from ...metrics import rmse_in_std
from ...support import random_ids, randomized, tiny_config, with_cache
from ...tolerances import TOLERANCES
from ..convert.weights.test_quantize import every_scheme, name_of, seen

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 2
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


def settings(rope: str = "default") -> dict[str, Any]:
    """Of a tiny Qwen2: 4 query heads on 2 KV heads of width 16."""
    fields = tiny_config(num_hidden_layers=LAYERS).to_diff_dict()
    known = {name: value for name, value in fields.items() if name not in ("model_type", "head_dim", "rope_parameters")}
    return {**known, "rope_parameters": ROPES[rope]}


def tiny_qwen2(rope: str = "default", std: float = 20.0) -> torch.nn.Module:
    """A random Qwen2 some of whose pairs of k have biases far beyond its keys, and the others none to speak of."""
    torch.manual_seed(0)
    model = randomized(Qwen2ForCausalLM(Qwen2Config(**settings(rope))))
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias
            bias.mul_(0.1)
            bias.view(-1, 8)[:, 1:4] = std * torch.randn(4, 3)
    return model


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    """The float oracle."""
    return tiny_qwen2()


def float_cache(model: torch.nn.Module) -> QuantizedCache:
    return QuantizedCache(model.config, "float")


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: torch.Tensor, *sizes: int, **arguments: Any) -> torch.Tensor:
    """Of all tokens, which come in chunks into a cache of floats."""
    cache = float_cache(model) if hasattr(model.model.layers[0].self_attn, FOLD) else None
    if cache is None:
        return model(ids, **arguments).logits
    parts = ids.split(sizes or (ids.shape[1],), dim=1)
    return torch.cat([model(part, **with_cache(cache), **arguments).logits for part in parts], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("sizes", [(), (9, 1, 30, 20)])
def test_logits_are_those_of_the_model_that_is_not_folded(
    sizes: tuple[int, ...], rope: str, dtype: torch.dtype
) -> None:
    ids = random_ids(2, 60)
    expected = logits(tiny_qwen2(rope).to(dtype), ids)
    model = prepare(tiny_qwen2(rope).to(dtype))
    found = logits(model, ids, *sizes)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=10 * TOLERANCES["logits"], rtol=0)
    attention = model.model.layers[0].self_attn
    has_key = isinstance(attention.k_proj, FoldableLinear)
    assert has_key == (rope != "dynamic") and isinstance(attention.v_proj, FoldableLinear)
    if has_key:
        chosen = attention.k_proj.left_out.ne(0)
        assert chosen.any() and not chosen.all(), "pairs with small biases keep them"


@pytest.mark.parametrize("std", [0.0, 20.0])
def test_biases_that_are_all_small_cost_nothing(std: float) -> None:
    model, ids = tiny_qwen2(std=std), random_ids(1, 20)
    expected = logits(model, ids)
    prepare(model)
    torch.testing.assert_close(logits(model, ids), expected, atol=10 * TOLERANCES["logits"], rtol=0)
    attention = model.model.layers[0].self_attn
    query = torch.zeros(1, 4, 1, 16)
    terms = getattr(attention, FOLD).terms(query, torch.tensor([[0]]), 1, None)
    assert (terms.query is None) == (std == 0)


def test_rows_of_different_lengths(plain: torch.nn.Module) -> None:
    model = prepare(tiny_qwen2())
    rows = [random_ids(1, length, seed=length) for length in (30, 17, 4)]
    ids = torch.cat([torch.nn.functional.pad(row, (30 - row.shape[1], 0), value=2) for row in rows])
    mask = torch.stack([(torch.arange(30) >= 30 - row.shape[1]).long() for row in rows])
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(ids, attention_mask=mask, **with_cache(float_cache(model)), **arguments)
    for row, found in zip(rows, tokens, strict=True):
        assert torch.equal(plain.generate(row, **arguments)[0], found[30 - row.shape[1] :])


@pytest.mark.parametrize("start", [1000, 5000])
def test_positions_that_start_anywhere(start: int, plain: torch.nn.Module) -> None:
    """In an empty cache, and beyond the first size of the table of angles; the scores are the same by RoPE."""
    model, ids = prepare(tiny_qwen2()), random_ids(1, 40)
    positions = torch.arange(start, start + 40)[None]
    expected = logits(plain, ids, position_ids=positions)
    torch.testing.assert_close(logits(model, ids, position_ids=positions), expected, atol=5e-3, rtol=0)
    cache = float_cache(model)
    with torch.inference_mode():
        parts = [
            model(ids[:, part], position_ids=positions[:, part], **with_cache(cache)).logits
            for part in (slice(0, 25), slice(25, 26), slice(26, 40))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=5e-3, rtol=0)


def test_packed_sequences_are_refused() -> None:
    model = prepare(tiny_qwen2())
    positions = torch.cat((torch.arange(10), torch.arange(10)))[None]
    with pytest.raises(OctavoError, match="packed"):
        model(random_ids(1, 20), position_ids=positions, **with_cache(float_cache(model)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_attention_that_does_not_know_of_the_biases_is_refused(implementation: str) -> None:
    model = prepare(tiny_qwen2())
    model.set_attn_implementation(implementation)
    with pytest.raises(OctavoError, match=implementation):
        model(random_ids(1, 5))
    model.set_attn_implementation("octavo")
    logits(model, random_ids(1, 5))


@pytest.mark.parametrize("preset", ["vllm-fp8", "ascend-c8", "lmdeploy-int8-ptq"])
@pytest.mark.parametrize("is_folded", [True, False])
def test_static_scales_go_with_what_they_were_made_for(is_folded: bool, preset: str, plain: torch.nn.Module) -> None:
    statistics = calibrate(tiny_qwen2(), [], [{"input_ids": random_ids(1, 100)}])
    scheme = load_scheme({**load_scheme(preset).to_dict(), "fold_bias": is_folded})
    scales = scales_of(scheme, statistics)
    assert scales[0].folded == is_folded
    ids = random_ids(1, 30)
    same, other = tiny_qwen2(), tiny_qwen2()
    for model, has_fold in ((same, is_folded), (other, not is_folded)):
        prepare(model) if has_fold else model.set_attn_implementation("octavo")
    with torch.inference_mode():
        found = same(ids, **with_cache(QuantizedCache(same.config, scheme, scales=scales))).logits
    assert torch.isfinite(found).all()
    if is_folded:
        expected = logits(plain, ids)
        assert rmse_in_std(found, expected) < 0.2
    with pytest.raises(OctavoError, match="prepare" if is_folded else "counts the biases"):
        other(ids, **with_cache(QuantizedCache(other.config, scheme, scales=scales)))


def test_static_scales_of_k_whose_bias_cannot_be_folded_count_it_in() -> None:
    model, ids = tiny_qwen2("dynamic"), random_ids(1, 100)
    expected = logits(model, ids)
    statistics = calibrate(model, [], [{"input_ids": ids}])
    assert "layers.0.k.folded.radius" not in statistics.tensors and "layers.0.v.folded.low" in statistics.tensors
    prepare(model)
    scheme = load_scheme("ascend-c8")
    scheme = load_scheme({**scheme.to_dict(), "fold_bias": True})
    cache = QuantizedCache(model.config, scheme, scales=scales_of(scheme, statistics))
    with torch.inference_mode():
        found = model(ids, **with_cache(cache)).logits
    assert rmse_in_std(found, expected) < 0.3


def quantized(scheme: LinearScheme) -> torch.nn.Module:
    """The tiny Qwen2 with quantized linears of attention, in a model of the zoo's class."""
    source = tiny_qwen2()
    inputs: dict[str, torch.Tensor] = {}
    names = [name for name, module in source.named_modules() if isinstance(module, torch.nn.Linear)]
    names = [name for name in names if "self_attn" in name]
    for name in names:
        source.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: inputs.update({name: arguments[0].flatten(0, 1)})
        )
    with torch.no_grad():
        source(random_ids(1, 100))
    tensors = dict(source.state_dict())
    for name in names:
        parts = quantize_linear(source.get_submodule(name), seen(inputs[name]), scheme)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    model = Qwen2ForCausalLM(Qwen2Config(**settings()))
    stated_or_known(model)
    headers = {name: header_of(tensor) for name, tensor in tensors.items()}
    layout = linear_layout(dict.fromkeys(names, scheme.label), headers)
    attach_buffers(model, load_scheme("float"), layout)
    model.load_state_dict(tensors)
    model.set_attn_implementation("octavo")
    return model.eval()


@pytest.mark.parametrize("scheme", every_scheme(), ids=name_of)
def test_quantized_linears_leave_their_biases_to_attention(scheme: LinearScheme) -> None:
    ids = random_ids(2, 40)
    model = quantized(scheme)
    with torch.inference_mode():
        expected = model(ids, **with_cache(float_cache(model))).logits
    assert fold_biases(model) == 2 * LAYERS
    attention = model.model.layers[0].self_attn
    assert type(attention.k_proj) is QUANTIZED_LINEARS[scheme.label] and attention.k_proj.folds_bias
    cache = float_cache(model)
    with torch.inference_mode():
        found = model(ids, **with_cache(cache)).logits
    # The next layer's codes may tip over, of which those of fp8 are far apart.
    limit = 2e-2 if "FP8" in scheme.label else TOLERANCES["logits rmse with codes tipped over"]
    assert rmse_in_std(found, expected) < limit
    assert cache.layers[0].key_store.codes().codes.abs().max() < 10
    chosen = attention.k_proj.left_out.ne(0)
    assert isinstance(attention.k_proj, QuantizedLinear) and chosen.any() and not chosen.all()


def test_a_model_is_folded_once() -> None:
    model = tiny_qwen2()
    stated_or_known(model)
    assert (fold_biases(model), fold_biases(model)) == (2 * LAYERS, 0)


def test_saving_keeps_the_biases(tmp_path: Path, plain: torch.nn.Module) -> None:
    model, ids = prepare(tiny_qwen2()), random_ids(1, 20)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again.model.layers[0].self_attn.k_proj.bias, plain.model.layers[0].self_attn.k_proj.bias)
    torch.testing.assert_close(logits(again, ids), expected, atol=10 * TOLERANCES["logits"], rtol=0)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2"


def test_a_model_changes_its_dtype_after_its_first_pass() -> None:
    model, ids = prepare(tiny_qwen2()), random_ids(1, 20)
    expected = logits(model, ids)
    torch.testing.assert_close(logits(model.double(), ids).float(), expected, atol=10 * TOLERANCES["logits"], rtol=0)


@pytest.mark.parametrize("scheme", ["int8-token", "octavo-4"])
def test_passes_with_and_without_inference_mode_take_turns(scheme: str) -> None:
    model, ids = prepare(tiny_qwen2()), random_ids(1, 20)
    with torch.inference_mode():
        expected = model(ids, **with_cache(QuantizedCache(model.config, scheme))).logits
    found = model(ids, **with_cache(QuantizedCache(model.config, scheme))).logits
    assert torch.equal(found.detach(), expected)


def test_layers_say_for_themselves_what_is_folded() -> None:
    """A layer of Ascend's scheme beside others: its biases are counted in, theirs are not."""
    config = Qwen2Config(**settings())
    scheme = Scheme.from_dict({**load_scheme("int8-token").to_dict(), "layers": {"1": {"fold_bias": False}}})
    config.octavo = {"scheme": scheme.to_dict()}
    model = QuantizedQwen2(config).eval()
    model.load_state_dict(tiny_qwen2().state_dict())
    assert [hasattr(layer.self_attn, FOLD) for layer in model.model.layers] == [True, False]
    ids = random_ids(1, 30)
    expected = logits(tiny_qwen2(), ids)
    with torch.inference_mode():
        error = rmse_in_std(model(ids).logits, expected)
    assert error < 0.2


@pytest.mark.parametrize("scheme", ["float", "int8-token"])
@torch.inference_mode()
def test_a_compiled_step_over_a_static_cache(scheme: str) -> None:
    model, ids = prepare(tiny_qwen2()), random_ids(2, 24)
    caches = [QuantizedCache(model.config, scheme, max_length=32, compileable=True) for _ in range(2)]
    for cache in caches:
        model(ids[:, :20], **with_cache(cache))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def steps(forward: Callable, cache: QuantizedCache) -> torch.Tensor:
        return torch.cat([forward(one, **with_cache(cache)).logits for one in ids[:, 20:].split(1, dim=1)], dim=1)

    expected = steps(model, caches[0])
    torch.testing.assert_close(steps(compiled, caches[1]), expected, atol=TOLERANCES["logits"], rtol=0)
