"""Conversions that are killed, and go on to the same bytes."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from octavo import ConvertRequest, OctavoError, convert
from octavo.common.convert.api import main
from octavo.common.convert.output.shards import TensorFiles
from octavo.common.convert.output.stage import PROGRESS, read_record, remove_progress
from octavo.common.convert.output.writer import stage_path
from octavo.common.convert.pipeline import Conversion
from octavo.models.llama3 import ARCHITECTURE

from ...support import TEXTS, assert_one_error_line, convert_flags, files_below, save_source, tiny_llama

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
            if (target / PROGRESS).exists():  # but for the last step, which the next conversion into it would do
                assert read_record(target) is None or read_record(target)["whole"]
                remove_progress(target)
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
    assert_one_error_line(capsys.readouterr().err, "--resume", "differs in act_method (minmax then, histogram now);")
    assert files_below(stage_path(target)) == kept
    assert main(ARCHITECTURE, convert_flags(deep_source, target, "--resume")) == 0
    assert "going on behind layer" in capsys.readouterr().err


STOPPED_BEHIND = 5
SMOOTHED = ("--use_kvcache_quant", "True", "--anti_method", "m4")


@pytest.fixture(scope="module")
def whole(deep_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a conversion makes that nothing interrupts."""
    target = tmp_path_factory.mktemp("whole") / "out"
    assert main(ARCHITECTURE, convert_flags(deep_source, target, *SMOOTHED)) == 0
    return target


def stopped(source: Path, target: Path, *flags: str) -> Path:
    """The stage that an interruption in the sixth layer leaves, of the conversion itself, not of a survey before."""
    layer = Conversion.layer

    def interrupted(conversion: Conversion, index: int) -> dict[str, torch.Tensor]:
        if index == STOPPED_BEHIND and any(stage_path(target).glob("quant_model_weight_*")):
            raise KeyboardInterrupt
        return layer(conversion, index)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Conversion, "layer", interrupted)
        assert main(ARCHITECTURE, convert_flags(source, target, *flags)) == 130
    assert finished_layers(target) == STOPPED_BEHIND
    return stage_path(target)


def weights_of(stage: Path) -> Path:
    return min(stage.glob("quant_model_weight_*.safetensors"))


def flip_in(layer: int) -> Callable[[Path], None]:
    """Change a bit in the middle of the q projection of a layer."""

    def change(stage: Path) -> None:
        placed = TensorFiles([weights_of(stage)]).placed[f"model.layers.{layer}.self_attn.q_proj.weight"]
        content = bytearray(placed.file.read_bytes())
        content[placed.offset + 1000] ^= 4
        placed.file.write_bytes(content)

    return change


def flip_header(stage: Path) -> None:
    content = bytearray(weights_of(stage).read_bytes())
    content[40] ^= 4
    weights_of(stage).write_bytes(content)


LAYER_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda stage: None, "going on behind layer 5 of 8"),
    "the first layer": (flip_in(0), "damaged in layers 0: doing them again"),
    "two layers": (lambda stage: (flip_in(4)(stage), flip_in(1)(stage)), "damaged in layers 1, 4: doing them again"),
    "the header": (flip_header, "going on behind layer 5 of 8"),
    "a truncated file": (lambda stage: os.truncate(weights_of(stage), 9_000), ": doing them again"),
    "no file": (lambda stage: weights_of(stage).unlink(), "damaged in layers 0, 1, 2, 3, 4: doing them again"),
    "the record": (
        lambda stage: os.truncate(stage / ".progress" / "progress.json", 50),
        "progress.json is damaged: starting with the first layer",
    ),
    "the state": (
        lambda stage: os.truncate(stage / ".progress" / "state-5.safetensors", 500),
        "state-5.safetensors is damaged: starting with the first layer",
    ),
    "the tokenizer": (lambda stage: (stage / "tokenizer.json").write_text("{"), "going on behind layer 5 of 8"),
}


