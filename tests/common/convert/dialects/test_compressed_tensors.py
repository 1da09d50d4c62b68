"""compressed-tensors: what we write, read by that library and by transformers' loader, against our own class."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from octavo.common.convert.api import main as convert_main
from octavo.common.convert.dialects.directory import OctavoDirectory
from octavo.common.convert.dialects.layouts.compressed_tensors import pack_signed, pack_zero_points
from octavo.common.convert.dialects.rewriting import RewriteRequest, main, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ....support import assert_one_error_line, convert_flags, quantized_tensors, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")

LINEARS = {
    "static": (),
    "dynamic": ("--is_dynamic", "True"),
    "w8a16": ("--quantization", "w8a16"),
    "w8a16 zeros": ("--quantization", "w8a16", "--group_size", "32", "--w_sym", "False"),
    "w4a16": ("--quantization", "w4a16", "--group_size", "32"),
    "w4a16 per channel": ("--quantization", "w4a16", "--group_size", "0"),
    "w4a16 zeros": ("--quantization", "w4a16", "--w_sym", "False"),
    "fp8": ("--quantization", "fp8"),
    "fp8 static": ("--quantization", "wfp8afp8"),
}
UNLIKE_OURS = {"dynamic": 0.1, "static": 0.02, "fp8": 0.1, "fp8 static": 0.1}
"""Largest mean difference of logits, in their standard deviation: theirs fake-quantizes inputs, those of int8 per token
to absmax / 127.5; elsewhere only sums are rounded otherwise."""
ROUNDING = 1e-4


def rewritten(path: Path, target: Path, **options: object) -> tuple[Path, list[str]]:
    return target, rewrite(RewriteRequest(path, target, "compressed-tensors", **options))


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_theirs(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (12, 40), dtype=torch.int8)
    assert torch.equal(pack_signed(codes, bits)["weight_packed"], pack_to_int32(codes, bits))
    assert torch.equal(pack_zero_points(codes[:7], bits), pack_to_int32(codes[:7], bits, packed_dim=0))


@pytest.mark.parametrize("name", LINEARS)
def test_a_round_trip_changes_no_bit(name: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    """Ours to the format, and that as the source of a conversion: all that is stored of linears is what it was."""
    path = converted(*LINEARS[name])
    target, _ = rewritten(path, tmp_path / "there")
    assert convert_main(ARCHITECTURE, convert_flags(target, tmp_path / "back")) == 0
    before, after = quantized_tensors(path), quantized_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.float(), after[key].float()) for key, tensor in before.items())
    models = (ARCHITECTURE.model_class.from_pretrained(part, dtype=torch.float32) for part in (path, tmp_path / "back"))
    ids = random_ids(1, 20)
    with torch.inference_mode():
        expected, found = (model.eval()(ids).logits for model in models)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", [name for name in LINEARS if "zeros" not in name])
def test_transformers_loads_the_same_model(name: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted(*LINEARS[name])
    target, _ = rewritten(path, tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    for module in ours.modules():
        if hasattr(module, "cpu_activations"):
            module.cpu_activations = "float"
    ids = random_ids(1, 24)
    with torch.no_grad():
        expected, found = ours(ids).logits, theirs(ids).logits
    assert (found - expected).abs().mean() < UNLIKE_OURS.get(name, ROUNDING) * expected.std()


@pytest.mark.parametrize("name", ["w8a16 zeros", "w4a16 zeros"])
def test_zero_points_are_read_by_their_library(name: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    """By the function that decompresses a layer: as a whole, transformers 5.24 makes room for zero points that are not
    packed, which theirs are."""
    path = converted(*LINEARS[name])
    target, _ = rewritten(path, tmp_path / "out")
    stored, directory = load_file(target / "model.safetensors"), OctavoDirectory(path)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    for module in directory.form.linears:
        parts = {part.rpartition(".")[2]: t for part, t in stored.items() if part.rpartition(".")[0] == module}
        scheme = next(group for group in groups if group.targets == ["Linear"] or module in group.targets)
        found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.allclose(found.float(), directory.linear(module).float_weight(), rtol=1e-6)


def test_scales_of_the_cache_are_ours_to_the_bit(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("--scheme", "vllm-fp8", "--is_dynamic", "True")
    target, lines = rewritten(path, tmp_path / "out")
    stored, scales = load_file(target / "model.safetensors"), OctavoDirectory(path).scales()
    for index, layer in enumerate(scales):
        attention = f"model.layers.{index}.self_attn"
        assert torch.equal(stored[f"{attention}.k_scale"], layer.key[0].flatten())
        assert torch.equal(stored[f"{attention}.v_scale"], layer.value[0].flatten())
        assert torch.equal(stored[f"{attention}.q_scale"], layer.query.flatten())
    scheme = json.loads((target / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["type"], scheme["strategy"], scheme["dynamic"]) == ("float", "tensor", False)
    assert any("vllm serve" in line and "--kv-cache-dtype fp8" in line for line in lines)


def test_int8_per_channel_is_huaweis(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("--use_kvcache_quant", "True")
    target, lines = rewritten(path, tmp_path / "out")
    stored = load_file(target / "model.safetensors")
    layer = OctavoDirectory(path).scales()[1]
    assert torch.equal(stored["model.layers.1.self_attn.k_scale"], layer.key[0].flatten())
    assert any("Huawei" in line for line in lines)


def test_what_vllm_quantizes_by_itself_needs_a_flag_alone(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("--scheme", "int8-token")
    target, lines = rewritten(path, tmp_path / "out")
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] is None
    assert "octavo" not in config and "auto_map" not in config
    assert any("--kv-cache-dtype int8_per_token_head" in line for line in lines)


def test_statistics_give_a_cache_that_the_directory_has_not(converted: Callable[..., Path], tmp_path: Path) -> None:
    statistics = tmp_path / "statistics.safetensors"
    path = converted("--scheme", "octavo-4", "--save_statistics", str(statistics))
    target, _ = rewritten(path, tmp_path / "b", scheme="vllm-fp8-head", statistics=statistics)
    stored = load_file(target / "model.safetensors")
    assert stored["model.layers.0.self_attn.k_scale"].shape == (2, 1, 1)
    assert stored["model.layers.0.self_attn.q_scale"].shape == (4, 1, 1)


def test_embeddings_in_int8_are_written_in_float(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("--embeddings", "int8")
    target, lines = rewritten(path, tmp_path / "out")
    assert any("model.embed_tokens and lm_head" in line for line in lines)
    stored, directory = load_file(target / "model.safetensors"), OctavoDirectory(path)
    expected = directory.linear("model.embed_tokens").float_weight()
    assert torch.equal(stored["model.embed_tokens.weight"], expected)


REFUSED = {
    "outliers in float": (("--quantization", "w8a8_mixed"), "convert with --is_dynamic True"),
    "scales in 8 bits": (("--quantization", "w4a16_double"), "convert with --scale_bits 16"),
    "shifted inputs": (("--anti_method", "m2"), "has a bias that the architecture has not"),
    "half a unit": (("--disable_names", "*.q_proj", "*.down_proj"), "are not quantized alike"),
    "a window": (("--scheme", "octavo-4"), "--scheme vllm-fp8 --statistics FILE"),
    "heads": (("--use_fa_quant", "True"), "the format says fp8 per tensor or head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_cannot_say_is_refused(
    name: str, converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, reason = REFUSED[name]
    path, target = converted(*flags), tmp_path / "out"
    capsys.readouterr()
    code = main(["--model_path", str(path), "--format", "compressed-tensors", "--save_directory", str(target)])
    assert code == 1 and not target.exists()
    assert_one_error_line(capsys.readouterr().err, "--format compressed-tensors:", reason)
