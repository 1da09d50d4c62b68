"""Qwen3 with experts: a list of small MLPs computes what transformers' merged experts do, in float and on codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from octavo import QuantizedCache, prepare
from octavo.common.convert import api as conversion
from octavo.common.convert.calibration import observe
from octavo.common.convert.calibration.observe import InputObservers
from octavo.common.convert.calibration.streams import Stream
from octavo.common.convert.outliers.smooth import SMOOTHINGS, smooth_layer
from octavo.common.convert.pipeline import Conversion
from octavo.common.convert.source.checkpoint import layerwise_source
from octavo.common.convert.weights.quantize import output_error
from octavo.common.runtime.decoder import list_experts, state_decoder
from octavo.common.runtime.experts import ExpertList
from octavo.common.runtime.quantized_linear import QuantizedLinear
from octavo.common.runtime.schemes.linear_scheme import LinearInputs, LinearScheme
from octavo.models.qwen3_moe import ARCHITECTURE

from ..metrics import rmse_in_std
from ..support import convert_flags, quantized_tensors, random_ids, randomized, save_source, tiny_config, with_cache
from ..tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = random_ids(2, 40)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
DENSE, SPARSE = 1, (0, 2)
"""Layers with the plain MLP, and those with experts."""
KINDS = {
    "W8A8": ("--disable_names", "lm_head"),
    "W8A8_DYNAMIC": ("--is_dynamic", "True"),
    "W8A16": ("--w_bit", "8", "--a_bit", "16", "--cpu_activations", "float"),
    "W4A16": ("--w_bit", "4", "--a_bit", "16", "--group_size", "32", "--cpu_activations", "float"),
}
SCHEMES = ("int8-token", "octavo-4", "ascend-c8", "ascend-fa")


def tiny_moe(**changes: Any) -> Qwen3MoeForCausalLM:
    """Three layers, of which the second is dense and the others have four experts, two for each token."""
    torch.manual_seed(0)
    fields = {name: value for name, value in tiny_config().to_diff_dict().items() if name != "model_type"}
    config = Qwen3MoeConfig(**{**fields, **EXPERTS, "mlp_only_layers": [DENSE], **changes})
    return randomized(Qwen3MoeForCausalLM(config))


def converted(source: Path, target: Path, *flags: str) -> nn.Module:
    """The quantized model of a source."""
    assert conversion.main(ARCHITECTURE, convert_flags(source, target, *flags)) == 0
    return ARCHITECTURE.model_class.from_pretrained(target).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float checkpoint, whose experts lie on disk one by one."""
    return save_source(tmp_path_factory.mktemp("moe"), tiny_moe())


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., nn.Module]:
    """`quantized(*flags)`: the model converted with these flags, once."""
    made: dict[tuple[str, ...], nn.Module] = {}

    def convert(*flags: str) -> nn.Module:
        if flags not in made:
            made[flags] = converted(source, tmp_path_factory.mktemp("out") / "moe", *flags)
        return made[flags]

    return convert


# In float.


def listed(model: nn.Module) -> nn.Module:
    """A stock model whose experts are lists."""
    state_decoder(model, ARCHITECTURE.decoder)
    list_experts(model)
    return model


@torch.no_grad()
def test_a_list_of_experts_computes_what_the_merged_ones_do(source: Path) -> None:
    expected = tiny_moe()(IDS).logits
    for model in (listed(tiny_moe()), ARCHITECTURE.model_class.from_pretrained(source)):
        lists = [index for index, layer in enumerate(model.model.layers) if isinstance(layer.mlp, ExpertList)]
        lists += [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
        assert tuple(lists) == SPARSE
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=TOLERANCES["logits"])


def test_a_float_model_is_saved_as_transformers_saves_it(source: Path, tmp_path: Path) -> None:
    ARCHITECTURE.model_class.from_pretrained(source).save_pretrained(tmp_path)
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, tiny_moe().state_dict()[name]) for name, tensor in again.state_dict().items())


