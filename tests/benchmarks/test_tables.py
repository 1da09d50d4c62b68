"""README's numbers come from the committed results."""

import csv
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from ..support import REPOSITORY


def test_readme_says_what_the_results_say() -> None:
    done = subprocess.run([sys.executable, str(REPOSITORY / "benchmarks" / "tables.py"), "--check"])
    assert done.returncode == 0, "run: python benchmarks/tables.py"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/tables.py` with results of its own, of which there are none yet."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    module = import_module("tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def record(file: Path, *rows: tuple[str, str, str, str, str, float]) -> None:
    """Write rows of (commit, machine, op, case, variant, milliseconds)."""
    fields = ("commit", "machine", "op", "case", "what", "p50_ms")
    rest = {"threads": "2", "torch": "2.13", "transformers": "5.23", "read_gigabytes_per_s": "20", "share": "0.50"}
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, (*fields, *rest))
        writer.writeheader()
        writer.writerows({**dict(zip(fields, row, strict=True)), **rest} for row in rows)


def test_tables_without_results_say_so(tables: ModuleType, tmp_path: Path) -> None:
    assert "not measured" in tables.results_table()
    assert "No run" in tables.ops_table("cpu.csv")
    record(tmp_path / "cpu.csv", ("a", "m", "codec", "1 token", "static int8", 1.0))
    assert tables.ops_table("cpu.csv").count("\n") == 3, "a table without rows, and its conditions"
    assert "not measured" in tables.results_table()


def test_a_table_is_of_one_machine_and_a_case_of_one_commit(tables: ModuleType, tmp_path: Path) -> None:
    record(
        tmp_path / "cpu.csv",
        ("a", "old", "linear", "1 x 2 x 3", "W8A8", 1.0),
        ("a", "old", "linear", "1 x 2 x 3", "F.linear float32", 9.0),
        ("a", "new", "attention", "decode", "renamed since", 4.0),
        ("a", "new", "attention", "decode", "SDPA float32", 9.0),
        ("b", "new", "attention", "decode", "int8", 2.0),
        ("b", "new", "attention", "decode", "SDPA float32", 5.0),
        ("b", "new", "attention", "decode", "SDPA bfloat16", 4.0),
    )
    head, _, row, _, conditions = tables.ops_table("cpu.csv").splitlines()
    assert row == "| attention | decode | int8 | 2.000 | 0.50 | 2.00 | SDPA bfloat16 |"
    assert head.count("|") == row.count("|") and conditions.startswith("new, 2 CPU threads")


def test_memory_stands_beside_that_of_float(tables: ModuleType, tmp_path: Path) -> None:
    table = tables.TABLES["benchmarks/README.md"]["memory"]
    assert table() == "Not measured yet."
    rest = {"machine": "m", "threads": "2", "torch": "2.13", "transformers": "5.24", "model": "tiny"}
    sizes = dict.fromkeys(("weights_mb", "cache_mb", "loaded_mb", "end_mb", "end_anonymous_mb"), "100.0")
    cases = [("float", "1500.0"), ("quickstart", "9.0"), ("quickstart", "600.0")]
    with (tmp_path / "memory.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, (*rest, *sizes, "case", "peak_mb"))
        writer.writeheader()
        writer.writerows({**rest, **sizes, "case": case, "peak_mb": peak} for case, peak in cases)
    assert "| tiny | quickstart | 100 | 100 | 100 | 600 | 100 | 100 | 0.40 |" in table().splitlines()
