"""`benchmarks/gpu.sh` as far as it goes without a GPU: the same cases in tiny shapes, failures, cuts and resumption."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ..support import REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    module = import_module("gpu")
    monkeypatch.setattr(module, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(module, "copy_bandwidth", lambda device: 1e9)
    return module


def bench_of(gpu: ModuleType, results: Path, *only: str) -> Any:
    return gpu.Bench(argparse.Namespace(device="cpu", results=results, only=list(only)))


def rows_of(gpu: ModuleType, results: Path) -> list[dict[str, str]]:
    return gpu.read_rows(results / "gpu.csv")


def case_of(gpu: ModuleType, **makes: Any) -> Any:
    """A case of variants by name."""

    def variants(device: torch.device) -> Iterator[Any]:
        for what, make in makes.items():
            yield gpu.Measured(what, make)

    return gpu.GpuCase("attention", "a case", variants)


def works() -> tuple[Any, int]:
    return (lambda: torch.ones(3).sum()), 12


def fails() -> tuple[Any, int]:
    raise RuntimeError("no such kernel\nand more")


@pytest.mark.parametrize("step", ["decode", "prefill", "Llama tiny"])
def test_every_variant_of_a_step_is_measured(gpu: ModuleType, tmp_path: Path, step: str) -> None:
    cases = gpu.STEPS["cpu"][step].cases
    bench_of(gpu, tmp_path).work(cases)
    rows = rows_of(gpu, tmp_path)
    named = [measured.what for case in cases for measured in case.variants(torch.device("cpu"))]
    assert [row["what"] for row in rows] == named
    assert not [row["error"] for row in rows if row["error"]]
    assert all(float(row["p50_ms"]) > 0 and float(row["megabytes"]) > 0 for row in rows)


def test_a_failure_is_a_row_and_the_others_are_measured(gpu: ModuleType, tmp_path: Path) -> None:
    bench_of(gpu, tmp_path).work([case_of(gpu, one=works, two=fails, three=works)])
    one, two, three = rows_of(gpu, tmp_path)
    assert one["p50_ms"] and three["p50_ms"] and not two["p50_ms"]
    assert two["error"] == "RuntimeError: no such kernel"


def test_what_has_a_row_of_this_code_is_not_measured_again_unless_it_is_named(gpu: ModuleType, tmp_path: Path) -> None:
    bench_of(gpu, tmp_path).work([case_of(gpu, one=works)])
    bench_of(gpu, tmp_path).work([case_of(gpu, one=fails, two=works)])
    assert [row["what"] for row in rows_of(gpu, tmp_path)] == ["one", "two"]
    bench_of(gpu, tmp_path, "a case, two").work([case_of(gpu, one=fails, two=works)])
    assert [row["what"] for row in rows_of(gpu, tmp_path)] == ["one", "two", "two"]
    other = bench_of(gpu, tmp_path)
    other.common["code"] = "of another commit"
    other.work([case_of(gpu, one=works)])
    assert [row["what"] for row in rows_of(gpu, tmp_path)] == ["one", "two", "two", "one"]


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("time.sleep(600)", "it did not end within the 5 s of its step"),
        ("os.abort() if not rows.exists() else None", "its process ended with -6"),
    ],
)
def test_what_hangs_or_dies_is_a_row_and_the_step_goes_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, error: str
) -> None:
    bench, worker = bench_of(gpu, tmp_path), tmp_path / "worker.py"
    worker.write_text(
        "import os, pathlib, time\n"
        f"running, rows = pathlib.Path({str(bench.running)!r}), pathlib.Path({str(bench.file)!r})\n"
        "if not rows.exists(): running.write_text('linear\\na case\\none')\n"
        f"{end}\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(worker))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    began = time.monotonic()
    gpu.run_step(bench, "linears", 5)
    assert time.monotonic() - began < 300
    (row,) = rows_of(gpu, tmp_path)
    assert (row["op"], row["what"], row["error"]) == ("linear", "one", error)


@pytest.mark.slow
def test_the_script_runs_what_is_named_and_leaves_rows_and_a_log(tmp_path: Path) -> None:
    script = REPOSITORY / "benchmarks" / "gpu.sh"
    done = subprocess.run(
        [script, "--device", "cpu", "--only", "decode, tiny, int8, scales per token"],
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "GPU_SECONDS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "gpu.csv").read_text().count("scales per token") == 1
    assert "== ended" in (tmp_path / "gpu.log").read_text()
