"""Configs that a plan reads, and those that it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from octavo import OctavoError
from octavo.planning.model import read_model

LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 320}


def written(directory: Path, **settings: Any) -> Path:
    """A config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**LLAMA, **settings}))
    return file


def test_a_directory_and_the_file_itself_are_the_same_model(tmp_path: Path) -> None:
    file = written(tmp_path, dtype="bfloat16")
    for given in (file, tmp_path):
        model = read_model(str(given))
        assert model.architecture.name == "llama3" and str(model.dtype) == "torch.bfloat16" and model.is_known


def test_a_multimodal_model_is_planned_by_its_decoder(tmp_path: Path) -> None:
    text = {**LLAMA, "model_type": "gemma3_text", "head_dim": 16, "num_key_value_heads": 2}
    model = read_model(str(written(tmp_path, model_type="gemma3", text_config=text)))
    assert model.architecture is None and model.decoder_config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"octavo": {"scheme": "int8-token"}}, "is converted already; plan for the float model"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"model_type": "none such", "hidden_size": None}, "says no hidden_size, which every decoder has"),
        ({"model_type": "none such", "layer_types": ["linear_attention"] * 2}, "layers of linear_attention have no"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match=line):
        read_model(str(written(tmp_path, **settings)))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match=r"holds no config.json; give a directory that does, or a hub id"):
        read_model(str(tmp_path))
    with pytest.raises(OctavoError, match=r"no such directory"):
        read_model(str(tmp_path / "none"))
