"""Outlier treatment: exact in float, better in int8, and norms with a bias."""

import copy

import pytest
import torch
from torch import nn

from octavo.common.architecture import architecture_of
from octavo.common.convert.outliers import search
from octavo.common.convert.outliers.smooth import SMOOTHINGS
from octavo.common.convert.outliers.subgraphs import Subgraph
from octavo.common.errors import OctavoError
from octavo.common.runtime.schemes.linear_scheme import LinearInputs
from octavo.models.llama3 import ARCHITECTURE as LLAMA

from ....metrics import relative_rmse
from ....support import tiny_llama
from ....tolerances import TOLERANCES
from .layers import (
    IDS,
    KINDS,
    LINEARS,
    QKV,
    int8_error,
    layer_inputs,
    seen,
    smooth,
    smoothed,
    total_error,
    with_outliers,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("method", ["m2", "m3", "m6"])
def test_a_search_on_a_sample_finds_what_one_on_all_finds(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products, errors = [], []

    def counted(weight: torch.Tensor, inputs: LinearInputs, exact: torch.Tensor) -> torch.Tensor:
        products[-1] += weight.numel() * len(inputs.rows)
        return int8_error(weight, inputs, exact)

    for size in (128, 32):
        products.append(0)
        monkeypatch.setattr(search, "SAMPLED_ROWS", size)
        monkeypatch.setattr(search, "SAMPLED_OUTPUTS", size)
        model = with_outliers(KINDS["llama with biases"]())
        smooth(model.model.layers[0], layer_inputs(model)[0], method, LINEARS, counted)
        names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
        errors.append(total_error(model.model.layers[0], layer_inputs(model)[0], names))
    assert products[1] < 0.5 * products[0]
    assert errors[1] < 1.1 * errors[0]


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
