"""GGUF: what we write, read and decoded by the gguf package."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.common.convert.dialects.directory import OctavoDirectory
from octavo.common.convert.dialects.gguf import llama3_factors
from octavo.common.convert.dialects.rewriting import RewriteRequest, main, rewrite
from octavo.common.errors import OctavoError

from ....support import assert_one_error_line, edit_json, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

LINEARS = {
    "Q8_0": ("--quantization", "w8a16", "--group_size", "32"),
    "Q4_0": ("--quantization", "w4a16", "--group_size", "32"),
    "Q4_1": ("--quantization", "w4a16", "--w_sym", "False", "--group_size", "32"),
    "F16": ("--quantization", "fp8"),
}
ROUNDED_LEAST = 2.0**-9
"""Of Q4_1, the least value is rounded to float16: by how much of the largest weight what is decoded differs."""


def written(path: Path, target: Path, **options: object) -> tuple[dict[str, gguf.ReaderTensor], gguf.GGUFReader, list]:
    lines = rewrite(RewriteRequest(path, target, "gguf", **options))
    reader = gguf.GGUFReader(target / "model.gguf")
    return {tensor.name: tensor for tensor in reader.tensors}, reader, lines


def decoded(tensor: gguf.ReaderTensor) -> torch.Tensor:
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))


def halves_apart(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of what llama.cpp wants of q and k."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@pytest.mark.parametrize("kind", LINEARS)
def test_codes_are_carried_over(kind: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted(*LINEARS[kind])
    tensors, _, _ = written(path, tmp_path / "out")
    directory = OctavoDirectory(path)
    for name, part, heads in (("self_attn.k_proj", "attn_k", 2), ("mlp.gate_proj", "ffn_gate", 0)):
        tensor = tensors[f"blk.1.{part}.weight"]
        assert tensor.tensor_type.name == kind
        found = decoded(tensor)
        found = halves_apart(found, heads) if heads else found
        expected = directory.linear(f"model.layers.1.{name}").float_weight()
        if kind == "F16":
            expected = expected.half().float()
        least = ROUNDED_LEAST * expected.abs().max() if kind == "Q4_1" else 0
        assert (found - expected).abs().max() <= least


def test_scales_of_8_bits_and_zeros_between_codes_are_carried_over(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    path = converted("--quantization", "w4a16_double")
    tensors, _, lines = written(path, tmp_path / "out")
    tensor = tensors["blk.1.ffn_gate.weight"]
    expected = OctavoDirectory(path).linear("model.layers.1.mlp.gate_proj").float_weight()
    assert tensor.tensor_type.name == "Q4_1" and "rounded" not in " ".join(lines)
    assert (decoded(tensor) - expected).abs().max() <= ROUNDED_LEAST * expected.abs().max()


def test_scales_per_channel_are_rounded_and_said_to_be(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("--is_dynamic", "True")
    tensors, _, lines = written(path, tmp_path / "out")
    found = halves_apart(decoded(tensors["blk.0.attn_q.weight"]), 4)
    expected = OctavoDirectory(path).linear("model.layers.0.self_attn.q_proj").float_weight()
    assert (found - expected).abs().max() <= 2**-11 * expected.abs().max()
    assert any("21 linears" in line and "scales rounded to float16" in line for line in lines)


def with_scale(path: Path, target: Path, steps: float) -> Path:
    """A copy of a directory, one scale of which is so many times the least number of float16."""
    shutil.copytree(path, target)
    file = next(target.glob("quant_model_weight_*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale"][5] = steps * 2.0**-24
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_small_scales_are_rounded_where_that_costs_little(converted: Callable[..., Path], tmp_path: Path) -> None:
    """Below the normal numbers of float16 there are fewer of them: what is moved is measured, and said."""
    path = with_scale(converted("--is_dynamic", "True"), tmp_path / "small", 307.4)
    tensors, _, lines = written(path, tmp_path / "out")
    up = tensors["blk.0.ffn_up.weight"]
    expected = OctavoDirectory(path).linear("model.layers.0.mlp.up_proj")
    moved = (decoded(up) - expected.float_weight()).abs().amax(dim=1)
    assert up.tensor_type.name == "Q8_0" and 0 < moved[5] < expected.scale[5, 0] / 2
    assert any("moves weights by at most 0.13% of the largest" in line for line in lines), "0.4 of 307.4"


def test_scales_that_float16_has_no_room_for(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = with_scale(converted("--is_dynamic", "True"), tmp_path / "tiny", 1.4)
    tensors, _, lines = written(path, tmp_path / "out")
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "F16"
    assert any(line.startswith("model.layers.0.mlp.up_proj: in float16, since float16 has no room") for line in lines)
    assert any("20 linears" in line and "scales rounded" in line for line in lines)


def test_the_tokenizer_and_the_facts_go_with_it(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("--is_dynamic", "True", "--scheme", "float", "--embeddings", "int8")
    tensors, reader, lines = written(path, tmp_path / "out")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    vocabulary = {index: token for token, index in tiny_tokenizer().get_vocab().items()}
    assert fields["tokenizer.ggml.tokens"][:300] == [vocabulary[index] for index in range(300)]
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["llama.block_count"] == 3 and fields["llama.attention.head_count_kv"] == 2
    assert tensors["token_embd.weight"].tensor_type.name == tensors["output.weight"].tensor_type.name == "Q8_0"
    expected = OctavoDirectory(path).linear("model.embed_tokens").float_weight()
    assert torch.equal(decoded(tensors["token_embd.weight"]), expected)
    assert any("llama-server --model" in line and "cache-type" not in line for line in lines)


def test_factors_of_rope_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    assert torch.allclose(plain / llama3_factors(rope, 128), expected, rtol=1e-5)


def test_a_cache_of_calibrated_scales_is_refused(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = converted("--use_kvcache_quant", "True"), tmp_path / "out"
    flags = ["--model_path", str(path), "--save_directory", str(target), "--format", "gguf"]
    assert main(flags) == 1
    assert_one_error_line(capsys.readouterr().err, "give --scheme llamacpp-q8_0, or --scheme float")


def with_normalizer(path: Path, target: Path, kind: str) -> Path:
    """A copy of a directory whose tokenizer normalizes text."""
    shutil.copytree(path, target)
    edit_json(target / "tokenizer.json", normalizer={"type": kind})
    return target


def test_a_normalizer_is_said_or_refused(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("--is_dynamic", "True")
    _, _, lines = written(with_normalizer(path, tmp_path / "nfc", "NFC"), tmp_path / "out")
    assert any("llama.cpp leaves NFC out" in line for line in lines) and "llama-server" in lines[-1]
    with pytest.raises(OctavoError, match="the tokenizer normalizes text"):
        written(with_normalizer(path, tmp_path / "lower", "Lowercase"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_without_the_package_it_is_named(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    path = converted("--is_dynamic", "True")
    assert main(["--model_path", str(path), "--save_directory", str(tmp_path / "out"), "--format", "gguf"]) == 1
    assert_one_error_line(capsys.readouterr().err, 'pip install "gguf>=0.19"')
