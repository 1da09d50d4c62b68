"""Planned tensors of weights beside those that a conversion writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from octavo import ConvertRequest, OctavoError, convert
from octavo.common.architecture import Architecture, load_architecture
from octavo.common.convert.flags import recipe_fields
from octavo.common.convert.presets import RECIPES
from octavo.common.convert.request import LINEAR_NAMES
from octavo.common.convert.source.config import load_source_config
from octavo.common.runtime.checkpoint.files import read_json
from octavo.planning.weights import Weights, converted_weights, float_weights, stored_dtype

from ...support import TEXTS, save_source, tiny_llama

LLAMA = load_architecture("llama3")
REQUESTS: dict[str, dict[str, Any]] = {
    **{name: {"linear": name, "scheme": "int8-token"} for name in LINEAR_NAMES},
    **{name: recipe_fields(name) for name in RECIPES},
    "head too": {"linear": "w8a8_dynamic", "float_head": False, "scheme": "ascend-c8"},
    "offsets": {"linear": "w8a8", "anti_method": "m2"},
    "codebooks": {"linear": None, "scheme": "kvquant-3"},
    "fa": {"linear": "w4a16", "scheme": "ascend-fa"},
}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def written(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape by name of all tensors of a directory."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def planned(weights: Weights) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same of what is planned."""
    return {name: (header.dtype, header.shape) for name, header in weights.headers.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Directories of a tiny Llama, by whether its last linear is its embedding."""
    work = tmp_path_factory.mktemp("sources")
    changes = {"num_hidden_layers": 1}
    return {
        tied: save_source(work / str(tied), tiny_llama(tie_word_embeddings=tied, **changes)) for tied in (True, False)
    }


def plan_of(source: Path, fields: dict[str, Any]) -> Weights:
    """What is planned of a directory, by its config.json."""
    config, request = load_source_config(source), ConvertRequest(source, "nowhere", **fields)
    return converted_weights(config, stored_dtype(config), LLAMA, request, read_json(source / "config.json"))


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in REQUESTS), ("float", True), ("smallest", True), ("head too", True)]
)
def test_planned_tensors_are_those_that_a_conversion_writes(
    name: str, tied: bool, sources: dict[bool, Path], tmp_path: Path
) -> None:
    fields = REQUESTS[name]
    convert(ConvertRequest(sources[tied], tmp_path / "out", calibration=TEXTS[:3], **fields))
    weights = plan_of(sources[tied], fields)
    assert planned(weights) == written(tmp_path / "out")
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < files - weights.nbytes < 300 * len(weights.headers)


@pytest.mark.parametrize("tied", [True, False])
def test_planned_floats_are_the_checkpoint(tied: bool, sources: dict[bool, Path]) -> None:
    config = load_source_config(sources[tied])
    weights = float_weights(config, stored_dtype(config), LLAMA)
    assert planned(weights) == written(sources[tied])
    assert weights.is_tied == tied and weights.embedding in weights.headers


def stated_config(architecture: Architecture, **sizes: Any) -> PreTrainedConfig:
    """A tiny config of an architecture."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    widths = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings = {**widths, **heads, "pad_token_id": None, **sizes}
    return architecture.model_class.config_class(**settings)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gemma3", "qwen3_moe"])
def test_other_architectures_are_planned_too(name: str) -> None:
    architecture = load_architecture(name)
    config = stated_config(architecture, **(EXPERTS if "moe" in name else {}))
    request = ConvertRequest("tiny", "nowhere", linear="w8a16")
    plain = float_weights(config, torch.bfloat16, architecture)
    coded = converted_weights(config, torch.bfloat16, architecture, request, {"dtype": "bfloat16"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert plain.nbytes == sum(parameter.nbytes for parameter in model.parameters())
    assert coded.is_quantized and plain.nbytes / 2 < coded.nbytes < plain.nbytes


def test_a_kind_of_linears_that_does_not_fit_is_refused_with_the_way_out() -> None:
    config = stated_config(LLAMA, intermediate_size=100)
    request = ConvertRequest("tiny", "nowhere", linear="w4a16")
    with pytest.raises(OctavoError, match=r"mlp.down_proj: .*100.* leave it in float"):
        converted_weights(config, torch.bfloat16, LLAMA, request, {})
