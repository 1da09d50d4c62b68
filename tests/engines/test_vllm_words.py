"""vLLM on the CPU loads AWQ, GPTQ and ModelOpt as we write them, and generates what our own class does, up to ties."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags, random_ids, save_source, tiny_llama
from .environments import python_of, run_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
W4 = ("--quantization", "w4a16", "--group_size", "32")
WORDS = {
    "awq": ("awq", W4),
    "awq zeros": ("awq", (*W4, "--w_sym", "False")),
    "gptq": ("gptq", W4),
}
"""Format, and flags of a conversion."""
CACHES = {"auto": ((), 1.3), "fp8": (("--scheme", "vllm-fp8"), 1.6)}
"""What vLLM's cache is in, flags of a conversion, and how many times what bfloat16 does to ours may separate
vLLM from it: on the CPU its fp8 cache rounds toward zero."""
NEW = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of heads that vLLM's attention has kernels for."""
    return save_source(tmp_path_factory.mktemp("source") / "tiny", tiny_llama(**SIZES))


def written(source: Path, folder: Path, dialect: str, flags: tuple[str, ...]) -> Path:
    """A conversion beside which lies what is written of it for vLLM."""
    assert convert(ARCHITECTURE, convert_flags(source, folder / "ours", *flags)) == 0
    rewrite(RewriteRequest(folder / "ours", folder / "theirs", dialect))
    return folder / "theirs"


def load(directory: Path, dtype: torch.dtype) -> nn.Module:
    """Our own class, whose linears of coded weights leave their inputs in float, as vLLM's do."""
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "cpu_activations"):
            module.cpu_activations = "float"
    return model


def ours(model: nn.Module, prompts: list[list[int]], outputs: list[dict[str, Any]]) -> torch.Tensor:
    """Our log-probabilities behind each prompt and what vLLM generated after it, `[prompts, tokens, vocabulary]`."""
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output["tokens"]])).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits.float(), dim=-1))
    return torch.stack(found)


def likeliest(outputs: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities of vLLM's two likeliest tokens of each step, each `[prompts, tokens, 2]`."""
    steps = [[list(step.items())[:2] for step in output["likeliest"]] for output in outputs]
    return (
        torch.tensor([[[int(token) for token, _ in step] for step in each] for each in steps]),
        torch.tensor([[[value for _, value in step] for step in each] for each in steps]),
    )


@pytest.mark.parametrize("name", WORDS)
def test_greedy_tokens_are_ours(name: str, source: Path, tmp_path: Path) -> None:
    python_of("vllm")
    directory = written(source, tmp_path, *WORDS[name])
    prompts = random_ids(8, 20).tolist()
    outputs = run_in("vllm", "run_vllm_tokens.py", directory, "bfloat16", NEW, json.dumps(prompts))["outputs"]
    expected = ours(load(tmp_path / "ours", torch.float32), prompts, outputs)
    tokens = torch.tensor([output["tokens"] for output in outputs])[..., None]
    gaps = expected.max(dim=-1, keepdim=True).values - expected.gather(-1, tokens)
    assert gaps.max() <= 0.2, "more than rounding to bfloat16 accounts for"
    assert (gaps == 0).float().mean() >= 0.9


@pytest.mark.parametrize("cache", CACHES)
def test_fp8_of_modelopt_differs_by_what_rounding_does(cache: str, source: Path, tmp_path: Path) -> None:
    """Codes of inputs flip where bfloat16 rounds them, and of a random model each flip shows."""
    python_of("vllm")
    flags, most = CACHES[cache]
    directory = written(source, tmp_path, "modelopt", ("--quantization", "fp8", *flags))
    prompts, options = random_ids(8, 20).tolist(), {"quantization": "modelopt", "kv_cache_dtype": cache}
    found = run_in("vllm", "run_vllm_tokens.py", directory, "bfloat16", NEW, json.dumps(prompts), json.dumps(options))
    assert found["cache"] == cache
    tokens, theirs = likeliest(found["outputs"])
    exact, rounded = (
        ours(load(tmp_path / "ours", dtype), prompts, found["outputs"]).gather(-1, tokens)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (theirs - exact).abs().mean() <= most * (rounded - exact).abs().mean()


def test_zeros_and_8_bits_of_gptq_are_refused(source: Path, tmp_path: Path) -> None:
    python_of("vllm")
    for flags, reason in (
        ((*W4, "--w_sym", "False"), "Unsupported quantization config: bits=4, sym=False"),
        (("--quantization", "w8a16", "--group_size", "32"), "Marlin does not support weight_bits = uint8b128"),
    ):
        directory = written(source, tmp_path / reason[:4], "gptq", flags)
        with pytest.raises(AssertionError, match=re.escape(reason)):
            run_in("vllm", "run_vllm_tokens.py", directory, "bfloat16", NEW, json.dumps([[1, 2, 3]]))
