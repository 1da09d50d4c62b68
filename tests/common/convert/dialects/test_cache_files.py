"""Formats of the cache alone, and ModelOpt's: names, dtypes, shapes and values as their readers state them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from octavo.common.convert.dialects.directory import OctavoDirectory
from octavo.common.convert.dialects.rewriting import RewriteRequest, main, rewrite

from ....support import assert_one_error_line

pytestmark = pytest.mark.usefixtures("one_thread")


def written(path: Path, target: Path, name: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    lines = rewrite(RewriteRequest(path, target, name))
    return load_file(target / "model.safetensors"), lines


def test_scales_of_onnxruntime_are_ours(converted: Callable[..., Path], tmp_path: Path) -> None:
    path, target = converted("--use_kvcache_quant", "True"), tmp_path / "out"
    _, lines = written(path, target, "onnxruntime-genai")
    said = json.loads((target / "kv_cache_scales.json").read_text())
    assert said["layer_ids"] == [0, 1, 2] and said["qmax"] == 128
    for index, layer in enumerate(OctavoDirectory(path).scales()):
        assert torch.equal(torch.tensor(said["scales"]["k_scales"][index]), layer.key[0].flatten())
        assert torch.equal(torch.tensor(said["scales"]["v_scales"][index]), layer.value[0].flatten())
    assert any("kv_cache_quant_scheme=int8_per_channel" in line and "kv_cache_scale_file=" in line for line in lines)
    _, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())


def test_largest_values_of_fastdeploy_are_127_scales(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("--use_kvcache_quant", "True")
    stored, _ = written(path, tmp_path / "out", "fastdeploy")
    layer = OctavoDirectory(path).scales()[2]
    name = "model.layers.2.self_attn.cachek_matmul.activation_scale"
    assert torch.equal(stored[name], layer.key[0].flatten() * 127)
    assert stored["model.layers.2.self_attn.cachev_matmul.activation_scale"].shape == (32,)


def test_modelopt_has_fp8_linears_and_scales_of_the_cache(converted: Callable[..., Path], tmp_path: Path) -> None:
    path, target = converted("--quantization", "fp8", "--scheme", "vllm-fp8"), tmp_path / "out"
    stored, lines = written(path, target, "modelopt")
    said = json.loads((target / "hf_quant_config.json").read_text())["quantization"]
    assert said == {
        "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"],
    }  # fmt: skip
    directory = OctavoDirectory(path)
    layer, linear = directory.scales()[0], directory.linear("model.layers.0.mlp.up_proj")
    assert stored["model.layers.0.self_attn.k_proj.k_scale"].item() == layer.key[0].item()
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].shape == (128,)
    found = (
        stored["model.layers.0.mlp.up_proj.weight"].float() * stored["model.layers.0.mlp.up_proj.weight_scale"][:, None]
    )
    assert torch.equal(found, linear.float_weight())
    assert any("vllm serve" in line and "--quantization modelopt" in line for line in lines)


REFUSED = {
    "modelopt": (("--is_dynamic", "True"), "the format says fp8 alone"),
    "onnxruntime-genai": (("--scheme", "octavo-4"), "give --scheme ascend-c8 --statistics FILE"),
    "fastdeploy": (("--scheme", "vllm-fp8"), "the format says int8 channel alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_cannot_say_is_refused(
    name: str, converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, reason = REFUSED[name]
    path = converted(*flags)
    capsys.readouterr()
    assert main(["--model_path", str(path), "--save_directory", str(tmp_path / "out"), "--format", name]) == 1
    assert_one_error_line(capsys.readouterr().err, f"--format {name}:", reason)
