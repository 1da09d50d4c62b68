"""W4A8_DYNAMIC: codes and scales of our W4A16 in another layout; what vllm-ascend leaves out of it is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from octavo.common.architecture import load_architecture
from octavo.common.convert.api import main
from octavo.common.convert.dialects.directory import OctavoDirectory
from octavo.common.convert.dialects.layouts.w4a8 import pack_channels
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ....support import assert_one_error_line, convert_flags, randomized, save_source, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

FORMAT = "vllm-ascend-w4a8"
FLAGS = ("--w_bit", "4", "--a_bit", "16", "--group_size", "32")


def test_two_output_channels_share_a_byte() -> None:
    codes = torch.tensor([[-8, 7], [3, -1]], dtype=torch.int8)
    assert pack_channels(codes).tolist() == [[0x38, 0xF7 - 256]]


def test_codes_and_scales_are_ours(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted(*FLAGS, "--use_kvcache_quant", "True")
    said = rewrite(RewriteRequest(path, tmp_path / "out", FORMAT))
    assert said[-1] == f"vllm serve {tmp_path / 'out'} --quantization ascend  # vllm-ascend 0.25.1rc1"
    tensors, ours = load_file(tmp_path / "out" / "model.safetensors"), OctavoDirectory(path)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert (description["model_quant_type"], description["group_size"]) == ("W4A8_DYNAMIC", 32)
    assert description["kv_cache_type"] == "C8"
    assert tensors.keys() <= description.keys()
    for name in ours.form.linears:
        packed, parts = tensors[f"{name}.weight"], ours.linear(name)
        low, high = packed << 4 >> 4, packed >> 4
        assert torch.equal(torch.stack([low, high], dim=1).flatten(0, 1), parts.codes)
        assert torch.equal(tensors[f"{name}.weight_scale_second"], parts.scale)
        sums = 8 * parts.float_weight().sum(dim=1)
        torch.testing.assert_close(tensors[f"{name}.scale_bias"].sum(dim=1), sums, atol=1e-4, rtol=1e-4)
        assert tensors[f"{name}.scale_bias"].shape[1] == (16 if name.endswith(("o_proj", "down_proj")) else 1)
        assert description[f"{name}.weight"] == "W4A8_DYNAMIC"
    key = "model.layers.0.self_attn.k_proj.kv_cache_scale"
    assert torch.equal(tensors[key], ours.scales()[0].key[0].flatten())


REFUSED = [
    (("--is_dynamic", "True"), "is in W8A8_DYNAMIC, and the format holds W4A16 alone; convert with --w_bit 4"),
    ((*FLAGS, "--w_sym", "False"), "has zero points, which vllm-ascend leaves out"),
    ((*FLAGS, "--scheme", "int8-token"), "the format says int8 per channel alone; give --scheme ascend-c8"),
    ((*FLAGS[:4], "--group_size", "0"), "have no groups of one size, which the format states once"),
    ((*FLAGS, "--disable_names", "*.q_proj"), "are not quantized alike"),
    (("--w_bit", "16", "--a_bit", "16", "--use_kvcache_quant", "True"), "no linear is in codes"),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED)
def test_what_it_leaves_out_is_refused(
    flags: tuple[str, ...], reason: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags, "--format", FORMAT)) == 1
    assert_one_error_line(capsys.readouterr().err, f"--format {FORMAT}: ", reason)


def test_biases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2 has some of q, k and v, which vllm-ascend's linear of int4 does not add."""
    settings = {**tiny_config().to_dict(), "model_type": "qwen2"}
    model = randomized(Qwen2ForCausalLM(Qwen2Config(**{key: settings[key] for key in settings if key != "head_dim"})))
    source = save_source(tmp_path / "source", model)
    flags = (*FLAGS, "--format", FORMAT)
    assert main(load_architecture("qwen2"), convert_flags(source, tmp_path / "out", *flags)) == 1
    assert_one_error_line(capsys.readouterr().err, "q_proj has a bias, which vllm-ascend leaves out of such linears")
