"""Outlier treatment: exact in float, better in int8, and norms with a bias."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from octavo.common.architecture import architecture_of
from octavo.common.convert.outliers.search import OutputError, Smoothing
from octavo.common.convert.outliers.smooth import SMOOTHINGS, smooth_layer
from octavo.common.convert.outliers.subgraphs import Subgraph, forwards, norm_subgraphs
from octavo.common.errors import OctavoError
from octavo.common.runtime.decoder import Decoder
from octavo.common.runtime.norm_bias import ShiftedNorm, add_norm_bias
from octavo.common.runtime.schemes.linear_scheme import LinearInputs
from octavo.models.llama3 import ARCHITECTURE as LLAMA

from ....metrics import relative_rmse
from ....support import random_ids, randomized, tiny_config, tiny_llama
from ....tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")


def linears_of(decoder: Decoder) -> tuple[str, ...]:
    """The linears of a layer whose inputs are treated."""
    return tuple(dict.fromkeys(name for subgraph in forwards(decoder) for name in subgraph.consumers))


LINEARS = linears_of(LLAMA.decoder)
QKV = LINEARS[:3]
IDS = random_ids(2, 24)
LOUD = (3, 17, 40)
"""Channels that are made outliers, of those of every producer."""


def of_kind(config: type, model: type, **changes: Any) -> Callable[[], PreTrainedModel]:
    """A maker of a random model of two layers, 4 query heads on 2 KV heads of width 16."""

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        known = tiny_config(num_hidden_layers=2).to_dict()
        fields = {name: value for name, value in known.items() if name not in ("model_type", "architectures")}
        return randomized(model(config(**{**fields, **changes})))

    return make


KINDS = {
    "llama": of_kind(LlamaConfig, LlamaForCausalLM),
    "llama with biases": of_kind(LlamaConfig, LlamaForCausalLM, attention_bias=True, mlp_bias=True),
    "llama with a KV head per head": of_kind(LlamaConfig, LlamaForCausalLM, num_key_value_heads=4),
    "mistral": of_kind(MistralConfig, MistralForCausalLM),
    "qwen2": of_kind(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": of_kind(Qwen3Config, Qwen3ForCausalLM),
    "phi3": of_kind(
        Phi3Config, Phi3ForCausalLM, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}
    ),
    "smollm3": of_kind(SmolLM3Config, SmolLM3ForCausalLM, no_rope_layers=[1, 0], attention_bias=True),
}


@torch.no_grad()
def with_outliers(model: PreTrainedModel, gain: float = 40.0) -> PreTrainedModel:
    """The same function, where some channels of every input are loud, and those of norms off their middle too."""
    decoder = architecture_of(model.config).decoder
    for layer in model.model.layers:
        for subgraph in forwards(decoder):
            producer = layer.get_submodule(subgraph.producer)
            loud, offset = torch.tensor(LOUD), decoder.norm_offset if subgraph.is_norm else 0.0
            if subgraph.by_heads:
                loud = loud[:2]
            if subgraph.part:
                loud += len(producer.weight) - (32 if subgraph.by_heads else len(producer.weight) // 2)
            producer.weight[loud] = (producer.weight[loud] + offset) * gain - offset
            if not subgraph.by_heads:
                for name in subgraph.consumers:
                    layer.get_submodule(name).weight[:, list(LOUD)] /= gain
    return model


def seen(x: torch.Tensor) -> LinearInputs:
    """What calibration would know of `[..., K]`."""
    rows = x.detach().float().flatten(0, -2)
    magnitude, square = rows.abs().mean(dim=0), rows.square().mean(dim=0)
    return LinearInputs(rows.amin(dim=0), rows.amax(dim=0), magnitude, square, rows)


@torch.no_grad()
def layer_inputs(model: PreTrainedModel) -> list[dict[str, LinearInputs]]:
    """The inputs of all linears of each layer; those given the same tensor have the same object."""
    found: list[dict[str, LinearInputs]] = [{} for _ in model.model.layers]
    linears = linears_of(architecture_of(model.config).decoder)
    last: list[Any] = [None, None]

    def see(layer: int, name: str, x: torch.Tensor) -> None:
        if x is not last[0]:
            last[:] = x, seen(x)
        found[layer][name] = last[1]

    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args, n=number, name=name: see(n, name, args[0]))
        for number, layer in enumerate(model.model.layers)
        for name in linears
    ]
    model(IDS)
    for hook in hooks:
        hook.remove()
    return found


def int8_error(weight: torch.Tensor, inputs: LinearInputs, exact: torch.Tensor) -> torch.Tensor:
    """Of a linear with a scale per output channel of the weight, and a scale and a zero point of the whole input."""
    low, high = inputs.low.amin().clamp_max(0), inputs.high.amax().clamp_min(0)
    step = ((high - low) / 255).clamp_min(1e-12)
    zero = (-low / step).round()
    rows = (((inputs.rows / step).round() + zero).clamp(0, 255) - zero) * step
    steps = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-12)
    return (rows @ ((weight / steps).round() * steps).T - exact).square().sum()


Rewritten = dict[Subgraph, Smoothing]


def smooth(
    layer: nn.Module,
    inputs: dict[str, LinearInputs],
    method: str,
    quantized: tuple[str, ...],
    error: OutputError,
    decoder: Decoder = LLAMA.decoder,
) -> Rewritten:
    return smooth_layer(layer, inputs, method, quantized, error, decoder)


def smoothed(model: PreTrainedModel, method: str, quantized: tuple[str, ...] = ()) -> list[Rewritten]:
    """Smooth every layer by what is seen before; all linears are to be quantized if none are named."""
    layers = zip(model.model.layers, layer_inputs(model), strict=True)
    decoder = architecture_of(model.config).decoder
    quantized = quantized or linears_of(decoder)
    return [smooth(layer, inputs, method, quantized, int8_error, decoder) for layer, inputs in layers]


def total_error(layer: nn.Module, inputs: dict[str, LinearInputs], names: tuple[str, ...]) -> float:
    """The squared error of some linears of a layer."""
    weights = {name: layer.get_submodule(name).weight.detach().float() for name in names}
    return sum(float(int8_error(w, inputs[name], inputs[name].rows @ w.T)) for name, w in weights.items())


def unscaled(rewrite: Subgraph) -> tuple[str, ...]:
    """Consumers whose outputs are those of the model as it came: v and up may have been scaled for o and down."""
    return tuple(name for name in rewrite.consumers if name not in ("self_attn.v_proj", "mlp.up_proj"))


@pytest.mark.parametrize("method", SMOOTHINGS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_stay(kind: str, method: str) -> None:
    model = with_outliers(KINDS[kind]()).double()
    expected = model(IDS).logits
    rewrites = smoothed(model, method)
    assert all(len(done) >= 2 for done in rewrites)
    if method in ("m1", "m4"):
        wanted = set(SMOOTHINGS[method][0](architecture_of(model.config).decoder))
        assert all(set(done) == wanted for done in rewrites)
    assert relative_rmse(model(IDS).logits, expected) < 1e-9


@pytest.mark.parametrize("method", SMOOTHINGS)
@torch.no_grad()
def test_logits_stay_in_float32(method: str) -> None:
    model = with_outliers(KINDS["qwen2"]())
    expected = model(IDS).logits
    smoothed(model, method)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=TOLERANCES["logits"] * float(expected.std()))


@pytest.mark.parametrize("method", SMOOTHINGS)
@torch.no_grad()
def test_error_falls(method: str) -> None:
    model = with_outliers(KINDS["llama with biases"]())
    inputs, before = layer_inputs(model), copy.deepcopy(model)
    done = smoothed(model, method)
    after = layer_inputs(model)
    for number, rewrites in enumerate(done):
        assert [rewrite.producer for rewrite in rewrites] == [
            part.producer for part in SMOOTHINGS[method][0](LLAMA.decoder)
        ]
        for rewrite in rewrites:
            names = unscaled(rewrite)
            was = total_error(before.model.layers[number], inputs[number], names)
            now = total_error(model.model.layers[number], after[number], names)
            assert now < 0.5 * was, (rewrite.producer, now / was)


@pytest.mark.parametrize("method", ["m2", "m3", "m6"])
def test_searches_leave_what_they_do_not_better(method: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    inputs = layer_inputs(model)[0]

    def grows(weight: torch.Tensor, inputs: LinearInputs, _: torch.Tensor) -> torch.Tensor:
        """Least where nothing is done."""
        return (weight.std() / 0.15).log().abs() + (inputs.rows - reference.rows).square().sum()

    for names in (QKV, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",), ("self_attn.o_proj",)):
        reference = inputs[names[0]]
        assert smooth(model.model.layers[0], inputs, method, names, grows) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["m2", "m3", "m6"])
def test_candidates_are_held_against_the_exact_output(method: str) -> None:
    model, shapes = with_outliers(tiny_llama()), set()

    def checked(weight: torch.Tensor, inputs: LinearInputs, exact: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(exact, inputs.rows @ weight.T, rtol=1e-3, atol=1e-3)
        shapes.add(tuple(weight.shape))
        return int8_error(weight, inputs, exact)

    smooth(model.model.layers[0], layer_inputs(model)[0], method, LINEARS, checked)
    assert len(shapes) > 1


@pytest.mark.parametrize("method", ["m2", "m3", "m6"])
def test_searches_are_short(method: str) -> None:
    model, calls = with_outliers(tiny_llama()), []

    def counted(weight: torch.Tensor, inputs: LinearInputs, exact: torch.Tensor) -> torch.Tensor:
        calls.append(inputs)
        return int8_error(weight, inputs, exact)

    smooth(model.model.layers[0], layer_inputs(model)[0], method, ("mlp.up_proj",), counted)
    assert 10 < len(calls) <= 40


def test_flex_is_no_worse_than_smoothquant() -> None:
    chosen = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    plain, flexible = (with_outliers(tiny_llama()) for _ in range(2))
    smoothed(plain, "m4", chosen)
    smoothed(flexible, "m6", chosen)
    for name in chosen:
        errors = [total_error(model.model.layers[0], layer_inputs(model)[0], (name,)) for model in (flexible, plain)]
        assert errors[0] < 1.05 * errors[1]


def worked_example() -> tuple[nn.Module, dict[str, LinearInputs]]:
    """A layer whose q, k and v have known columns, and their inputs."""
    model = tiny_llama(hidden_size=4, intermediate_size=8, head_dim=4, num_attention_heads=2, num_key_value_heads=1)
    layer = model.model.layers[0]
    with torch.no_grad():
        for name, column in zip(QKV, ([1.0, 0.25, 2.0, 0.5], [0.5, 0.125, 4.0, 0.5], [0.1] * 4), strict=True):
            linear = layer.get_submodule(name)
            linear.weight.zero_()
            linear.weight[-1] = -torch.tensor(column)
    low, high = torch.tensor([-16.0, 0.0, -1.0, -0.5]), torch.tensor([4.0, 1.0, 0.25, 0.5])
    inputs = LinearInputs(low, high, high - low, high - low, torch.stack((low, high)))
    return layer, dict.fromkeys(QKV, inputs)


def test_smoothquant_by_hand() -> None:
    layer, inputs = worked_example()
    ((subgraph, done),) = smooth(layer, inputs, "m1", QKV, int8_error).items()
    assert torch.allclose(done.scale, torch.tensor([16.0 / 1, 1 / 0.25, 1 / 4, 0.5 / 0.5]).sqrt())
    assert (subgraph.producer, subgraph.consumers, done.shift) == ("input_layernorm", QKV, None)
    assert done.parameters == {"alpha": 0.5}
    assert torch.allclose(layer.self_attn.q_proj.weight[-1], -torch.tensor([4.0, 0.5, 1.0, 0.5]))


def test_only_quantized_linears_count() -> None:
    layer, inputs = worked_example()
    (done,) = smooth(layer, inputs, "m1", ("self_attn.q_proj",), int8_error).values()
    assert torch.allclose(done.scale, torch.tensor([16.0 / 1, 1 / 0.25, 1 / 2, 0.5 / 0.5]).sqrt())
    assert torch.allclose(layer.self_attn.v_proj.weight[-1], -0.1 * done.scale)


def test_query_heads_of_a_group_share_a_scale() -> None:
    model = with_outliers(tiny_llama())
    layer, inputs = model.model.layers[0], layer_inputs(model)[0]["self_attn.o_proj"]
    columns = layer.self_attn.o_proj.weight.detach().abs().amax(dim=0)
    x, w = (part.view(2, 2, 16).amax(dim=1) for part in (inputs.largest, columns))
    (done,) = smooth(layer, {"self_attn.o_proj": inputs}, "m4", ("self_attn.o_proj",), int8_error).values()
    expected = (x / w).sqrt()
    assert torch.allclose(done.scale.view(2, 16), expected)


def test_awq_is_normalised() -> None:
    model = with_outliers(tiny_llama())
    inputs = layer_inputs(model)[0]
    for subgraph, done in smooth(model.model.layers[0], inputs, "m3", LINEARS, int8_error).items():
        assert float(done.scale.amax() * done.scale.amin()) == pytest.approx(1.0, rel=1e-4)
        if subgraph.producer != "self_attn.v_proj":
            powers = inputs[subgraph.consumers[0]].mean_abs ** done.parameters["ratio"]
            assert torch.allclose(done.scale / done.scale[0], powers / powers[0], rtol=1e-4)


def test_outlier_suppression_moves_channels_about_0() -> None:
    model = with_outliers(tiny_llama())
    inputs = layer_inputs(model)[0]
    before = copy.deepcopy(model.model.layers[0])
    (done,) = smooth(model.model.layers[0], inputs, "m2", QKV, int8_error).values()
    after = layer_inputs(model)[0]["self_attn.q_proj"]
    threshold = done.parameters["threshold"]
    middle = (inputs["self_attn.q_proj"].low + inputs["self_attn.q_proj"].high) / 2
    assert float(((middle - done.shift) / middle).abs().amax()) < 2**-8
    assert float(done.scale.amin()) == 1.0 and float(after.largest.amax()) < 1.02 * threshold
    bias = model.model.layers[0].self_attn.k_proj.bias
    assert torch.allclose(bias, before.self_attn.k_proj.weight @ done.shift, atol=1e-4)
    norm_bias = model.model.layers[0].input_layernorm.bias
    assert torch.allclose(norm_bias.bfloat16().float(), norm_bias, rtol=1e-6, atol=0)
    assert torch.allclose(norm_bias, -done.shift / done.scale)


@pytest.mark.parametrize("method", SMOOTHINGS)
@torch.no_grad()
def test_channels_of_zeros(method: str) -> None:
    model = with_outliers(KINDS["llama with biases"]()).double()
    for layer in model.model.layers:
        layer.input_layernorm.weight[0] = 0
        layer.self_attn.v_proj.weight[1] = 0
        layer.self_attn.v_proj.bias[1] = 0
        layer.mlp.up_proj.weight[2] = 0
        layer.mlp.up_proj.bias[2] = 0
        for name in LINEARS:
            layer.get_submodule(name).weight[:, 4] = 0
        layer.mlp.gate_proj.weight.zero_()
        layer.mlp.up_proj.weight[:, 5] = 0
    expected = model(IDS).logits
    smoothed(model, method)
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    assert relative_rmse(model(IDS).logits, expected) < 1e-9


@pytest.mark.parametrize("method", SMOOTHINGS)
@torch.no_grad()
def test_a_layer_of_zeros(method: str) -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.zero_()
    for parameter in model.model.layers[0].parameters():
        parameter.zero_()
    smooth(model.model.layers[0], layer_inputs(model)[0], method, LINEARS, int8_error)
    assert all(bool((tensor == 0).all()) for tensor in model.model.layers[0].state_dict().values())


@pytest.mark.parametrize("method", ["m4", "m6"])
@torch.no_grad()
def test_producers_stay_within_float16(method: str) -> None:
    model = tiny_llama()
    layer, inputs = model.model.layers[0], layer_inputs(model)[0]
    gains = torch.ones(128)
    gains[:2] = torch.tensor([1e-13, 1e13])
    inputs["mlp.down_proj"] = inputs["mlp.down_proj"].transformed(gains)
    smooth(layer, inputs, method, ("mlp.down_proj",), int8_error)
    rows = layer.mlp.up_proj.weight.half().abs().amax(dim=1)
    assert bool(rows.isfinite().all()) and float(rows.amin()) >= 2**-14


@pytest.mark.parametrize("method", SMOOTHINGS)
def test_what_is_not_quantized_stays(method: str) -> None:
    model = with_outliers(tiny_llama())
    before = copy.deepcopy(model.state_dict())
    done = smoothed(model, method, ("self_attn.k_proj",))
    assert [rewrite.producer for rewrite in done[0]] == ["input_layernorm"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before.get(name, IDS))}
    parts = {name.split(".", 3)[3].rpartition(".")[0] for name in changed}
    assert parts == {"input_layernorm", *QKV}


@torch.no_grad()
def test_half_precision() -> None:
    model = with_outliers(tiny_llama())
    expected = model(IDS).logits
    model.bfloat16()
    for method in SMOOTHINGS:
        changed = copy.deepcopy(model)
        smoothed(changed, method)
        assert {tensor.dtype for tensor in changed.state_dict().values()} == {torch.bfloat16}
        assert relative_rmse(changed(IDS).logits.float(), expected) < 2 * relative_rmse(
            model(IDS).logits.float(), expected
        )


def test_refusals() -> None:
    layer = tiny_llama().model.layers[0]
    with pytest.raises(OctavoError, match="m5"):
        smooth(layer, {}, "m5", LINEARS, int8_error)
    with pytest.raises(OctavoError, match=r"mlp\.down_proj: calibration saw no inputs"):
        smooth(layer, {}, "m4", LINEARS, int8_error)
    wild = dict.fromkeys(LINEARS, seen(torch.full((3, 64), torch.inf)))
    with pytest.raises(OctavoError, match="not finite"):
        smooth(layer, wild, "m1", LINEARS, int8_error)
    layer.input_layernorm = nn.RMSNorm(64, elementwise_affine=False)
    with pytest.raises(OctavoError, match="input_layernorm: RMSNorm has no float weight"):
        smooth(layer, {}, "m1", LINEARS, int8_error)
    del layer.mlp.up_proj
    with pytest.raises(OctavoError, match=r"mlp\.up_proj: LlamaDecoderLayer has no such module"):
        smooth(layer, {}, "m4", LINEARS, int8_error)


def shifted() -> tuple[PreTrainedModel, torch.Tensor]:
    """A model after "m2", and the logits from before."""
    model = with_outliers(tiny_llama())
    with torch.no_grad():
        expected = model(IDS).logits
    smoothed(model, "m2")
    return model, expected


class ShiftedLlama(LlamaForCausalLM):
    """A Llama whose norms before attention and MLP, and their linears, have biases."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            for subgraph in norm_subgraphs(LLAMA.decoder):
                norm = layer.get_submodule(subgraph.producer)
                add_norm_bias(norm, torch.empty_like(norm.weight))
                for name in subgraph.consumers:
                    linear = layer.get_submodule(name)
                    linear.bias = nn.Parameter(torch.empty_like(linear.weight[:, 0]))