@pytest.mark.parametrize("damage", LAYER_DAMAGES)
def test_what_is_damaged_of_a_stage_is_done_again(
    damage: str, deep_source: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = LAYER_DAMAGES[damage]
    change(stopped(deep_source, tmp_path / "out", *SMOOTHED))
    capsys.readouterr()
    assert main(ARCHITECTURE, convert_flags(deep_source, tmp_path / "out", *SMOOTHED, "--resume")) == 0
    captured = capsys.readouterr().err
    assert says in captured and "Traceback" not in captured
    assert_same_bytes(tmp_path / "out", whole)


def test_what_is_not_damaged_is_not_done_again(
    deep_source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(deep_source, tmp_path / "out", *SMOOTHED)
    layer, done = Conversion.layer, []
    monkeypatch.setattr(Conversion, "layer", lambda self, index: done.append(index) or layer(self, index))
    assert main(ARCHITECTURE, convert_flags(deep_source, tmp_path / "out", *SMOOTHED, "--resume")) == 0
    assert done == [5, 6, 7]
    assert_same_bytes(tmp_path / "out", whole)


@pytest.mark.slow
def test_a_layer_of_codebooks_in_one_of_several_files_is_done_again(
    deep_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With files as small as they get, codes that need all tokens of a layer, and codebooks of the whole model."""
    monkeypatch.setattr("octavo.common.convert.run.GIGABYTE", 100_000)
    flags = ("--scheme", "kvquant-4", "--w_method", "GPTQ", "--is_dynamic", "True", "--part_file_size", "1")
    assert main(ARCHITECTURE, convert_flags(deep_source, tmp_path / "whole", *flags)) == 0
    stage = stopped(deep_source, tmp_path / "out", *flags)
    parts = sorted(stage.glob("quant_model_weight_*.safetensors"))
    assert len(parts) > 4
    parts[1].unlink()
    assert main(ARCHITECTURE, convert_flags(deep_source, tmp_path / "out", *flags, "--resume")) == 0
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


def test_which_layers_are_sharp_is_kept(deep_source: Path, tmp_path: Path) -> None:
    flags = ("--scheme", "octavo-2tc")
    assert main(ARCHITECTURE, convert_flags(deep_source, tmp_path / "whole", *flags)) == 0
    stopped(deep_source, tmp_path / "out", *flags)
    assert main(ARCHITECTURE, convert_flags(deep_source, tmp_path / "out", *flags, "--resume")) == 0
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


def test_resuming_nothing_says_so(deep_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARCHITECTURE, convert_flags(deep_source, tmp_path / "out", "--resume")) == 0
    assert f"nothing to resume in {stage_path(tmp_path / 'out')}" in capsys.readouterr().err


def test_what_the_script_began_goes_on_in_python_and_the_other_way_round(
    deep_source: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Requests that are equal but for where they are written are one job, however they are spelled."""
    asked = {"scheme": "ascend-c8", "anti_method": "m4", "calibration": TEXTS}
    stopped(deep_source, tmp_path / "out", *SMOOTHED)
    with pytest.raises(OctavoError, match=r"^resume=True: .* differs in anti_method \(m4 then, m1 now\)"):
        convert(ConvertRequest(deep_source, tmp_path / "out", resume=True, **(asked | {"anti_method": "m1"})))
    with pytest.raises(OctavoError, match=r"^output .* is in .*; give resume=True, or remove it$"):
        convert(ConvertRequest(deep_source, tmp_path / "out", **asked))
    convert(ConvertRequest(deep_source, tmp_path / "out", resume=True, **asked))
    assert "going on behind layer 5 of 8" in capsys.readouterr().err
    assert_same_bytes(tmp_path / "out", whole)


def test_a_report_of_a_resumed_conversion_has_the_costs_of_the_survey(deep_source: Path, tmp_path: Path) -> None:
    stopped_flags = ("--use_kvcache_quant", "True", "--fa_amp", "2")
    asked = {"scheme": "ascend-c8", "float_costliest": 2, "calibration": TEXTS}
    expected = convert(ConvertRequest(deep_source, tmp_path / "whole", **asked))
    stopped(deep_source, tmp_path / "out", *stopped_flags)
    found = convert(ConvertRequest(deep_source, tmp_path / "out", resume=True, **asked))
    assert found.costs == expected.costs and found.chosen_floats == expected.chosen_floats
    assert found.fidelity == expected.fidelity
