"""SmolLM2-135M in vLLM on the CPU: as far from the float model as our own class, and its tokens up to ties."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags
from .environments import python_of
from .test_vllm import CASES
from .vllm_answers import (
    Job,
    TruncatedCache,
    answers_of,
    gaps_of,
    kl,
    load_ours,
    logprobs_of,
    on_prompts,
    scales_in,
    sums_in_another_order,
)

pytestmark = pytest.mark.slow

WINDOWS, WIDTH, NEW, APART = 8, 192, 16, 40_000
TIES = {"w8a8 static": 2.0, "w8a8 dynamic": 2.0, "w4a16": 0.3, "fp8 cache": 0.1}
"""Nats by which our likeliest token may be likelier than vLLM's. Of W8A8, our own class is no nearer to itself where
sums are in another order: codes of inputs tip over, layer by layer more, until half of them differ; 116 to 119 of 128
tokens were the same, and the others up to 2.3 nats apart. W4A16 is in bfloat16 there, which ours is not; and the cache
that vLLM's is compared with truncates too."""
FLAGS = {name: CASES[name][0] for name in TIES} | {"w4a16": ("--quantization", "w4a16")}
RATIO = 0.1
"""By which KL(float || vLLM) may differ from KL(float || ours)."""
TIPPED = 2.0
"""At most so many times the KL of our own class from itself, sums in another order, is its KL from vLLM: 1.4 (static)
and 0.9 (dynamic) measured."""
CACHE_COSTS = 2.0
"""So many times ours, at least, is the KL of vLLM's fp8 cache, which rounds towards zero."""


@dataclass(frozen=True)
class Measured:
    """KL in nats of both from a reference, float32 where none is named, and the gaps of vLLM's tokens."""

    theirs: float
    ours: float
    gaps: torch.Tensor


def _asked(source: Path, text: str, folder: Path) -> dict[str, Job]:
    """Directories of ours, `folder/NAME/ours`, as jobs of what vLLM is to read of each."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompts = [tokenizer(text[APART * n :][: WIDTH * 10])["input_ids"][:WIDTH] for n in range(WINDOWS)]
    jobs = {}
    for name, flags in FLAGS.items():
        ours, theirs = folder / name / "ours", folder / name / "theirs"
        assert convert(ARCHITECTURE, convert_flags(source, ours, *flags)) == 0
        rewrite(RewriteRequest(ours, theirs, "compressed-tensors"))
        jobs[name] = Job(theirs, CASES[name][1], prompts, NEW, top=1000)
    return jobs


@pytest.fixture(scope="module")
def measured(testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """Of each case; the cache is compared with one that truncates, and in `fp8 cache nearest` with ours."""
    python_of("vllm")
    source, folder = testbed / "smollm2-135m", tmp_path_factory.mktemp("smollm2")
    jobs = _asked(source, (testbed / "wikipedia-eval.txt").read_text(encoding="utf-8"), folder)
    answers = answers_of(jobs, folder)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    exact = logprobs_of(original, jobs["w4a16"], answers["w4a16"])
    found = {}
    for name, job in jobs.items():
        answer = answers[name]
        model = load_ours(folder / name / "ours")
        logprobs = {name: logprobs_of(model, job, answer)}
        if name == "fp8 cache":
            scales = scales_in(job.directory)
            truncated = logprobs_of(original, job, answer, lambda scales=scales: TruncatedCache(scales))
            logprobs = {"fp8 cache nearest": logprobs[name], name: truncated}
        for key, ours in logprobs.items():
            found[key] = _measure(exact, ours, answer)
        if name.startswith("w8a8"):
            with sums_in_another_order(model):
                found[f"{name} reordered"] = _measure(logprobs[name], logprobs_of(model, job, answer), answer)
    for name, each in found.items():
        print(f"{name}: KL {each.theirs:.5f} and {each.ours:.5f}, {_describe(each.gaps)}")
    return found


def _measure(reference: torch.Tensor, ours: torch.Tensor, answer: dict[str, torch.Tensor]) -> Measured:
    expected = on_prompts(reference, answer)
    return Measured(kl(expected, answer["logprobs"]), kl(expected, on_prompts(ours, answer)), gaps_of(ours, answer))


def _describe(gaps: torch.Tensor) -> str:
    return f"{int((gaps == 0).sum())} of {gaps.numel()} tokens equal, gaps up to {gaps.max().item():.3f}"


@pytest.mark.parametrize("name", TIES)
def test_tokens_are_ours_up_to_ties(name: str, measured: dict[str, Measured]) -> None:
    gaps = measured[name].gaps
    assert gaps.max() <= TIES[name], _describe(gaps)
    assert (gaps == 0).float().mean() >= 0.85, _describe(gaps)


@pytest.mark.parametrize("name", TIES)
def test_kl_from_float_is_ours(name: str, measured: dict[str, Measured]) -> None:
    found = measured[name]
    assert abs(found.theirs / found.ours - 1) <= RATIO


def test_what_rounding_toward_zero_costs(measured: dict[str, Measured]) -> None:
    found = measured["fp8 cache nearest"]
    assert found.theirs >= CACHE_COSTS * found.ours


@pytest.mark.parametrize("name", ["w8a8 static", "w8a8 dynamic"])
def test_vllm_is_no_farther_from_ours_than_ours_is_from_itself(name: str, measured: dict[str, Measured]) -> None:
    """The reference is our own class; `ours` is that class again, its sums in another order."""
    found = measured[f"{name} reordered"]
    assert found.theirs <= TIPPED * found.ours
