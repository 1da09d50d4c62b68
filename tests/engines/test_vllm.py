"""vLLM on the CPU loads what we write and generates what our own class does, up to ties."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags, random_ids, save_source, tiny_llama
from .environments import python_of, run_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
CASES = {
    "w8a8 dynamic": (("--is_dynamic", "True"), "float32", 0.02),
    "w8a8 static": ((), "float32", 0.02),
    "w4a16": (("--quantization", "w4a16", "--group_size", "32"), "bfloat16", 0.2),
    "w4a16 zeros": (("--quantization", "w4a16", "--w_sym", "False"), "bfloat16", 0.2),
}
"""Flags of a conversion, dtype of vLLM's model, and the largest gap in nats between its token and our likeliest one,
which the rounding of that dtype accounts for."""
NEW = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of heads that vLLM's attention has kernels for."""
    return save_source(tmp_path_factory.mktemp("source") / "tiny", tiny_llama(**SIZES))


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_ours(name: str, source: Path, tmp_path: Path) -> None:
    python_of("vllm")
    flags, dtype, most = CASES[name]
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "ours", *flags)) == 0
    rewrite(RewriteRequest(tmp_path / "ours", tmp_path / "theirs", "compressed-tensors"))
    prompts = random_ids(8, 20).tolist()
    found = run_in("vllm", "run_vllm.py", tmp_path / "theirs", dtype, NEW, json.dumps(prompts))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "cpu_activations"):
            module.cpu_activations = "float"
    for prompt, output in zip(prompts, found["outputs"], strict=True):
        tokens = output["tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        ours = torch.log_softmax(logits, dim=-1)
        gaps = ours.max(dim=-1).values - ours[range(NEW), tokens]
        assert gaps.max() <= most
