"""The best schemes of few bits, Octavo's beside others'."""

import csv
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from ..support import REPOSITORY
from .test_quality_tables import record


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/digest_tables.py` with rows of its own."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.setattr(import_module("quality_tables"), "FILE", tmp_path / "quality.csv")
    module = import_module("digest_tables")
    monkeypatch.setattr(module, "FILE", tmp_path / "recall.csv")
    return module


def test_the_best_of_each_kind_stand_beside_one_another(tables: ModuleType, tmp_path: Path) -> None:
    record(
        tmp_path / "quality.csv",
        ("octavo-2", "2", "", 2.6, 0.07),
        ("octavo-2tc", "2", "", 2.4, 0.05),
        ("octavo-2c", "2", "", 2.6, 0.06),
        ("octavo-4", "2", "", 4.6, 0.01),
        ("turboquant-mse-2", "2", "", 2.3, 1.1),
        ("kivi-2", "2", "", 3.9, 0.2),
    )
    with (tmp_path / "recall.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("model", "scheme", "kind", "tokens", "list", "bits", "answers"))
        writer.writerow((tables.MODEL, "octavo-2tc", "words", "1600", "0", "3.0", "+" * 9 + "-"))
        writer.writerow((tables.MODEL, "octavo-2tc", "words", "8192", "1", "3.0", "+-"))
        writer.writerow((tables.MODEL, "octavo-2c", "words", "8192", "1", "3.0", "++"))
        writer.writerow((tables.MODEL, "octavo-2", "words", "8192", "1", "3.0", "--"))
        writer.writerow((tables.MODEL, "float", "words", "1600", "0", "16.0", "+" * 10))
    assert tables.digest_table().splitlines()[-1].endswith(f"{tables.MODEL}."), "at one length float is not measured"
    with (tmp_path / "recall.csv").open("a", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerow((tables.MODEL, "float", "words", "8192", "1", "16.0", "++"))
    lines = tables.digest_table().splitlines()
    assert lines[-1].endswith("of which float finds 100 % (72 to 100) and 100 % (34 to 100).")
    row = "| 2.7 | Octavo, calibrated | `octavo-2tc` | 2.57 | 0.05000 |  | 90 % (60 to 98) | 50 % (9 to 91) |"
    assert lines[-6] == row
    assert lines[-5].startswith("| 2.7 | Octavo, calibrated | `octavo-2c` | 2.60 | 0.06000 |"), "which recalls better"
    assert lines[-4].startswith("| 2.7 | Octavo | `octavo-2` | 2.58 | 0.07000 |"), "that needs no calibration"
    assert any(line.startswith("| 4.7 | others' best | `kivi-2` | 3.8") for line in lines), "of fewer bits, too"
