"""Conversion layer by layer: what it computes is what the whole model computes, and what is loaded afterwards."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from octavo.common.convert.api import converted, main
from octavo.common.convert.calibration.streams import Stream
from octavo.common.convert.flags import parse_request
from octavo.common.convert.request import ConvertRequest
from octavo.common.convert.source.checkpoint import layerwise_source
from octavo.common.runtime.quantized_linear import QuantizedLinear
from octavo.common.runtime.schemes.linear_scheme import LINEAR_LABELS
from octavo.models import llama3, qwen2

from ...support import (
    TEXTS,
    assert_one_error_line,
    convert_flags,
    quantized_tensors,
    random_ids,
    randomized,
    save_source,
    tiny_llama,
    tiny_tokenizer,
)
from ...tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

ANTI_METHODS = ("m1", "m2", "m3", "m4", "m6")
KINDS = {
    "W8A8": (),
    "W8A8_DYNAMIC": ("--is_dynamic", "True"),
    "W8A16": ("--w_bit", "8", "--a_bit", "16"),
    "W4A16": ("--w_bit", "4", "--a_bit", "16", "--group_size", "32"),
    "W4A16_DOUBLE": ("--w_bit", "4", "--a_bit", "16", "--scale_bits", "8"),
    "WFP8AFP8": ("--quantization", "wfp8afp8"),
    "WFP8AFP8_DYNAMIC": ("--quantization", "fp8"),
    "W8A8_MIXED": ("--quantization", "w8a8_mixed"),
}


def samples(*lengths: int) -> list[dict[str, torch.Tensor]]:
    """Random texts."""
    ids = [random_ids(1, length, seed=length) for length in lengths]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


@pytest.fixture(scope="module")
def qwen2_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 whose biases are large and whose upper layers have a sliding window."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, tie_word_embeddings=True, use_sliding_window=True,
        sliding_window=16, max_window_layers=1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return save_source(tmp_path_factory.mktemp("qwen2"), randomized(Qwen2ForCausalLM(config)))


@pytest.mark.parametrize("name", ["source", "qwen2_source"])
def test_layer_by_layer_is_the_whole_model(name: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(name)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    source, texts = layerwise_source(directory, "cpu"), samples(20, 33)
    with torch.no_grad():
        stream = Stream.of(source, texts)
        for index in range(len(source)):
            with source.layer(index) as layer:
                first = stream.through(layer, index)
                again = stream.through(layer, index)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "nothing is remembered"
                stream.hidden = first
            assert all(part.is_meta for part in source.decoder.layers[index].parameters()), "one layer at a time"
        norm, head = source.final_norm(), source.tensor("lm_head.weight")
        for sample, hidden in zip(texts, stream.hidden, strict=True):
            found = source.logits(norm(hidden)[0], head)
            assert (found - whole(**sample).logits[0]).abs().max() < TOLERANCES["logits"]


def test_what_is_done_to_a_layer_is_forgotten(source: Path) -> None:
    found = layerwise_source(source, "cpu")
    with torch.no_grad(), found.layer(1) as layer:
        layer.mlp.up_proj.weight.zero_()
        layer.mlp.up_proj = torch.nn.Identity()
    with found.layer(1) as layer:
        assert torch.equal(layer.mlp.up_proj.weight, found.tensor("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize("method", ["", *ANTI_METHODS])
@pytest.mark.parametrize("label", LINEAR_LABELS)
def test_what_is_summed_up_is_what_loads(
    label: str, method: str, qwen2_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The summary's KL, which the layers were compared for one by one, is that of the directory as it loads."""
    target = tmp_path / "out"
    flags = (*KINDS[label], "--anti_method", method, "--scheme", "int8-token", "--disable_last_linear", "False")
    assert main(qwen2.ARCHITECTURE, convert_flags(qwen2_source, target, *flags)) == 0
    said = float(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("KL(")).split()[-1])
    model = qwen2.ARCHITECTURE.model_class.from_pretrained(target, dtype=torch.float32).eval()
    whole = AutoModelForCausalLM.from_pretrained(qwen2_source, dtype=torch.float32).eval()
    ids = tiny_tokenizer()(TEXTS[-1], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected, found = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (whole, model))
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert said == pytest.approx(kl, abs=2e-5, rel=1e-3) and kl < 0.5
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {module.LABEL for module in quantized} == {label}
    assert len(quantized) == (6 if label == "W8A8" else 7) * 3 + 1, "the recipe leaves down_proj of W8A8"


