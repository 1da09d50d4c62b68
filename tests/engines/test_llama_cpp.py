"""llama.cpp loads the GGUF that we write: the same token ids, and the logits of what the codes stand for."""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.common.convert.measure.fidelity import compare, windows
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


ODD_TEXT = """
def f(x):\n\treturn {"a": [1, 22, 333.5e-7], 'b': x**2 != 0}  # it's we'll THEY'D\r\n\r\n   \n
naïve café e\u0301 Ünïcödé ﬁ ½ ² Ⅷ — “quotes” … «guillemets» № 12345678 1,234.56
Привет, мир! 你好\uff0c世界。こんにちは 안녕하세요 مرحبا שלום नमस्ते ไทย ᚠᛇᚻ
🙂👩‍👩‍👧‍👦🇫🇷 \u200b\u00a0\u2028 zero\u200dwidth \x00\x07 \ufffd \uff21\uff22\uff23 \uff11\uff12\uff13
if(!p->q){a<<=2;}/*c*/ SELECT * FROM `t` WHERE x>='y';  <div class="z">&nbsp;</div>  \\frac{1}{2}  ~/x_y-z.tar.gz
"""
"""A page of what tokenizers trip over: scripts, signs that are composed, spaces of all kinds, digits, and code."""


def gguf_of(source: Path, folder: Path, *flags: str) -> tuple[Path, Path]:
    """A checkpoint converted, and what is written of it for llama.cpp."""
    assert convert(ARCHITECTURE, convert_flags(source, folder / "ours", *flags)) == 0
    rewrite(RewriteRequest(folder / "ours", folder / "theirs", "gguf"))
    return folder / "ours", folder / "theirs" / "model.gguf"


def read_by(
    file: Path, texts: list[str], ids: torch.Tensor, into: Path, cache: str = "f16"
) -> tuple[list[list[int]], torch.Tensor]:
    """llama.cpp's token ids of texts, and its logits `[S, vocabulary]` of a prompt `[S]`."""
    found = run_in("llama_cpp", "run_llama_cpp.py", file, json.dumps(texts), json.dumps(ids.tolist()), into, cache)
    return found["tokens"], torch.from_numpy(np.load(into))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_token_ids_are_ours(name: str, tmp_path: Path) -> None:
    python_of("llama_cpp")
    flags, most = CASES[name]
    ours, file = gguf_of(save_source(tmp_path / "tiny", tiny_llama(**SIZES)), tmp_path, *flags)
    ids = random_ids(1, 32)
    tokens, logits = read_by(file, TEXTS, ids[0], tmp_path / "logits.npy")
    tokenizer = tiny_tokenizer()
    assert tokens == [tokenizer(text)["input_ids"] for text in TEXTS]
    model = AutoModelForCausalLM.from_pretrained(ours, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids).logits[0]
    assert (logits - expected).abs().mean() <= most * expected.std()


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_a_page_of_odd_text_has_the_same_token_ids(name: str, testbed: Path, tmp_path: Path) -> None:
    """The tokenizers of real models, with a tiny one; in NFC, which Qwen's makes of all text and llama.cpp does not."""
    python_of("llama_cpp")
    if not (testbed / name).exists():
        pytest.skip(f"no testbed: {testbed / name} is missing")
    tokenizer = AutoTokenizer.from_pretrained(testbed / name)
    rows = 64 * (len(tokenizer) // 64 + 1)
    source = save_source(tmp_path / "tiny", tiny_llama(vocab_size=rows, num_hidden_layers=1, **SIZES))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(testbed / name / file, source / file)
    _, file = gguf_of(source, tmp_path, "--is_dynamic", "True")
    page = unicodedata.normalize("NFC", ODD_TEXT)
    texts = [text for text in (page, *page.splitlines(), *page.split(" ")) if text]
    tokens, _ = read_by(file, texts, random_ids(1, 4)[0], tmp_path / "logits.npy")
    assert tokens == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


SMOLLM2 = {
    "q8_0": ("--quantization", "w8a16", "--group_size", "32"),
    "q4_0": ("--quantization", "w4a16", "--group_size", "32"),
    "q4_1": ("--quantization", "w4a16", "--group_size", "32", "--w_sym", "False"),
    "float16": ("--quantization", "float", "--scheme", "llamacpp-q8_0"),
}
"""Flags by the type of its linears; of float16 the source is, and the cache is one of llama.cpp's own."""


def source_of(name: str, testbed: Path, folder: Path) -> Path:
    """SmolLM2 in float32, or in float16 for that."""
    source = testbed / "smollm2-135m"
    if name != "float16":
        return source
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).save_pretrained(folder / "half")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "half")
    return folder / "half"


@pytest.mark.parametrize("name", SMOLLM2)
def test_of_smollm2_the_perplexity_is_ours(name: str, testbed: Path, tmp_path: Path) -> None:
    python_of("llama_cpp")
    source = source_of(name, testbed, tmp_path)
    ours, file = gguf_of(source, tmp_path, *SMOLLM2[name])
    cache = "q8_0" if "llamacpp-q8_0" in SMOLLM2[name] else "f16"
    text = (testbed / "wikipedia-eval.txt").read_text(encoding="utf-8")[:50_000]
    samples = windows(AutoTokenizer.from_pretrained(source)(text, return_tensors="pt")["input_ids"][0], 256, 2)
    model = AutoModelForCausalLM.from_pretrained(ours, trust_remote_code=True, dtype=torch.float32)
    theirs = (read_by(file, [], ids[0], tmp_path / "logits.npy", cache)[1][None] for ids in samples)
    found = compare(lambda ids: model(ids).logits, lambda _: next(theirs), samples)
    print(f"{name}: perplexity {found.float_perplexity:.4f}, of llama.cpp {found.perplexity:.4f}, KL {found.kl:.6f}")
    assert found.perplexity == pytest.approx(found.float_perplexity, rel=0.01)
