"""Schemes of others stand beside ours of at most their bits."""

import csv
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from ..support import REPOSITORY


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/quality_tables.py` with rows of its own."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    module = import_module("quality_tables")
    monkeypatch.setattr(module, "FILE", tmp_path / "quality.csv")
    return module


def record(file: Path, *rows: tuple[str, str, str, float, float]) -> None:
    """Write rows of (scheme, windows, text, bits, KL)."""
    rest = {"model": "smollm2-135m", "perplexity": "11", "float_perplexity": "10", "top1": "0.9"}
    fields = ("what", "windows", "text", "bits", "kl")
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, (*rest, *fields))
        writer.writeheader()
        named = (dict(zip(fields, row, strict=True)) for row in rows)
        writer.writerows({**rest, **row, "what": f"float weights + {row['what']}"} for row in named)


def test_a_factor_is_against_the_best_of_ours_with_no_more_bits(tables: ModuleType) -> None:
    assert "No quality" in tables.schemes_tables()
    record(
        tables.FILE,
        ("octavo-4", "2", "wikipedia-eval", 4.553, 0.003),
        ("octavo-4t", "2", "wikipedia-eval", 4.362, 0.006),
        ("octavo-4", "4", "wikipedia-eval", 4.553, 0.5),
        ("octavo-4", "2", "news", 4.553, 0.007),
        ("kivi-4", "2", "wikipedia-eval", 5.749, 0.012),
        ("saw-int4", "2", "wikipedia-eval", 4.5, 0.012),
        ("turboquant-mse-4", "2", "wikipedia-eval", 4.25, 0.012),
    )
    lines = tables.schemes_tables().splitlines()
    cells = {line.split(" | ")[0].strip("| `"): line.split(" | ") for line in lines if line.startswith("| `")}
    assert cells["octavo-4"][2] == "0.00300" and cells["octavo-4"][5] == "0.00700", "of two windows each"
    assert cells["kivi-4"][-2] == "4.0 `octavo-4`" and cells["saw-int4"][-2] == "2.0 `octavo-4t`"
    assert cells["turboquant-mse-4"][-2] == "", "none of ours has as few bits"


def test_bits_are_counted_at_three_lengths(tables: ModuleType) -> None:
    lines = tables.bits_table().splitlines()
    row = next(line for line in lines if line.startswith("| `octavo-4` |"))
    assert row.endswith("| 4.55 | 4.42 | 4.39 | 5.05 |")
    assert not any("`float`" in line for line in lines)
