"""Every architecture: converts, loads without Octavo, computes what its codes say, is close to float."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from octavo.common.architecture import Architecture
from octavo.common.convert import api as conversion
from octavo.common.convert.calibration.streams import Stream
from octavo.common.convert.measure.fidelity import compare
from octavo.common.convert.pipeline import Conversion
from octavo.common.convert.source.checkpoint import layerwise_source
from octavo.common.runtime.decoder import list_experts, state_decoder
from octavo.models import gemma3, granite, llama3, mistral, phi3, qwen2, qwen3, qwen3_moe, smollm3

from ..support import convert_flags, files_below, random_ids, randomized, save_source, tiny_config
from ..tolerances import TOLERANCES
from .loading import load_without_octavo, save_expected
from .simulation import Simulation

pytestmark = pytest.mark.usefixtures("one_thread")

SLIDING = ["full_attention", "sliding_attention", "full_attention"]
FLAGS = {
    "c8": ("--use_kvcache_quant", "True"),
    "fa": ("--use_fa_quant", "True"),
    "dynamic": ("--is_dynamic", "True"),
    "float linears": ("--w_bit", "16", "--a_bit", "16", "--use_kvcache_quant", "True"),
    "w8a16, codebooks": ("--w_bit", "8", "--a_bit", "16", "--scheme", "kvquant-4"),
    "w8a16, bases": ("--w_bit", "8", "--a_bit", "16", "--scheme", "octavo-4c"),
    "w4a16, groups": ("--w_bit", "4", "--a_bit", "16", "--scheme", "octavo-4"),
    "offsets, by token": ("--anti_method", "m2", "--scheme", "int8-token"),
    "smooth and dynamic, fp8": ("--is_dynamic", "True", "--anti_method", "m4", "--scheme", "vllm-fp8"),
}
"""Every kind of linear and every kind of cache."""
CLOSE = ("c8", "fa", "dynamic", "float linears")
"""Those that are expected to be close to a float model of three layers."""
LOADED = ("c8", "fa", "offsets, by token")
"""Those whose directories have what no other has: modules for scales, and norms with a bias."""
Converted = Callable[[str, str], Path]


@dataclass(frozen=True)
class Kind:
    """An architecture, its native classes, and what its tiny config has that Llama's has not."""

    architecture: Architecture
    config: type
    model: type
    changes: dict[str, Any]

    def build(self) -> torch.nn.Module:
        """A tiny random float model."""
        torch.manual_seed(0)
        fields = tiny_config().to_diff_dict()
        known = {name: value for name, value in fields.items() if name not in ("model_type", "head_dim")}
        return randomized(self.model(self.config(**{**known, **self.changes})))

    def build_double(self) -> torch.nn.Module:
        """The same in float64, which not every way to compute merged experts serves."""
        model = self.build().double()
        if self.architecture.decoder.experts is not None:
            model.set_experts_implementation("eager")
        return model

    def build_listed(self) -> torch.nn.Module:
        """The same with the names of tensors on disk, where each expert lies on its own."""
        model = self.build()
        state_decoder(model, self.architecture.decoder)
        list_experts(model)
        return model


