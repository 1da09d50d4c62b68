"""Every architecture beside Llama: converts, loads without Octavo, and stays close to its float model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from octavo.common.architecture import Architecture
from octavo.common.convert import api as conversion
from octavo.models import gemma3, mistral, qwen2, qwen3, qwen3_moe

from ..support import convert_flags, random_ids, randomized, save_source, tiny_config
from ..tolerances import TOLERANCES
from .loading import load_without_octavo, save_expected

pytestmark = pytest.mark.usefixtures("one_thread")

SLIDING = ["full_attention", "sliding_attention", "full_attention"]
FLAGS = {
    "c8": ("--use_kvcache_quant", "True"),
    "fa": ("--use_fa_quant", "True"),
    "dynamic": ("--is_dynamic", "True", "--use_kvcache_quant", "True"),
    "float linears": ("--w_bit", "16", "--a_bit", "16", "--use_kvcache_quant", "True"),
}


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


KINDS = {
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
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Every architecture under every set of flags."""
    root = tmp_path_factory.mktemp("architectures")
    made: dict[str, dict[str, Path]] = {}
    for name, kind in KINDS.items():
        model = kind.build()
        source = save_source(root / f"source of {name}", model)
        for way, flags in FLAGS.items():
            target = root / f"{name}, {way}"
            assert conversion.main(kind.architecture, convert_flags(source, target, *flags)) == 0
            made.setdefault(name, {})[way] = target
    return made


def test_every_directory_loads_without_octavo_bit_for_bit(
    converted: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    rows = []
    for name, directories in converted.items():
        for way, directory in directories.items():
            expected = tmp_path / f"{len(rows)}.safetensors"
            save_expected(KINDS[name].architecture.model_class.from_pretrained(directory), expected)
            rows.append((f"{name}, {way}", str(directory), str(expected)))
    found = load_without_octavo(rows, tmp_path)
    assert found == {name: [True, True, True, "torch.float32"] for name, *_ in rows}


@pytest.mark.parametrize("way", FLAGS)
@pytest.mark.parametrize("name", KINDS)
def test_logits_stay_close_to_the_float_model(name: str, way: str, converted: dict[str, dict[str, Path]]) -> None:
    kind, ids = KINDS[name], random_ids(2, 40)
    quantized = kind.architecture.model_class.from_pretrained(converted[name][way]).eval()
    with torch.inference_mode():
        expected = kind.build()(ids).logits
        error = (quantized(ids).logits - expected).square().mean().sqrt() / expected.std()
    assert error < TOLERANCES["rmse of a tiny model, " + ("C8" if way == "float linears" else "W8A8")]


def test_architectures_convert_only_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_source(tmp_path / "source", KINDS["qwen3"].build())
    assert conversion.main(qwen2.ARCHITECTURE, convert_flags(source, tmp_path / "out", *FLAGS["c8"])) == 1
    assert "qwen3" in capsys.readouterr().err


def test_biases_travel(converted: dict[str, dict[str, Path]]) -> None:
    description = json.loads((converted["qwen2"]["c8"] / "quant_model_description.json").read_text())
    assert description["model.layers.0.self_attn.k_proj.bias"] == "FLOAT"
    assert description["model.layers.0.self_attn.k_proj.quant_bias"] == "W8A8"
