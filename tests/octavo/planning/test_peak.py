"""Peaks of runs: their parts, and, of the models that the published figures come from, what a process measures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from octavo import ConvertRequest, convert
from octavo.common.convert.flags import recipe_fields
from octavo.common.runtime.schemes.linear_scheme import LinearScheme
from octavo.planning.model import read_model
from octavo.planning.peak import TOKENIZER_BYTES, held_bytes, pass_bytes, peak_of, process_bytes, resident_bytes
from octavo.planning.table import TRANSFORMERS, Planner
from octavo.planning.weights import header_bytes

from ...support import REPOSITORY, TEXTS, tiny_config
from .test_table import OF_7B, planner_of

TOKENS, NEW = 6000, 8
TOLERANCE, TOLERANCE_OF_ONE_PASS = 0.10, 0.20
"""A prompt in one pass peaks where the allocator happens to put large tensors: 2.70 to 3.34 GB in ten equal runs."""
MEGA = 10**6


def test_a_pass_is_counted_by_rows_and_the_kernel_needs_less_than_modules() -> None:
    config = tiny_config()
    modules, kernel = (pass_bytes(config, 1000, 4, is_fused) for is_fused in (False, True))
    assert modules == 1000 * 4 * (3 * 128 + 3 * 64 + 2 * (4 + 2 * 2) * 16 + 2 * 4 * 16)
    assert kernel == 1000 * (64 * 8 + (4 + 2 * 2 + 4) * 16 * 4) + 128 * (3 * 128 + 2 * 64) * 4
    assert pass_bytes(config, 2000, 2, False) == modules


def test_a_peak_is_the_worst_moment_and_not_all_moments_together() -> None:
    config = tiny_config()
    peak = peak_of(config, held=100, cache=600, tokens=300, batch=2, dtype=torch.float32, process=1000)
    assert peak.states == 2 * 300 * 64 * 4 and peak.logits == 2 * 320 * 8 and peak.growth == 100
    assert peak.pass_ == pass_bytes(config, 2 * 256, 4, False)  # a chunk of 512 tokens over both sequences
    assert peak.total == 1000 + 100 + 600 + peak.states + peak.pass_
    whole = peak_of(config, held=100, cache=600, tokens=300, batch=2, dtype=torch.float32, is_whole=True)
    assert whole.states == 0 and whole.pass_ == pass_bytes(config, 600, 4, False)
    long = peak_of(config, held=100, cache=6 * MEGA, tokens=1, batch=1, dtype=torch.float32)
    assert long.total == 100 + 6 * MEGA + long.growth == 100 + 7 * MEGA


def test_experts_count_as_often_as_a_token_goes_to_some() -> None:
    config = tiny_config()
    plain = pass_bytes(config, 10, 4, False)
    config.moe_intermediate_size, config.num_experts_per_tok = 100, 4
    assert pass_bytes(config, 10, 4, False) - plain == 10 * 4 * 3 * (400 - 128)


def test_the_cpu_holds_less_than_the_files_and_an_accelerator_the_same(tmp_path: Path) -> None:
    sizes = {**OF_7B, "num_hidden_layers": 1}
    plain = recipe_fields("four-bit") | {"linear": LinearScheme("W4A16", group_size=64, symmetric=False)}
    for fields, kept_of_zeros, kept_of_scales in ((recipe_fields("eight-bit"), 0, 1), (plain, 0.5, 0.5)):
        weights, linear = planner_of(tmp_path, fields, **sizes).weights("float"), fields["linear"]
        zeros = sum(header_bytes(header) for part, header in weights.headers.items() if part.endswith("weight_offset"))
        scales = sum(header_bytes(header) for part, header in weights.headers.items() if part.endswith("weight_scale"))
        spared = zeros * (1 - kept_of_zeros) + scales * (1 - kept_of_scales)
        assert 0 < spared == weights.nbytes - held_bytes(weights, linear, "cpu")
        assert held_bytes(weights, linear, "cuda") == weights.nbytes == held_bytes(weights, None, "cpu")


def test_scales_of_8_bits_are_held_in_16(tmp_path: Path) -> None:
    fields = recipe_fields("four-bit")
    weights = planner_of(tmp_path, fields, **{**OF_7B, "num_hidden_layers": 1}).weights("float")
    codes = {part: header for part, header in weights.headers.items() if ".layers." in part}
    bits = {part.rpartition(".")[2]: header.dtype for part, header in codes.items()}
    assert (bits["weight_scale"], bits["weight_offset"]) == ("U8", "I8")
    more = sum(header_bytes(codes[part]) for part in codes if part.endswith(("weight_scale", "weight_offset")))
    ends = (header for part, header in weights.headers.items() if part not in codes)
    less = sum(header_bytes(header) // 2 for header in ends if header.dtype == "F32" and len(header.shape) == 2)
    assert held_bytes(weights, fields["linear"], "cpu") == weights.nbytes + more - less


def test_the_process_counts_what_it_has_imported_and_the_tokenizer() -> None:
    config = tiny_config()
    before, found = resident_bytes(), process_bytes(config)
    assert before <= found - 320 * TOKENIZER_BYTES < before + 200 * MEGA
    assert process_bytes(tiny_config(vocab_size=100_320)) - found > 90 * MEGA


def prompt(source: Path, texts: Path, work: Path) -> Path:
    """A file of the ids of a long prompt."""
    text = texts.read_text(encoding="utf-8")[: 16 * TOKENS]
    file = work / "ids.json"
    file.write_text(json.dumps(AutoTokenizer.from_pretrained(source)(text)["input_ids"][:TOKENS]))
    return file


def measured(directory: Path, ids: Path, *flags: str) -> float:
    """Bytes of a process at its peak that loads a model and generates behind a prompt, without a tokenizer."""
    script = str(REPOSITORY / "benchmarks" / "memory_case.py")
    given = ["--model_path", str(directory), "--ids", str(ids), "--new", str(NEW), "--threads", "1", *flags]
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["end"]["peak"] * MEGA


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_peaks_of_real_models_are_predicted(name: str, testbed: Path, tmp_path: Path) -> None:
    source = testbed / name
    if not source.is_dir():
        pytest.skip(f"no testbed: {source} is missing")
    ids, model = prompt(source, testbed / "wikipedia-eval.txt", tmp_path), read_model(str(source))
    fields: dict[str, Any] = recipe_fields("eight-bit")
    convert(ConvertRequest(source, tmp_path / "out", calibration=TEXTS[:1], **fields))
    code = (
        "import sys; from octavo.planning.peak import process_bytes; from octavo.planning.model import read_model; "
        "import octavo.planning.report; print(process_bytes(read_model(sys.argv[1]).config))"
    )
    alone = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    process = int(alone.stdout) - TOKENIZER_BYTES * model.config.vocab_size
    cases = [
        (TRANSFORMERS, {}, source, ()),
        ("float", {}, source, ("--scheme", "float")),
        ("int8-token", {}, source, ("--scheme", "int8-token")),
        ("int8-token", fields, tmp_path / "out", ("--converted",)),
    ]
    for scheme, made, directory, flags in cases:
        planned = Planner(model, made, process=process).peak(scheme, TOKENS + NEW, 1).total
        within = TOLERANCE_OF_ONE_PASS if scheme == TRANSFORMERS else TOLERANCE
        assert planned == pytest.approx(measured(directory, ids, *flags), rel=within), (scheme, made)
