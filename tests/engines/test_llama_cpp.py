"""llama.cpp loads the GGUF that we write: the same token ids, and the logits of what the codes stand for."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ..support import TEXTS, convert_flags, random_ids, save_source, tiny_llama, tiny_tokenizer
from .environments import python_of, run_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
CASES = {
    "q8_0": (("--quantization", "w8a16", "--group_size", "32"), 0.04),
    "q4_0": (("--quantization", "w4a16", "--group_size", "32"), 0.04),
    "q4_1": (("--quantization", "w4a16", "--group_size", "32", "--w_sym", "False"), 0.04),
    "float16": (("--quantization", "fp8", "--disable_names", "*.k_proj", "*.q_proj", "*.v_proj"), 0.1),
}
"""Flags, and the largest mean difference of logits in their standard deviation: llama.cpp rounds inputs to int8 in
blocks of 32, as ours does in groups of so many, and keeps K and V in
float16; inputs that ours has in fp8 stay in float there."""


@pytest.mark.parametrize("name", CASES)
def test_logits_and_token_ids_are_ours(name: str, tmp_path: Path) -> None:
    python_of("llama_cpp")
    flags, most = CASES[name]
    source = save_source(tmp_path / "tiny", tiny_llama(**SIZES))
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "ours", *flags)) == 0
    rewrite(RewriteRequest(tmp_path / "ours", tmp_path / "theirs", "gguf"))
    ids = random_ids(1, 32)
    found = run_in(
        "llama_cpp",
        "run_llama_cpp.py",
        tmp_path / "theirs" / "model.gguf",
        json.dumps(TEXTS),
        json.dumps(ids[0].tolist()),
    )
    tokenizer = tiny_tokenizer()
    assert found["tokens"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids).logits[0]
    difference = (torch.tensor(found["logits"]) - expected).abs().mean()
    assert difference <= most * expected.std()
