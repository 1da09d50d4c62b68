"""vLLM on the CPU loads AWQ, GPTQ and ModelOpt as we write them, and generates what our own class does, up to ties."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags, random_ids, save_source, tiny_llama
from .environments import python_of
from .vllm_answers import Job, answers_of, behind, gaps_of, load_ours, logprobs_of

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


def asked(
    directory: Path, folder: Path, prompts: list[list[int]], **options: Any
) -> tuple[Job, dict[str, torch.Tensor]]:
    """What vLLM is asked about a directory, and what it answers."""
    job = Job(directory, "bfloat16", prompts, NEW, top=2, options=options)
    return job, answers_of({"it": job}, folder)["it"]


@pytest.mark.parametrize("name", WORDS)
def test_greedy_tokens_are_ours(name: str, source: Path, tmp_path: Path) -> None:
    python_of("vllm")
    directory = written(source, tmp_path, *WORDS[name])
    prompts = random_ids(8, 20).tolist()
    job, answer = asked(directory, tmp_path, prompts)
    gaps = gaps_of(logprobs_of(load_ours(tmp_path / "ours"), job, answer), answer)
    assert gaps.max() <= 0.2, "more than rounding to bfloat16 accounts for"
    assert (gaps == 0).float().mean() >= 0.9


@pytest.mark.parametrize("cache", CACHES)
def test_fp8_of_modelopt_differs_by_what_rounding_does(cache: str, source: Path, tmp_path: Path) -> None:
    """Codes of inputs flip where bfloat16 rounds them, and of a random model each flip shows."""
    python_of("vllm")
    flags, most = CACHES[cache]
    directory = written(source, tmp_path, "modelopt", ("--quantization", "fp8", *flags))
    options = {"quantization": "modelopt", "kv_cache_dtype": cache}
    job, answer = asked(directory, tmp_path, random_ids(8, 20).tolist(), **options)
    models = (load_ours(tmp_path / "ours", dtype) for dtype in (torch.float32, torch.bfloat16))
    exact, rounded = (
        behind(logprobs_of(model, job, answer), answer).gather(-1, answer["step_ids"]) for model in models
    )
    theirs = answer["step_logprobs"]
    assert (theirs - exact).abs().mean() <= most * (rounded - exact).abs().mean()


def test_zeros_and_8_bits_of_gptq_are_refused(source: Path, tmp_path: Path) -> None:
    python_of("vllm")
    for flags, reason in (
        ((*W4, "--w_sym", "False"), "Unsupported quantization config: bits=4, sym=False"),
        (("--quantization", "w8a16", "--group_size", "32"), "Marlin does not support weight_bits = uint8b128"),
    ):
        directory = written(source, tmp_path / reason[:4], "gptq", flags)
        with pytest.raises(AssertionError, match=re.escape(reason)):
            asked(directory, tmp_path, [[1, 2, 3]])
