"""AWQ and GPTQ: what we write is read back as a source, to the same logits, and its words are what the formats say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo import OctavoError
from octavo.common.convert.api import main as convert_main
from octavo.common.convert.dialects.directory import OctavoDirectory
from octavo.common.convert.dialects.rewriting import RewriteRequest, main, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ....support import assert_one_error_line, convert_flags, quantized_tensors, random_ids, save_source, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

W4, W8 = ("--quantization", "w4a16", "--group_size", "32"), ("--quantization", "w8a16", "--group_size", "32")
KINDS = {
    "awq": ("awq", W4),
    "awq with zeros": ("awq", (*W4, "--w_sym", "False")),
    "gptq": ("gptq", W4),
    "gptq with zeros": ("gptq", (*W4, "--w_sym", "False")),
    "gptq of 8 bits": ("gptq", W8),
    "gptq of 8 bits with zeros": ("gptq", (*W8, "--w_sym", "False")),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_round_trip_changes_no_bit(name: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    """Ours to the format, and that as the source of a conversion: all that is stored of linears is what it was."""
    dialect, flags = KINDS[name]
    path = converted(*flags)
    rewrite(RewriteRequest(path, tmp_path / "there", dialect))
    assert convert_main(ARCHITECTURE, convert_flags(tmp_path / "there", tmp_path / "back")) == 0
    before, after = quantized_tensors(path), quantized_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    models = (ARCHITECTURE.model_class.from_pretrained(part, dtype=torch.float32) for part in (path, tmp_path / "back"))
    ids = random_ids(1, 20)
    with torch.inference_mode():
        expected, found = (model.eval()(ids).logits for model in models)
    assert torch.equal(expected, found)


def test_config_and_tensors_are_those_of_the_format(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted(*W4, "--disable_names", "*.down_proj")
    for dialect in ("awq", "gptq"):
        lines = rewrite(RewriteRequest(path, tmp_path / dialect, dialect))
        assert any("vllm serve" in line for line in lines)
        config = json.loads((tmp_path / dialect / "config.json").read_text())
        stored = load_file(tmp_path / dialect / "model.safetensors")
        assert config["architectures"] == ["LlamaForCausalLM"] and "octavo" not in config
        quantized = config["quantization_config"]
        assert (quantized["quant_method"], quantized["bits"], quantized["group_size"]) == (dialect, 4, 32)
        down, up = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
        assert f"{down}.weight" in stored and f"{up}.weight" not in stored
        left_out = quantized.get("modules_to_not_convert") or list(quantized["dynamic"])
        assert any(down.replace(".", "\\.") in name or down == name for name in left_out)
        assert tuple(stored[f"{up}.qweight"].shape) == ((64, 16) if dialect == "awq" else (8, 128))


def test_zeros_of_gptq_have_no_command_of_vllm(converted: Callable[..., Path], tmp_path: Path) -> None:
    lines = rewrite(RewriteRequest(converted(*W4, "--w_sym", "False"), tmp_path / "out", "gptq"))
    assert not any("vllm serve" in line for line in lines)
    assert any("vLLM 0.32, SGLang 0.5.23 and LMDeploy 0.18 take no zeros in this layout" in line for line in lines)


def test_a_zero_that_is_the_lowest_code_takes_the_second_version(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted(*W4, "--w_sym", "False")
    whole = OctavoDirectory.linear

    def lowest(self: OctavoDirectory, name: str, first: int = 0, last: int | None = None) -> object:
        found = whole(self, name, first, last)
        found.zero[0, 0] = -8
        return found

    monkeypatch.setattr(OctavoDirectory, "linear", lowest)
    rewrite(RewriteRequest(path, tmp_path / "out", "gptq"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"


def test_scales_that_float16_does_not_hold_are_said(converted: Callable[..., Path], tmp_path: Path) -> None:
    """Those of a whole row are no numbers of float16; a group of 64 is a whole row of most linears here."""
    for group, rounded, stated in (("0", 21, -1), ("64", 18, 64)):
        path = converted("--quantization", "w4a16", "--group_size", group, "--embeddings", "int8")
        lines = rewrite(RewriteRequest(path, tmp_path / group, "gptq"))
        assert any(f"scales of {rounded} linears, as model.layers.0" in line for line in lines)
        assert any("model.embed_tokens and lm_head: written in float" in line for line in lines)
        assert json.loads((tmp_path / group / "config.json").read_text())["quantization_config"]["group_size"] == stated


def test_a_cache_that_the_engine_quantizes_is_a_flag_of_it(converted: Callable[..., Path], tmp_path: Path) -> None:
    lines = rewrite(RewriteRequest(converted(*W4, "--scheme", "int8-token"), tmp_path / "out", "awq"))
    assert any("--kv-cache-dtype int8_per_token_head" in line for line in lines)


REFUSED = {
    "int8 inputs": ("awq", ("--is_dynamic", "True"), "is in W8A8_DYNAMIC, and the layout holds W4A16; convert with"),
    "8 bits": ("awq", W8, "is in W8A16, and the layout holds W4A16; convert with --w_bit 4 --a_bit 16"),
    "floats": ("gptq", ("--quantization", "float", "--scheme", "int8-token"), "no linear is in codes; convert with"),
    "scales of a cache": ("gptq", (*W4, "--scheme", "ascend-c8"), "--scheme int8-token, or --format"),
    "half a unit": ("awq", (*W4, "--disable_names", "*.q_proj"), "are not quantized alike"),
}  # fmt: skip


def test_groups_of_several_sizes(tmp_path: Path) -> None:
    """Of 96 channels groups of 64 make none, and those of 32 are taken."""
    source = save_source(tmp_path / "source", tiny_llama(intermediate_size=96))
    assert convert_main(ARCHITECTURE, convert_flags(source, tmp_path / "path", "--quantization", "w4a16")) == 0
    with pytest.raises(OctavoError, match="linears have groups of 32 and 64 channels, and the layout has one size"):
        rewrite(RewriteRequest(tmp_path / "path", tmp_path / "out", "awq"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_layouts_cannot_say(
    name: str, converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dialect, flags, reason = REFUSED[name]
    path, target = converted(*flags), tmp_path / "out"
    capsys.readouterr()
    assert main(["--model_path", str(path), "--format", dialect, "--save_directory", str(target)]) == 1
    assert not target.exists()
    assert_one_error_line(capsys.readouterr().err, f"--format {dialect}:", reason)
