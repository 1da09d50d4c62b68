"""Conversions that are killed, and go on to the same bytes."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from octavo.common.checkpoints.writer import stage_path
from octavo.common.convert import main
from octavo.models.llama3 import ARCHITECTURE

from ..support import assert_one_error_line, convert_flags, files_below, save_source, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

KILLS = 20
FLAGS = ("--use_kvcache_quant", "True", "--anti_method", "m4", "--fa_amp", "2")


@pytest.fixture(scope="module")
def deep_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of eight layers, so that there is something to go on with."""
    return save_source(tmp_path_factory.mktemp("deep"), tiny_llama(num_hidden_layers=8))


def started(argv: list[str]) -> multiprocessing.Process:
    """A conversion in a process of its own, forked so that it has imported everything."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(argv,))
    process.start()
    return process


def _run(argv: list[str]) -> None:
    tqdm.set_lock(threading.RLock())  # its own lock is shared with forks, and would die with one that holds it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(main(ARCHITECTURE, argv))


def finished_layers(target: Path) -> int:
    """How many layers a conversion has recorded; 0 while there is no record."""
    try:
        return json.loads((stage_path(target) / ".progress" / "progress.json").read_text())["step"]
    except (OSError, ValueError):
        return 0


def assert_same_bytes(target: Path, expected: Path) -> None:
    """Two directories hold the same files."""
    assert files_below(target) == files_below(expected)
    for name in files_below(target):
        assert (target / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.slow
def test_killed_at_random_points_it_resumes_to_the_same_bytes(deep_source: Path, tmp_path: Path) -> None:
    expected, target = tmp_path / "expected", tmp_path / "out"
    began = time.monotonic()
    assert main(ARCHITECTURE, convert_flags(deep_source, expected, *FLAGS)) == 0
    seconds = time.monotonic() - began
    generator, kills, wholes, before = random.Random(0), 0, 0, 0
    while kills < KILLS:
        process = started(convert_flags(deep_source, target, *FLAGS, "--resume"))
        process.join(generator.uniform(0, seconds))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
        if target.exists():  # it was faster than its killer: it is whole, and the next one begins anew
            assert_same_bytes(target, expected)
            target.rename(tmp_path / f"whole {wholes}")
            wholes, before = wholes + 1, 0
            continue
        assert finished_layers(target) >= before, "no finished layer is computed again"
        before = finished_layers(target)
    assert main(ARCHITECTURE, convert_flags(deep_source, target, *FLAGS, "--resume")) == 0
    assert_same_bytes(target, expected)
    assert not stage_path(target).exists()


def test_a_killed_conversion_is_neither_lost_nor_taken_for_another(
    deep_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    process = started(convert_flags(deep_source, target))
    while finished_layers(target) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = files_below(stage_path(target))
    assert main(ARCHITECTURE, convert_flags(deep_source, target)) == 1
    assert_one_error_line(capsys.readouterr().err, "an interrupted conversion is in", "--resume")
    assert main(ARCHITECTURE, convert_flags(deep_source, target, "--resume", "--act_method", "2")) == 1
    assert_one_error_line(capsys.readouterr().err, "--resume", "differs in act_method (1 then, 2 now);")
    assert files_below(stage_path(target)) == kept
    assert main(ARCHITECTURE, convert_flags(deep_source, target, "--resume")) == 0
    assert "going on behind layer" in capsys.readouterr().err


def test_resuming_nothing_says_so(deep_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARCHITECTURE, convert_flags(deep_source, tmp_path / "out", "--resume")) == 0
    assert f"nothing to resume in {stage_path(tmp_path / 'out')}" in capsys.readouterr().err
