"""vLLM on the CPU loads what we write: its linears and its cache compute what ours do, or what is said of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags, random_ids, save_source, tiny_llama
from .environments import python_of
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
    toward_zero,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
VOCABULARY = 320
FP8_CACHE = str(Path(__file__).parent / "fp8_cache.json")
CASES = {
    "w8a8 static": ((), "float32"),
    "w8a8 dynamic": (("--is_dynamic", "True"), "float32"),
    "w4a16": (("--quantization", "w4a16", "--group_size", "32"), "bfloat16"),
    "w4a16 zeros": (("--quantization", "w4a16", "--w_sym", "False"), "bfloat16"),
    "fp8 cache": (("--w_bit", "16", "--a_bit", "16", "--scheme", FP8_CACHE), "float32"),
}
"""Flags of a conversion, and what vLLM computes in; of W4A16 its kernel has no float32."""
LINEARS = {"float32": 2e-6, "bfloat16": 8e-3}
"""How far outputs of a linear may be from ours in the largest of them: rounding of inputs, scales and outputs to that
dtype."""
UNITS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

Answered = dict[str, tuple[Path, Job, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """Directories of ours, of a tiny Llama of heads that vLLM has kernels for, and what vLLM answers for them."""
    python_of("vllm")
    folder = tmp_path_factory.mktemp("vllm")
    source = save_source(folder / "tiny", tiny_llama(**SIZES))
    jobs = {}
    for name, (flags, dtype) in CASES.items():
        ours, theirs = folder / name / "ours", folder / name / "theirs"
        assert convert(ARCHITECTURE, convert_flags(source, ours, *flags)) == 0
        rewrite(RewriteRequest(ours, theirs, "compressed-tensors"))
        jobs[name] = Job(theirs, dtype, random_ids(8, 20).tolist(), new=12, top=VOCABULARY, watched=True)
    answers = answers_of(jobs, folder)
    return {name: (folder / name / "ours", jobs[name], answers[name]) for name in CASES}


@pytest.mark.parametrize("name", [name for name in CASES if name != "fp8 cache"])
def test_each_linear_computes_what_ours_does(name: str, answered: Answered) -> None:
    directory, job, answer = answered[name]
    modules = dict(load_ours(directory).named_modules())
    inputs = {key.removeprefix("in."): x.float() for key, x in answer.items() if key.startswith("in.model.layers")}
    assert len(inputs) == 3 * 4
    for key, x in inputs.items():
        parent, _, last = key.rpartition(".")
        with torch.no_grad():
            expected = torch.cat([modules[f"{parent}.{part}"](x) for part in UNITS.get(last, (last,))], dim=-1)
        difference = (answer[f"out.{key}"].float() - expected).abs().max()
        assert difference <= LINEARS[job.dtype] * expected.abs().max(), key


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal, of `[S, heads * 32]`, in the dtype of its inputs."""
    q, k, v = (x.unflatten(-1, (-1, SIZES["head_dim"])).transpose(0, 1) for x in (q, k, v))
    output = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, enable_gqa=True
    )
    return output[0].transpose(0, 1).flatten(1)


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """To the nearest fp8 value, as ours."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale


def test_its_fp8_cache_rounds_toward_zero(answered: Answered) -> None:
    """In all else attention is ours: in float64 over such values it is vLLM's, and over the nearest it is not."""
    _, job, answer = answered["fp8 cache"]

    def error(index: int, encoded: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        name = f"model.layers.{index}.self_attn.attn"
        q, k, v = (answer[f"{name}.{part}"].double() for part in "qkv")
        found = answer[f"{name}.out"].double()
        of_key, of_value = scales_in(job.directory)[index]
        expected = attention(q, encoded(k, of_key), encoded(v, of_value))
        return ((found - expected).abs().max() / found.abs().max()).item()

    for index in range(3):
        assert error(index, toward_zero) <= 2e-6
        assert error(index, rounded) >= 1e-2


def test_logprobs_are_ours_but_for_the_rounding_of_its_cache(answered: Answered) -> None:
    for name in ("w8a8 static", "w8a8 dynamic"):
        directory, job, answer = answered[name]
        ours = logprobs_of(load_ours(directory), job, answer)
        assert kl(on_prompts(ours, answer), answer["logprobs"]) <= 1e-3
        assert gaps_of(ours, answer).max() <= 0.02
    directory, job, answer = answered["fp8 cache"]
    scales = scales_in(job.directory)
    source = load_ours(directory.parent.parent / "tiny")
    truncated = logprobs_of(source, job, answer, lambda: TruncatedCache(scales))
    assert kl(on_prompts(truncated, answer), answer["logprobs"]) <= 1e-3
    assert gaps_of(truncated, answer).max() <= 0.02
