"""onnxruntime-genai builds a graph with our scales and reads it: our codes, our tokens, and our distance from float."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.common.convert.measure.fidelity import compare, windows
from octavo.models.llama3 import ARCHITECTURE
from octavo.ops.shared.codes import unpack_int4

from ..support import CACHE_NAME, convert_flags, random_ids, save_source, tiny_llama
from ..tolerances import TOLERANCES
from .environments import packages_of, run_with, said_by

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ENGINE = "onnxruntime_genai"
SCRIPT = Path(__file__).with_name("run_onnxruntime_genai.py")
FLOAT = ("--quantization", "float")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
CASES = {"ort-int8-channel": 0.02, "int8 channel": 0.02, "int8 tensor": 0.02, "int4 channel": 0.5}
"""The largest gap in nats between its token and our likeliest one."""
NEW = 12


def scheme_file(folder: Path, kind: str) -> str:
    """A scheme of static codes, as a file, or the name of a preset."""
    if " " not in kind:
        return kind
    dtype, granularity = kind.split()
    codec = {"dtype": dtype, "granularity": granularity}
    file = folder / "scheme.json"
    file.write_text(json.dumps({"name": kind, "key": codec, "value": codec, "fold_bias": False}))
    return str(file)


def run_printed(line: str) -> subprocess.CompletedProcess:
    """Run a command that was printed for the user, where the engine is."""
    return run_with(packages_of(ENGINE), *shlex.split(line, comments=True)[1:])


def built(ours: Path, theirs: Path) -> tuple[Path, list[str]]:
    """Ours in its format, and the graph that the printed command makes of it; with all lines printed."""
    lines = rewrite(RewriteRequest(ours, theirs, "onnxruntime-genai"))
    done = run_printed(next(line for line in lines if "models.builder" in line))
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(f"{theirs}-onnx"), lines


def read_by(graph: Path, ids: torch.Tensor, new: int, into: Path) -> tuple[list[list[int]], Any]:
    """Tokens behind prompts `[B, S]`, and logits and codes of the prompts."""
    found = said_by(run_with(packages_of(ENGINE), SCRIPT, graph, json.dumps(ids.tolist()), new, into))
    return found["tokens"], np.load(into)


@pytest.mark.parametrize("kind", CASES)
def test_codes_and_tokens_are_ours(kind: str, tmp_path: Path) -> None:
    packages_of(ENGINE)
    source = save_source(tmp_path / "tiny", tiny_llama(**SIZES))
    flags = (*FLOAT, "--scheme", scheme_file(tmp_path, kind))
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "ours", *flags)) == 0
    graph, lines = built(tmp_path / "ours", tmp_path / "their directory")
    ids = random_ids(4, 24)
    outputs, stored = read_by(graph, ids, NEW, tmp_path / "read.npz")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE_NAME]
        logits = model(torch.cat([ids, torch.tensor(outputs)], dim=1)).logits[:, ids.shape[1] - 1 : -1]
    found, expected = torch.from_numpy(stored["codes"]), cache.layers[0].key_store.codes().codes
    if kind.startswith("int4"):
        found = torch.stack([found & 15, found >> 4], dim=-1).flatten(-2).char() - 8
        expected = unpack_int4(expected, SIZES["head_dim"])
    assert found.shape == expected.shape
    assert (found != expected).float().mean() <= TOLERANCES["codes"]
    ours = torch.log_softmax(logits, dim=-1)
    chosen = ours.gather(-1, torch.tensor(outputs)[..., None])[..., 0]
    assert (ours.max(dim=-1).values - chosen).max() <= CASES[kind]
    done = run_printed(lines[-1])
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time"), done.stderr[-2000:]


def test_the_cpu_has_no_kernel_for_fp8(tmp_path: Path) -> None:
    packages_of(ENGINE)
    source = save_source(tmp_path / "tiny", tiny_llama(**SIZES))
    flags = (*FLOAT, "--scheme", "vllm-fp8")
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "ours", *flags)) == 0
    lines = rewrite(RewriteRequest(tmp_path / "ours", tmp_path / "theirs", "onnxruntime-genai"))
    on_gpu = next(line for line in lines if "models.builder" in line)
    assert "-p fp16 -e cuda" in on_gpu and "fp8_per_tensor" in on_gpu
    done = run_printed(on_gpu.replace("-p fp16 -e cuda", "-p fp32 -e cpu"))
    assert done.returncode == 0, done.stderr[-2000:]
    done = run_printed(lines[-1])
    assert "Could not find an implementation for GroupQueryAttention" in done.stderr


def test_of_smollm2_the_distance_from_float_is_ours(testbed: Path, tmp_path: Path) -> None:
    packages_of(ENGINE)
    source, texts = testbed / "smollm2-135m", tmp_path / "texts.jsonl"
    texts.write_text("".join((testbed / "boolq.jsonl").read_text().splitlines(keepends=True)[:8]))
    flags = ["--model_path", str(source), "--save_directory", str(tmp_path / "ours"), "--calib_file", str(texts)]
    assert convert(ARCHITECTURE, [*flags, *FLOAT, "--scheme", "ascend-c8"]) == 0
    graph, _ = built(tmp_path / "ours", tmp_path / "theirs")
    text = (testbed / "wikipedia-eval.txt").read_text(encoding="utf-8")
    samples = windows(AutoTokenizer.from_pretrained(source)(text, return_tensors="pt")["input_ids"][0], 256, 2)
    _, stored = read_by(graph, torch.cat(samples), 1, tmp_path / "read.npz")
    theirs = iter(torch.from_numpy(stored["logits"])[:, None])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True, dtype=torch.float32)
    expected = compare(lambda ids: model(ids).logits, lambda ids: ours(ids).logits, samples)
    found = compare(lambda ids: model(ids).logits, lambda _: next(theirs), samples)
    print(f"KL from float: ours {expected.kl:.6f}, theirs {found.kl:.6f}")
    assert found.kl == pytest.approx(expected.kl, rel=0.1)