def test_only_experts_that_a_token_chose_compute(source: Path) -> None:
    experts = listed(tiny_moe()).model.layers[0].mlp.experts
    called = []
    for number, expert in enumerate(experts):
        expert.register_forward_hook(lambda _, args, output, number=number: called.append((number, len(args[0]))))
    experts(torch.randn(3, 64), torch.tensor([[3, 0], [0, 3], [3, 1]]), torch.rand(3, 2))
    assert called == [(0, 2), (1, 1), (3, 3)]


def w8a8_error(weight: torch.Tensor, inputs: LinearInputs, exact: torch.Tensor) -> torch.Tensor:
    """Of a linear in static int8."""
    return output_error(weight, inputs, LinearScheme("W8A8"), exact)


@pytest.mark.parametrize("method", SMOOTHINGS)
@torch.no_grad()
def test_outlier_methods_leave_the_logits(method: str) -> None:
    """The router is rescaled with the experts; "m2" does not shift what both are given, for the router has no bias."""
    model, facts = listed(tiny_moe()).double(), ARCHITECTURE.decoder
    expected = model(IDS).logits
    for index, layer in enumerate(model.model.layers):
        is_sparse = index in SPARSE
        linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        observed = [*linears, "mlp.gate"] if is_sparse else linears
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[3::16] *= 30
        for name in observed:
            if not name.endswith(("o_proj", "down_proj")):
                layer.get_submodule(name).weight[:, 3::16] /= 30
        before = layer.mlp.gate.weight.clone() if is_sparse else None
        seen = {name: layer.get_submodule(name) for name in observed}
        observers = InputObservers(seen, experts=layer.mlp.experts if is_sparse else None)
        model(IDS)
        observers.reach_all_experts()
        observers.remove()
        experts = facts.experts_in(model.config, index)
        done = smooth_layer(layer, observers.inputs(), method, linears, w8a8_error, facts, experts=experts)
        is_rewritten = "post_attention_layernorm" in {subgraph.producer for subgraph in done}
        assert is_rewritten == (method != "m2" or not is_sparse)
        if is_sparse:
            assert torch.equal(before, layer.mlp.gate.weight) == (method == "m2")
    found = model(IDS).logits
    assert rmse_in_std(found, expected) < 1e-9