KINDS = {
    "llama3": Kind(llama3.ARCHITECTURE, transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "gemma3": Kind(
        gemma3.ARCHITECTURE,
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 100,
            "rope_parameters": None,
        },
    ),
    "granite": Kind(
        granite.ARCHITECTURE,
        transformers.GraniteConfig,
        transformers.GraniteForCausalLM,
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
        },
    ),
    "qwen2": Kind(
        qwen2.ARCHITECTURE,
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 11, "layer_types": SLIDING},
    ),
    "qwen2 tied, YaRN": Kind(
        qwen2.ARCHITECTURE,
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "qwen3": Kind(qwen3.ARCHITECTURE, transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 32}),
    "mistral": Kind(
        mistral.ARCHITECTURE,
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        {"sliding_window": 13, "head_dim": 16},
    ),
    "phi3": Kind(phi3.ARCHITECTURE, transformers.Phi3Config, transformers.Phi3ForCausalLM, {"sliding_window": 13}),
    "phi3 partial LongRoPE": Kind(
        phi3.ARCHITECTURE,
        transformers.Phi3Config,
        transformers.Phi3ForCausalLM,
        {
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 6,
                "long_factor": [1.5] * 6,
            },
        },
    ),
    "smollm3": Kind(
        smollm3.ARCHITECTURE,
        transformers.SmolLM3Config,
        transformers.SmolLM3ForCausalLM,
        {"no_rope_layers": [1, 0, 1], "attention_bias": True},
    ),
    "qwen3_moe": Kind(
        qwen3_moe.ARCHITECTURE,
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """`converted(name, way)`: an architecture under a set of flags, made once."""
    root = tmp_path_factory.mktemp("architectures")

    @cache
    def source(name: str) -> Path:
        return save_source(root / f"source of {name}", KINDS[name].build())

    @cache
    def convert(name: str, way: str) -> Path:
        target = root / f"{name}, {way}"
        assert conversion.main(KINDS[name].architecture, convert_flags(source(name), target, *FLAGS[way])) == 0
        return target

    return convert


def test_directories_load_without_octavo_bit_for_bit(converted: Converted, tmp_path: Path) -> None:
    rows = []
    for name, way in product(KINDS, LOADED):
        directory, expected = converted(name, way), tmp_path / f"{len(rows)}.safetensors"
        save_expected(KINDS[name].architecture.model_class.from_pretrained(directory), expected)
        rows.append((f"{name}, {way}", str(directory), str(expected)))
    found = load_without_octavo(rows, tmp_path)
    assert found == {name: [True, True, True, "torch.float32"] for name, *_ in rows}


@pytest.mark.parametrize("way", FLAGS)
@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_a_simulation(name: str, way: str, converted: Converted) -> None:
    kind, ids = KINDS[name], random_ids(2, 90)
    quantized = kind.architecture.model_class.from_pretrained(converted(name, way), dtype=torch.float64).eval()
    with torch.inference_mode():
        found, plain = quantized(ids).logits, kind.build_double()(ids).logits
    wanted = Simulation(kind.build_listed(), quantized).logits(ids)
    error, distance = ((x - wanted).square().mean().sqrt() / wanted.std() for x in (found, plain))
    # A wrong scale, channel or layer is as far off as quantization itself.
    assert error < min(0.3 * distance, TOLERANCES["simulation rmse float64"]), (error, distance)


@pytest.mark.parametrize("way", CLOSE)
@pytest.mark.parametrize("name", KINDS)
def test_logits_stay_close_to_the_float_model(name: str, way: str, converted: Converted) -> None:
    kind, ids = KINDS[name], random_ids(2, 40)
    quantized = kind.architecture.model_class.from_pretrained(converted(name, way)).eval()
    with torch.inference_mode():
        expected = kind.build()(ids).logits
        error = (quantized(ids).logits - expected).square().mean().sqrt() / expected.std()
    assert error < TOLERANCES["rmse of a tiny model, " + ("C8" if way == "float linears" else "W8A8")]


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_conversion_sees_the_states_and_logits_of_the_float_model(name: str, tmp_path: Path) -> None:
    native, ids = KINDS[name].build().eval(), random_ids(1, 40)
    source = layerwise_source(save_source(tmp_path / "source", native), "cpu")
    stream = Stream.of(source, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    expected = native(ids, output_hidden_states=True)
    for index, states in enumerate(expected.hidden_states[:-1]):
        assert torch.allclose(stream.hidden[0], states, rtol=1e-4, atol=1e-4), index
        with source.layer(index) as layer:
            stream.hidden = stream.through(layer, index)
    found = source.logits(source.final_norm()(stream.hidden[0])[0], source.tensor("lm_head.weight"))
    assert torch.allclose(found, expected.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_fidelity_of_dynamic_linears(name: str, converted: Converted) -> None:
    kind = KINDS[name]
    stock, quantized = kind.build(), kind.architecture.model_class.from_pretrained(converted(name, "dynamic")).eval()
    samples = [random_ids(1, 100, seed=seed) for seed in range(3)]
    found = compare(lambda ids: stock(ids).logits, lambda ids: quantized(ids).logits, samples)
    print(found)
    assert 0 < found.kl < TOLERANCES["kl of a tiny model, W8A8 dynamic"]


@pytest.mark.parametrize("name", KINDS)
def test_a_stopped_conversion_goes_on_to_the_same_bytes(
    name: str, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the first layer, with a scheme whose codebooks are of the whole model."""
    expected, target = converted(name, "w8a16, codebooks"), tmp_path / "out"
    flags = convert_flags(expected.parent / f"source of {name}", target, *FLAGS["w8a16, codebooks"])
    layer, done = Conversion.layer, []

    def interrupted(conversion: Conversion, index: int) -> dict[str, torch.Tensor]:
        if done == [0]:
            raise KeyboardInterrupt
        done.append(index)
        return layer(conversion, index)

    monkeypatch.setattr(Conversion, "layer", interrupted)
    assert conversion.main(KINDS[name].architecture, flags) == 130
    monkeypatch.setattr(Conversion, "layer", lambda self, index: done.append(index) or layer(self, index))
    assert conversion.main(KINDS[name].architecture, [*flags, "--resume"]) == 0
    assert done == [0, 1, 2] and files_below(target) == files_below(expected)
    for file in files_below(target):
        assert (target / file).read_bytes() == (expected / file).read_bytes(), file


def test_architectures_convert_only_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_source(tmp_path / "source", KINDS["qwen3"].build())
    assert conversion.main(qwen2.ARCHITECTURE, convert_flags(source, tmp_path / "out", *FLAGS["c8"])) == 1
    assert "qwen3" in capsys.readouterr().err


def test_biases_travel(converted: Converted) -> None:
    description = json.loads((converted("qwen2", "c8") / "quant_model_description.json").read_text())
    assert description["model.layers.0.self_attn.k_proj.bias"] == "FLOAT"
    assert description["model.layers.0.self_attn.k_proj.quant_bias"] == "W8A8"
