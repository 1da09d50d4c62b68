"""The tables of a GPU: beside the best of bfloat16, of the newest machine, and failures as what they are."""

import csv
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from ..support import REPOSITORY

DECODE = "decode, batch 8, 32,768 keys, 32/8 heads of 128"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/gpu_tables.py` with results of its own, of which there are none yet."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    module = import_module("gpu_tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def record(directory: Path, *rows: tuple[str, str, str, str, str], error: str = "") -> None:
    """Append rows of (machine, op, case, variant, milliseconds), those without milliseconds with an error."""
    rest = {"commit": "a", "torch": "2.13", "transformers": "5.24", "read_gigabytes_per_s": "3000", "share": "0.5"}
    fields = ("machine", "op", "case", "what", "p50_ms")
    is_new = not (directory / "gpu.csv").exists()
    with (directory / "gpu.csv").open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, (*fields, *rest, "error"))
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow({**dict(zip(fields, row, strict=True)), **rest, "error": "" if row[-1] else error})


def test_without_rows_they_say_so(tables: ModuleType) -> None:
    assert tables.gpu_table() == tables.gpu_digest() == "No run on a GPU is recorded yet."


def test_ours_stand_beside_the_best_of_bfloat16(tables: ModuleType, tmp_path: Path) -> None:
    record(
        tmp_path,
        ("old", "attention", DECODE, "int8, scales per token", "9.0"),
        ("H100", "attention", DECODE, "int8, scales per token", "7.0"),
        ("H100", "attention", DECODE, "SDPA flash bfloat16", "3.0"),
        ("H100", "attention", DECODE, "SDPA bfloat16", "2.0"),
        ("H100", "attention", DECODE, "int8, scales per token", "0.5"),
        ("H100", "attention", DECODE, "fp8, fp8 queries", ""),
        error="it is nan | or so",
    )
    lines = tables.gpu_table().splitlines()
    assert f"| attention | {DECODE} | int8, scales per token | 0.500 | 4.00 | 0.5 |" in lines
    assert f"| attention | {DECODE} | SDPA flash bfloat16 | 3.000 | 0.67 | 0.5 |" in lines
    assert f"| attention | {DECODE} | fp8, fp8 queries | failed: it is nan / or so |  | 0.5 |" in lines
    assert not any("9.0" in line or "7.0" in line for line in lines) and lines[-1].startswith("H100, torch 2.13")
    digest = tables.gpu_digest().splitlines()
    expected = "SDPA bfloat16 | int8, scales per token | 2.00 | 0.50 | 4.00 |"
    assert digest[2] == f"| attention of a token | {DECODE} | {expected}" and len(digest) == 5


def test_ways_of_a_model_stand_in_a_line_and_its_fastest_counts(tables: ModuleType, tmp_path: Path) -> None:
    case = "Llama 8B shape, batch 1, decode at 8,192 tokens"
    record(
        tmp_path,
        ("H100", "model", case, "bf16 + static cache, eager", "30.0"),
        ("H100", "model", case, "bf16 + static cache, graph", "20.0"),
        ("H100", "model", case, "W4A16 + int8-token, eager", "50.0"),
        ("H100", "model", case, "W4A16 + int8-token, graph", "5.0"),
        ("H100", "model", case, "W4A16 + int8-token, compiled", ""),
        error="it did not end",
    )
    lines = tables.gpu_table().splitlines()
    assert f"| {case} | bf16 + static cache | 30.000 | 20.000 |  | 1.00 |" in lines
    assert f"| {case} | W4A16 + int8-token | 50.000 | 5.000 | failed: it did not end | 4.00 |" in lines
    assert "W4A16 + int8-token, graph | 20.00 | 5.00 | 4.00 |" in tables.gpu_digest()


def test_what_has_no_bfloat16_beside_it_has_no_ratio(tables: ModuleType, tmp_path: Path) -> None:
    record(tmp_path, ("H100", "linear", "1 x 2 x 3", "W8A8", "1.0"))
    assert "| linear | 1 x 2 x 3 | W8A8 | 1.000 |  | 0.5 |" in tables.gpu_table().splitlines()
    assert tables.gpu_digest() == "No run on a GPU is recorded yet."