@torch.no_grad()
def test_norm_biases_are_loaded(tmp_path: Path) -> None:
    model, expected = shifted()
    state = model.state_dict()
    assert {"model.layers.0.input_layernorm.bias", "model.layers.2.post_attention_layernorm.bias"} <= state.keys()
    with torch.device("meta"):
        empty = ShiftedLlama(model.config)
    assert empty.model.layers[0].input_layernorm.bias.is_meta
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.model.layers[1].input_layernorm.bias, model.model.layers[1].input_layernorm.bias)
    model.save_pretrained(tmp_path)
    loaded = ShiftedLlama.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=TOLERANCES["logits"] * float(expected.std()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_norm_biases_change_their_dtype(dtype: torch.dtype) -> None:
    model, expected = shifted()
    norm = model.to(dtype).model.layers[0].input_layernorm
    assert norm.bias.dtype == norm(torch.ones(1, 64, dtype=dtype)).dtype == dtype
    assert relative_rmse(model(IDS).logits.float(), expected) < 0.1


@torch.no_grad()
def test_a_norm_and_its_bias() -> None:
    norms = [copy.deepcopy(tiny_llama().model.norm) for _ in range(2)]
    x, bias = torch.randn(2, 3, 64), torch.randn(64)
    plain = norms[0](x)
    for norm in norms:
        add_norm_bias(norm, bias)
    assert isinstance(norms[0], ShiftedNorm) and type(norms[0]) is type(norms[1])
    assert type(norms[0]).__name__ == "ShiftedLlamaRMSNorm" and list(norms[0].state_dict()) == ["weight", "bias"]
    assert torch.equal(norms[0](x), plain + bias)
    assert torch.equal(copy.deepcopy(norms[0])(x), plain + bias)
    add_norm_bias(norms[0], 2 * bias)
    assert torch.equal(norms[0](x), plain + 2 * bias)