ENDS = {"W8A16", "W8A16_EMBEDDING"}
RECIPES = {
    "four-bit": ({"W4A16_DOUBLE", *ENDS}, "int8-token"),
    "eight-bit": (ENDS, "int8-token"),
    "w8a8-fp8": ({"W8A8_DYNAMIC", *ENDS}, "vllm-fp8-head"),
    "smallest": ({"W4A16_DOUBLE", *ENDS}, "octavo-4"),
    "w8a8-c8": ({"W8A8_DYNAMIC"}, "ascend-c8"),
    "ascend": ({"W8A8"}, "ascend-c8"),
    "ascend-fa": ({"W8A8"}, "ascend-fa"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main(llama3.ARCHITECTURE, convert_flags(source, target, "--preset", name)) == 0
    model = llama3.ARCHITECTURE.model_class.from_pretrained(target).eval()
    labels = {module.LABEL for module in model.modules() if isinstance(module, QuantizedLinear)}
    assert (labels, model.scheme.name) == RECIPES[name]
    assert torch.isfinite(model(random_ids(1, 9)).logits).all()


def test_flags_override_a_recipe(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    flags = ("--preset", "four-bit", "--group_size", "64", "--w_method", "MinMax", "--scheme", "octavo-8")
    assert main(llama3.ARCHITECTURE, convert_flags(source, target, *flags)) == 0
    description = json.loads((target / "quant_model_description.json").read_text())
    assert description["group_size"] == 64 and description["octavo_scheme"]["name"] == "octavo-8"


def test_flags_of_another_name_take_the_place_of_a_recipes(source: Path, tmp_path: Path) -> None:
    def parsed(*flags: str) -> ConvertRequest:
        return parse_request(llama3.ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags))

    found = parsed("--preset", "four-bit", "--quantization", "w8a8_dynamic", "--use_kvcache_quant", "True")
    assert (found.linear.label, found.linear.group_size, found.scheme, found.anti_method) == (
        "W8A8_DYNAMIC",
        0,
        "ascend-c8",
        "",
    )
    found = parsed("--preset", "ascend", "--scheme", "int8-token")
    assert (found.linear.label, found.scheme) == ("W8A8", "int8-token")
    assert parsed("--preset", "smallest", "--group_size", "64").linear.group_size == 64
    for same in ("--w_bit", "4"), ("--a_bit", "16"), ("--w_sym", "False"):
        found = parsed("--preset", "four-bit", *same).linear
        assert (found.label, found.group_size, found.symmetric, found.w_method) == ("W4A16_DOUBLE", 32, False, "GPTQ")
    found = parsed("--preset", "four-bit", "--w_sym", "True").linear
    assert (found.label, found.symmetric) == ("W4A16", True)
    for plain in ("--scale_bits", "16"), ("--format", "awq"), ("--target", "vllm-ascend"):
        found = parsed("--preset", "four-bit", *plain).linear
        assert (found.label, found.group_size, found.symmetric) == ("W4A16", 32, False)
    assert parsed("--preset", "four-bit", "--format", "gguf").linear.label == "W4A16_DOUBLE"
    assert parsed("--preset", "four-bit", "--w_bit", "8", "--a_bit", "8").linear.label == "W8A8"


def test_the_costliest_parts_stay_in_float_and_a_table_says_why(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--use_kvcache_quant", "True", "--fa_amp", "3")
    assert main(llama3.ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags)) == 0
    table = [line for line in capsys.readouterr().err.splitlines() if "model.layers." in line]
    names, errors = ([line.split()[column] for line in table] for column in (0, 1))
    chosen = [line.split()[0] for line in table if line.endswith("stays in float")]
    units: dict[str, float] = {}
    for name, error in zip(names, errors, strict=True):
        unit = re.sub(r"(q|k|v|gate|up)_proj$", lambda found: "qkv" if found[1] in "qkv" else "gate_up", name)
        units[unit] = units.get(unit, 0.0) + float(error)
    whole = list(units.values())[:-1]  # of the last, the table may show a part alone
    assert whole == sorted(whole, reverse=True) and chosen == names[: len(chosen)] and len(chosen) >= 3
    stored = quantized_tensors(tmp_path / "out")
    for name in chosen:
        is_attention = name.endswith("self_attn")
        assert (
            f"{name}.k_proj.kv_cache_scale" not in stored
            if is_attention
            else stored[f"{name}.weight"].is_floating_point()
        )


def test_linears_that_cost_most_for_their_size_are_in_int8(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--w_bit", "4", "--a_bit", "16", "--scale_bits", "8", "--scheme", "int8-token")
    reports = {}
    for most in (None, 5.5, 7.0):
        target = tmp_path / str(most)
        more = () if most is None else ("--w_bits_mean", str(most))
        reports[most] = converted(parse_request(llama3.ARCHITECTURE, convert_flags(source, target, *flags, *more)))
    counts = {most: [*report.linears.values()].count("W8A16") for most, report in reports.items()}
    assert counts[None] == 0 < counts[5.5] < counts[7.0] < 21
    assert all(most - 0.5 < reports[most].bits_per_weight <= most for most in (5.5, 7.0))
    model = llama3.ARCHITECTURE.model_class.from_pretrained(tmp_path / "5.5").eval()
    labels = {name: part.LABEL for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    assert labels == dict(reports[5.5].linears)
    assert main(llama3.ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags, "--w_bits_mean", "4.5")) == 1
    assert_one_error_line(capsys.readouterr().err, "--w_bits_mean 4.5: weights of W4A16_DOUBLE take", "give more")


def test_a_limit_that_is_kept(source: Path, tmp_path: Path) -> None:
    assert main(llama3.ARCHITECTURE, convert_flags(source, tmp_path / "out", "--max_kl", "1")) == 0


def test_methods_help_where_inputs_have_outliers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Channels of the norms a hundred times the others, with weights as much smaller: nothing else is changed."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, linears in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[::16] *= 100
                for linear in linears:
                    linear.weight[:, ::16] /= 100
    source = save_source(tmp_path / "source", model)

    def kl(method: str) -> float:
        flags = convert_flags(source, tmp_path / f"out {method}", "--anti_method", method)
        assert main(llama3.ARCHITECTURE, flags) == 0
        return float(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("KL(")).split()[-1])

    untreated = kl("")
    assert all(kl(method) < untreated / 5 for method in ANTI_METHODS)


def test_half_precision_sources(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", tiny_llama(attention_bias=True, mlp_bias=True).bfloat16())
    target = tmp_path / "out"
    assert main(llama3.ARCHITECTURE, convert_flags(source, target, "--anti_method", "m2", "--is_dynamic", "True")) == 0
    stored = quantized_tensors(target)
    assert stored["model.layers.0.mlp.up_proj.bias"].dtype == stored["model.norm.weight"].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    assert model.dtype == torch.bfloat16 and torch.isfinite(model(random_ids(1, 12)).logits).all()
