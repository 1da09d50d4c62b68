"""`octavo info`: what a directory is, of conversions, of models as they came, and of what others quantized."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from octavo import kv_bytes_per_token, load_scheme
from octavo.__main__ import main
from octavo.common.runtime.version import VERSION

from ...common.convert.source.coded_layouts import PASSED
from ...common.convert.source.coded_layouts import converted as convert_coded
from ...common.convert.source.coded_sources import write_coded
from ...support import assert_one_error_line, edit_json, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def json_of(model: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What is said as data."""
    capsys.readouterr()
    assert main(["info", model, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def told(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], list[str]]:
    """What is said as data, and in lines."""
    data = json_of(str(directory), capsys)
    assert main(["info", str(directory)]) == 0
    return data, capsys.readouterr().out.splitlines()


def test_a_converted_directory(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = converted("--w_bit", "8", "--a_bit", "16", "--group_size", "32", "--scheme", "int8-token")
    data, lines = told(directory, capsys)
    assert (data["is"], data["written_by"], data["architecture"]) == ("converted", f"Octavo {VERSION}", "llama3")
    assert data["linears"] == {"W8A16 in groups of 32": 21, "float": 1}
    assert (data["scheme"], data["key"]) == ("int8-token", "int8 per token")
    assert data["kv_bytes_per_token"] == kv_bytes_per_token(tiny_config(), load_scheme("int8-token"), 4)
    assert data["float_kv_bytes_per_token"] == 768
    assert data["bytes_on_disk"] == sum(file.stat().st_size for file in directory.iterdir())
    assert data["formats"] and "gguf" in data["refused_formats"]
    others = data["formats_with_another_cache"]
    assert others["gguf"] == "--scheme llamacpp-q8_0" and others["fastdeploy"] == "--scheme ascend-c8 --statistics FILE"
    assert "modelopt" not in others, "which takes no such linears"
    assert any(line.startswith("with another cache   gguf (--scheme llamacpp-q8_0); ") for line in lines)
    assert "linears              21 in W8A16 in groups of 32; 1 in float" in lines
    assert data["bits_per_weight"] == 8 + 2 * 32 / 32, "scales and zero points are in float32"
    assert "bits a weight        10.00 in layers" in lines
    command = lines[-1].split()[1:]
    assert command[0] == "rewrite"
    rewrite = ["rewrite", str(directory), "--format", data["formats"][0], "--save_directory", str(tmp_path / "out")]
    assert main(rewrite) == 0, "a format that is named is one that it fits"
    rewrite = ["rewrite", str(directory), "--format", "gguf", "--save_directory", str(tmp_path / "gguf")]
    assert main([*rewrite, *others["gguf"].split()]) == 0, "with the cache that is named beside it, too"


def test_layers_that_are_stored_otherwise_are_named(
    converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = converted("--scheme", "octavo-4c")
    data, lines = told(directory, capsys)
    stated = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    ((sharp, _),) = load_scheme(stated["octavo"]["scheme"]).layers
    assert data["key"] == f"int4 per channel x 64, affine; in layers {sharp} int8 per channel x 64, affine"
    assert f"K                    {data['key']}" in lines
    assert data["value"] == "int4 per token, gaussian levels"


def test_bits_of_a_weight_are_counted(converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    directory = converted("--quantization", "w4a16_double", "--embeddings", "int8")
    data, lines = told(directory, capsys)
    tensors = {name: load_file(file)[name] for file in directory.glob("*.safetensors") for name in load_file(file)}
    layers = sum(part.nbytes for name, part in tensors.items() if "_proj." in name and not name.endswith("bias"))
    count = sum(2 * part.numel() for name, part in tensors.items() if name.endswith("_proj.weight"))
    assert data["bits_per_weight"] == pytest.approx(8 * layers / count) and 4.5 < data["bits_per_weight"] < 5.1
    assert any(line.startswith("bits a weight") and "in embedding and last linear" in line for line in lines)
    assert "gguf" in data["formats"] and "--scale_bits 16" in data["refused_formats"]["compressed-tensors"]


@pytest.mark.parametrize("name", ["gptq, act-order", "fp8 in blocks"])
def test_codes_that_no_format_holds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Groups that act-order mixed up, and scales of blocks: rewriting refuses them, whatever the format."""
    write_coded(tmp_path / "source", PASSED[name])
    directory = convert_coded(tmp_path / "source", tmp_path / "out", "--scheme", "int8-token")
    data, lines = told(directory, capsys)
    assert data["formats"] == [] and all("Octavo alone reads" in why for why in data["refused_formats"].values())
    assert "formats it fits      its own alone" in lines
    assert main(["rewrite", str(directory), "--format", "gptq"]) == 1
    assert_one_error_line(capsys.readouterr().err, data["refused_formats"]["gptq"])


def test_a_model_as_it_came(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, lines = told(source, capsys)
    assert (data["is"], data["kv_bytes_per_token"]) == ("not converted", 768)
    assert lines[0] == "it is                not converted" and lines[-2].startswith("  octavo convert '")


def test_what_another_tool_quantized(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source, tmp_path / "tiny")
    config = tmp_path / "tiny" / "config.json"
    edit_json(config, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    data, lines = told(tmp_path / "tiny", capsys)
    assert data["linears"] == "in the codes of awq, 4 bits, groups of 128" and data["refusal"] is None
    assert lines[-1] == f"  octavo convert {tmp_path / 'tiny'}"
    edit_json(config, quantization_config={"quant_method": "hqq"})
    data, lines = told(tmp_path / "tiny", capsys)
    assert "quantized by hqq; Octavo reads awq" in data["refusal"] and lines[-1].startswith("not served")


def test_another_architecture_is_told_the_nearest(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "tiny")
    edit_json(tmp_path / "tiny" / "config.json", model_type="olmo9", clip_qkv=8)
    data, _ = told(tmp_path / "tiny", capsys)
    assert "comes nearest to 'llama', which has no clip_qkv" in data["refusal"]
    assert main(["convert", str(tmp_path / "tiny")]) == 1
    parts = ("model_type is 'olmo9'", "it has gemma3_text, granite, llama", "nearest to 'llama'", "CONTRIBUTING.md")
    assert_one_error_line(capsys.readouterr().err, *parts)
    edit_json(tmp_path / "tiny" / "config.json", **dict.fromkeys(tiny_config().to_dict(), None), n_embd=8)
    edit_json(tmp_path / "tiny" / "config.json", model_type="olmo9")
    assert "nearest" not in told(tmp_path / "tiny", capsys)[0]["refusal"]


def test_a_damaged_conversion(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(converted("--use_kvcache_quant", "True"), tmp_path / "damaged")
    edit_json(tmp_path / "damaged" / "quant_model_description.json", foo="FLOAT")
    capsys.readouterr()
    assert main(["info", str(tmp_path / "damaged")]) == 1
    assert_one_error_line(capsys.readouterr().err, "foo", "not stored")


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[list[str]]]:
    """A snapshot of someone/tiny in transformers' cache, of its JSON alone, and what is asked of the hub."""
    asked: list[list[str]] = []
    snapshot = tmp_path / "snapshot"
    shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append([name, *allow_patterns])
        return str(snapshot)

    monkeypatch.setattr("octavo.common.convert.source.checkpoint.snapshot_download", download)
    return snapshot, asked


def test_a_hub_id_is_looked_up_by_its_json_alone(
    hub: tuple[Path, list[list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not in the cache yet is named, with what fetches it."""
    snapshot, asked = hub
    assert main(["info", "someone/tiny"]) == 0
    assert asked == [["someone/tiny", "*.json"]]
    said = capsys.readouterr().out
    assert "octavo convert someone/tiny" in said and "not in the cache     model.safetensors; hf download" in said
    assert "\nin the cache " in said and "on the disk" not in said, "what there is of it, which the hub has more of"
    parts = [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
    index = {"weight_map": {f"layer.{number}.weight": part for number, part in enumerate(parts)}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / parts[1]).touch()
    assert main(["info", "someone/tiny"]) == 0
    way_out = "hf download someone/tiny fetches what is not in transformers' cache"
    assert f"{parts[0]} (with 1 other); {way_out}\n" in capsys.readouterr().out
    data, lines = told(snapshot, capsys)
    assert data["missing_files"] == [parts[0], parts[2]]
    assert any(line.endswith("; copy the checkpoint again, or save the model as safetensors") for line in lines)


def test_a_converted_hub_id_needs_its_weights(
    hub: tuple[Path, list[list[str]]], converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their headers say what it is."""
    directory = converted("--use_kvcache_quant", "True")
    for file in directory.glob("*.json"):
        shutil.copy(file, hub[0])
    capsys.readouterr()
    assert main(["info", "someone/tiny"]) == 1
    assert_one_error_line(capsys.readouterr().err, "someone/tiny: is converted", "its weights, too; hf download some")
    for file in directory.iterdir():
        shutil.copy(file, hub[0])
    assert main(["info", "someone/tiny"]) == 0
    said = capsys.readouterr().out
    assert "not in the cache" not in said and "\nin the cache " in said
    name = json_of("someone/tiny", capsys)["formats"][0]
    assert f"octavo rewrite {hub[0]} --format {name} --save_directory tiny-{name}\n" in said