def test_a_source_whose_experts_are_merged_converts_to_the_same(source: Path, tmp_path: Path) -> None:
    merged = save_source(tmp_path / "merged", tiny_moe(), save_original_format=False)
    files = layerwise_source(merged, "cpu").files.placed
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in files and len(files) == len(
        layerwise_source(source, "cpu").files.placed
    )
    for name, directory in (("one by one", source), ("in one", merged)):
        converted(directory, tmp_path / name, "--w_bit", "8", "--a_bit", "16")
    first, second = (quantized_tensors(tmp_path / name) for name in ("one by one", "in one"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_layer_by_layer_is_the_whole_model(source: Path) -> None:
    whole, found = tiny_moe(), layerwise_source(source, "cpu")
    with torch.no_grad():
        stream = Stream.of(found, [{"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}])
        for index in range(len(found)):
            with found.layer(index) as layer:
                stream.hidden = stream.through(layer, index)
        logits = found.logits(found.final_norm()(stream.hidden[0])[0], found.tensor("lm_head.weight"))
        assert (logits - whole(IDS[:1]).logits[0]).abs().max() < TOLERANCES["logits"]


# On codes.


def coded_input(x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    """Inputs as the codes of a kind of linear stand for."""
    if layer.LABEL == "W8A8":
        scale, zero = layer.input_scale, layer.input_offset
    elif layer.LABEL == "W8A8_DYNAMIC":
        scale, zero = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127, 0
    else:
        return x
    return ((x / scale + zero).round().clamp(-128, 127) - zero) * scale


def simulated(model: nn.Module) -> nn.Module:
    """The stock model with inputs and weights of every quantized linear rounded to what its codes stand for."""
    oracle = tiny_moe()

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantizedLinear):
            return linear(x, layer.weight, layer.bias)
        return linear(coded_input(x, layer), layer.float_weight(), layer.bias)

    def experts(name: str, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for token in range(len(x)):
            for number, weight in zip(index[token].tolist(), weights[token], strict=True):
                part = f"{name}.{number}"
                row = x[token : token + 1]
                hidden = torch.nn.functional.silu(product(f"{part}.gate_proj", row)) * product(f"{part}.up_proj", row)
                result[token] += weight * product(f"{part}.down_proj", hidden)[0]
        return result

    for name, module in oracle.named_modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, name=name: product(name, x)
        elif name.endswith(".experts"):
            module.forward = lambda *args, name=name: experts(name, *args)
        elif next(module.parameters(recurse=False), None) is not None:
            module.load_state_dict(model.get_submodule(name).state_dict())
    return oracle


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_linears_are_what_their_codes_stand_for(kind: str, quantized: Callable[..., nn.Module]) -> None:
    model = quantized(*KINDS[kind])
    of_experts = [m for n, m in model.named_modules() if ".experts." in n and isinstance(m, QuantizedLinear)]
    assert [layer.LABEL for layer in of_experts] == [kind] * 3 * 4 * len(SPARSE)
    expected, found = simulated(model)(IDS).logits, model(IDS).logits
    error = rmse_in_std(found, expected)
    assert error < (TOLERANCES["simulation rmse float32"] if kind.startswith("W8A8") else TOLERANCES["logits"])
    assert rmse_in_std(found, tiny_moe()(IDS).logits) > 10 * error


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.inference_mode()
def test_caches_store_what_two_lines_on_the_stock_model_store(scheme: str, quantized: Callable[..., nn.Module]) -> None:
    model = quantized(*KINDS["W8A16"], "--scheme", scheme)
    stock = prepare(simulated(model))
    cache, own = model.new_cache(), model.new_cache()
    for part in (IDS[:, :30], IDS[:, 30:31], IDS[:, 31:]):
        found = model(part, **with_cache(own)).logits
        expected = stock(part, **with_cache(cache)).logits
        error = rmse_in_std(found, expected)
        assert error < TOLERANCES["simulation rmse float32"]
    float_logits = tiny_moe()(IDS).logits[:, 31:]
    assert 3 * error < rmse_in_std(found, float_logits) < TOLERANCES["rmse of a tiny model, W8A8"]


@torch.inference_mode()
def test_two_lines_on_the_stock_model() -> None:
    model, expected = prepare(tiny_moe()), tiny_moe()(IDS).logits
    found = model(IDS, **with_cache(QuantizedCache(model.config, "int8-token"))).logits
    assert rmse_in_std(found, expected) < TOLERANCES["rmse of a tiny model, C8"]


@torch.inference_mode()
def test_the_contract_of_the_cache(quantized: Callable[..., nn.Module]) -> None:
    """Cut into parts, cropped, reordered and repeated, the cache gives what one pass over the same tokens gives."""
    model = quantized("--is_dynamic", "True", "--use_kvcache_quant", "True")
    cache = model.new_cache()
    for part in IDS[:, :25].split(10, dim=1):
        model(part, **with_cache(cache))
    cache.crop(-5)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    found = model(IDS.flip(0).repeat_interleave(2, dim=0)[:, 20:30], **with_cache(cache)).logits
    expected = model(IDS.flip(0).repeat_interleave(2, dim=0)[:, :30]).logits[:, 20:]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES["logits"] * float(expected.std()))


def test_a_row_of_a_padded_batch_generates_what_it_does_alone(quantized: Callable[..., nn.Module]) -> None:
    model = quantized("--is_dynamic", "True", "--use_kvcache_quant", "True")
    padding = torch.full((1, 9), model.config.pad_token_id)
    ids = torch.cat([IDS[:1], torch.cat([padding, IDS[1:, 9:]], dim=1)])
    mask = torch.cat([torch.ones_like(padding), torch.ones_like(IDS[:1, 9:])], dim=1).repeat(2, 1)
    mask[1, :9] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    found = model.generate(ids, attention_mask=mask, **settings)[:, 40:]
    for row, alone in enumerate((IDS[:1], IDS[1:, 9:])):
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **settings)[:, alone.shape[1] :]
        assert torch.equal(found[row : row + 1], expected)


# Experts that calibration does not reach.


def with_unchosen_expert() -> Qwen3MoeForCausalLM:
    """Five experts, of which two opposite pairs are always better than the last."""
    model = tiny_moe(num_experts=5)
    with torch.no_grad():
        for index in SPARSE:
            router = model.model.layers[index].mlp.gate.weight
            router[1], router[3], router[4] = -router[0], -router[2], 0
    return model


@pytest.mark.parametrize(
    "flags",
    [
        ("--disable_names", "lm_head"),
        ("--w_bit", "4", "--a_bit", "16", "--group_size", "32", "--w_method", "GPTQ"),
        ("--anti_method", "m4", "--is_dynamic", "True"),
    ],
    ids=["static", "GPTQ", "smoothed"],
)
def test_experts_that_no_token_chose_are_given_all(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_source(tmp_path / "source", with_unchosen_expert())
    model = converted(source, tmp_path / "out", *flags)
    said = capsys.readouterr().out.splitlines()[-2]
    assert said.startswith("no calibration text reaches 2 expert(s), as model.layers.0.mlp.experts.4:")
    x = torch.randn(16, 64)
    plain = listed(with_unchosen_expert()).model.layers[0].mlp.experts[4]
    if "--anti_method" not in flags:
        with torch.no_grad():
            expected, found = plain(x), model.model.layers[0].mlp.experts[4](x)
        assert rmse_in_std(found, expected) < TOLERANCES["rmse of a tiny model, W8A8"]


def test_experts_share_the_room_for_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "MOST_EXPERT_BYTES", 4 * 64 * 8)
    model = listed(tiny_moe())
    layer = model.model.layers[0]
    names = ("self_attn.q_proj", "mlp.experts.1.up_proj")
    observers = InputObservers({name: layer.get_submodule(name) for name in names}, experts=layer.mlp.experts)
    model(IDS)
    observers.remove()
    of_attention, of_expert = (observers.inputs()[name].rows for name in names)
    assert len(of_attention) == IDS.numel() and 4 <= len(of_expert) <= 8


def test_nothing_is_said_where_inputs_do_not_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_source(tmp_path / "source", with_unchosen_expert())
    converted(source, tmp_path / "out", "--is_dynamic", "True")
    assert "reaches" not in capsys.readouterr().out


def test_a_conversion_goes_on_behind_the_layer_that_it_was_stopped_at(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--anti_method", "m4", "--use_kvcache_quant", "True")
    converted(source, tmp_path / "whole", *flags)
    layer = Conversion.layer

    def stops(self: Conversion, index: int) -> dict[str, torch.Tensor]:
        if index == 2:
            raise RuntimeError("power failed")
        return layer(self, index)

    monkeypatch.setattr(Conversion, "layer", stops)
    assert conversion.main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags)) == 1
    monkeypatch.undo()
    converted(source, tmp_path / "out", *flags, "--resume")
    assert "going on behind layer 2 of 3" in capsys.readouterr().err
    first, second = (quantized_tensors(tmp_path / name) for name in ("whole", "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What is stated, and what is found.


def test_names_and_labels_are_those_on_disk(source: Path, quantized: Callable[..., nn.Module], tmp_path: Path) -> None:
    directory = Path(quantized("--use_kvcache_quant", "True").name_or_path)
    description = json.loads((directory / "quant_model_description.json").read_text())
    layer = "model.layers.0.mlp"
    assert description[f"{layer}.experts.3.gate_proj.weight"] == description[f"{layer}.experts.0.up_proj.deq_scale"]
    assert description[f"{layer}.experts.3.gate_proj.weight"] == "W8A8"
    assert description[f"{layer}.experts.3.down_proj.weight"] == "FLOAT", "Ascend's recipe"
    assert description[f"{layer}.gate.weight"] == description["model.layers.1.mlp.down_proj.weight"] == "FLOAT"
    assert description["model.layers.1.mlp.gate_proj.weight"] == "W8A8"
