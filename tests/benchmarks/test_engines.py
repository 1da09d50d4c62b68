"""How whole models are measured beside other engines: the protocol, turns, medians, and what is skipped and why."""

import csv
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ..support import REPOSITORY

WORKER = Path(__file__).with_name("fake_engine.py")
Modules = Callable[[str], ModuleType]
Run = Any


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Modules:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return import_module


@pytest.fixture
def new_run(modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Makes a run of fake engines, each with a way of its own, on a model that is a folder."""
    cases, files, turns = modules("engine_cases"), modules("engine_files"), modules("engine_turns")
    fakes = {
        "fake": cases.Engine(str(WORKER)),
        "missing": cases.Engine(str(WORKER), "not-made"),
        "transformers": cases.Engine(str(WORKER)),
    }
    for module in (cases, files, turns):
        if hasattr(module, "ENGINES"):
            monkeypatch.setattr(module, "ENGINES", fakes)
    monkeypatch.setattr(turns, "WINDOW", 8)
    monkeypatch.setattr(turns, "RESULTS", tmp_path / "results")
    floats = cases.Contender("float", "transformers", cases.FLOAT, preparing={"how": "works"})
    monkeypatch.setattr(turns, "CONTENDERS", (floats,))
    monkeypatch.setattr(turns.Run, "text", lambda self, model: torch.arange(400) % 11)
    source = tmp_path / "tiny"
    source.mkdir(exist_ok=True)

    def make(*contenders: tuple[str, str], **changes: Any) -> Run:
        asked = [cases.Contender(how, engine, cases.EIGHT, preparing={"how": how}) for engine, how in contenders]
        settings: dict[str, Any] = {
            "contenders": asked, "contexts": [20, 40], "rounds": [3, 1], "new": 5, "batch": 1, "threads": 1,
            "isa": "native", "windows": 2, "turns": 1000, "tries": 1, "again": False, "work": tmp_path / "work",
            "environments": tmp_path / "environments", "calib_file": tmp_path / "calibration",
        }  # fmt: skip
        return turns.Run(Namespace(**{**settings, **changes}), [files.Model("tiny", source)])

    return make


def test_turns_are_kept_and_rows_are_medians(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run = new_run(("fake", "works"), ("fake", "flat"), turns=3)
    assert run.prepare() and run.score()
    assert not run.time(), "three of eight turns"
    run = new_run(("fake", "works"), ("fake", "flat"))
    lines = (tmp_path / "work" / "journal-native.jsonl").read_text(encoding="utf-8").splitlines()
    keys = [json.loads(line)["key"] for line in lines[1:]]
    order = [(key[2], key[-1]) for key in keys if key[0] == "time"]
    assert order == [("works", 0), ("flat", 0), ("works", 1)], "rounds go over the contenders"
    assert run.time() and run.report()
    with (tmp_path / "results" / "engines.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["contender"], row["context"], row["rounds"], row["steps"]) for row in rows] == [
        ("works", "20", "3", "15"), ("flat", "20", "3", "15"), ("works", "40", "1", "5"), ("flat", "40", "1", "5"),
    ]  # fmt: skip
    assert all(float(row["step_ms"]) == pytest.approx(1) for row in rows)
    assert [float(row["first_s"]) for row in rows] == pytest.approx([0.02, 0.02, 0.04, 0.04])
    assert float(rows[0]["kl"]) == 0 < 0.1 < float(rows[1]["kl"])
    assert rows[0]["system"] == "fake 1.0" and not rows[0]["note"]


def test_what_is_missing_or_fails_is_told_with_its_reason(
    new_run: Callable[..., Run], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = new_run(("missing", "works"), ("fake", "refuses"), ("fake", "dies"), contexts=[20], rounds=[2])
    assert run.prepare() and run.time() and run.report()
    said = capsys.readouterr().out
    run.tell_failures()
    assert capsys.readouterr().out.count("no figure: ") == 3
    assert "works is skipped: no environment" in said and "make bench-engines" in said
    assert "refuses is skipped: prepare: ValueError: cannot be prepared; see" in said
    assert said.count("dies is skipped: measure: died (3)") == 1, "it is not tried in the second round"
    rows = (tmp_path / "results" / "engines.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(rows) == 3 and all(reason in row for reason, row in zip(("no env", "cannot", "died"), rows, strict=True))


def test_a_worker_that_hangs_is_ended(modules: Modules, tmp_path: Path) -> None:
    process = modules("engine_process")
    (tmp_path / "how").write_text("hangs", encoding="utf-8")
    with process.EngineProcess([sys.executable, str(WORKER)], os.environ, tmp_path / "log") as worker:
        sizes = {"tokens": 4, "batch": 1, "threads": 1}
        assert worker.ask("load", 30, directory=str(tmp_path), **sizes) == "fake 1.0"
        assert worker.peak is None or worker.peak > 1e6
        with pytest.raises(process.EngineFailure, match=r"measure: took more than 0\.2 s"):
            worker.ask("measure", 0.2, prompts=[[1]], new=1)
    assert "no part of the protocol" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_journal_of_other_code_is_refused(modules: Modules, tmp_path: Path) -> None:
    journal, file = modules("engine_turns").Journal, tmp_path / "journal.jsonl"
    journal(file, {"code": "a", "isa": "native"}).add("time", "model", 0, first=1.5)
    assert journal(file, {"code": "a", "isa": "native"}).get("time", "model", 0)["first"] == 1.5
    with pytest.raises(SystemExit, match="is of another code; --again starts it anew"):
        journal(file, {"code": "b", "isa": "native"})
    assert journal(file, {"code": "b", "isa": "native"}, again=True).get("time", "model", 0) is None


def test_divergence_is_of_the_predictions_behind_the_prompt(modules: Modules, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 4, 7)).astype(np.float32)
    for name, values in zip(("expected", "actual"), logits, strict=True):
        np.save(tmp_path / f"{name}.npy", values)
    kl, _ = modules("engine_turns").divergence(
        [tmp_path / "expected.npy"], [tmp_path / "actual.npy"], [[0, 1, 2, 3, 4, 5, 6, 0]]
    )
    expected, actual = (torch.from_numpy(values[:3]).double().log_softmax(-1) for values in logits)
    assert kl == pytest.approx(float((expected.exp() * (expected - actual)).sum(-1).mean()))


def test_the_table_has_the_least_of_each_kind_in_bold(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, rows = modules("engine_tables"), modules("rows")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "No engine is measured" in tables.engines_table()

    def record(isa: str, kind: str, contender: str, context: int, step: str, **more: str) -> dict[str, str]:
        common = dict.fromkeys(modules("engine_turns").COLUMNS, "") | {"machine": "m", "threads": "2", "model": "tiny"}
        return common | {
            "isa": isa, "batch": "1", "kind": kind, "contender": contender, "context": str(context), "step_ms": step,
        } | more  # fmt: skip

    found = [
        record("native", "8 bit", "ours", 2048, "99", kl="0.5"),
        record("native", "8 bit", "ours", 2048, "8.04", kl="0.003", first_s="1.5"),
        record("native", "8 bit", "ours", 8192, "20"),
        record("native", "8 bit", "theirs", 2048, "9", kl="0.004", first_s="0.5", system="theirs 1.0"),
        record("native", "8 bit", "theirs", 8192, "", note="it died"),
        record("native", "4 bit", "ours, 4", 2048, "10"),
        record("avx2", "8 bit", "theirs", 2048, "12"),
    ]
    rows.append_rows(tmp_path / "engines.csv", modules("engine_turns").COLUMNS, found)
    _, _, ours, theirs, fours, _, conditions = tables.engines_table().splitlines()
    assert ours == "| tiny | 8 bit | ours | **8.0** | 20.0 | 1.50 |  | **0.0030** |", "the newest row counts"
    assert theirs == "| tiny | 8 bit | theirs | 9.0 |  | **0.50** |  | 0.0040 |"
    assert fours == "| tiny | 4 bit | ours, 4 | 10.0 |  |  |  |  |"
    assert "m, 2 CPU threads, batch 1; theirs 1.0." in conditions and "No figure: theirs, tiny: it died." in conditions
    assert "| 12.0 |" in tables.other_engines_tables() and "limited to AVX2" in tables.other_engines_tables()
