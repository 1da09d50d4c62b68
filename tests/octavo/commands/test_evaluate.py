"""`octavo evaluate`: models and schemes, converted directories beside what they came from, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.__main__ import main
from octavo.evaluation import harness
from octavo.evaluation.recall import recall

from ...support import TEXTS, assert_one_error_line

pytestmark = pytest.mark.usefixtures("one_thread")

C8 = ("--use_kvcache_quant", "True")
SMALL = ["--windows", "1", "--length", "60", "--lengths", "300", "--trials", "2", "--written", "4", "--prompts", "1"]


def test_schemes_of_a_model(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, text = tmp_path / "found.json", tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS) * 3)
    assert main(["evaluate", str(source), *SMALL, "--eval_file", str(text), "--json", str(file)]) == 0
    captured = capsys.readouterr()
    said = captured.out.splitlines()
    assert [line.split()[0] for line in said[1:4]] == ["float", "int8-token", "octavo-4"]
    found = json.loads(file.read_text())["results"]
    assert list(found) == ["float", "int8-token", "octavo-4"]
    assert found["int8-token"]["text"]["kl"] > 0 and found["int8-token"]["recall"][0]["asked"] == 2
    assert f"{found['octavo-4']['text']['kl']:.5f}" in said[3]
    assert f"text, octavo-4: KL {found['octavo-4']['text']['kl']:.5f}, perplexity" in captured.err


def test_each_measurement_is_told_once_it_is_made(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops before the last keeps what was found till then."""
    asked = iter(range(10))

    def stopped(*arguments: object) -> object:
        if next(asked) == 2:
            raise KeyboardInterrupt
        return recall(*arguments)

    monkeypatch.setattr("octavo.evaluation.evaluating.recall", stopped)
    assert main(["evaluate", str(source), *SMALL]) == 130
    captured = capsys.readouterr()
    told = [line.partition(":")[0] for line in captured.err.replace("\r", "\n").splitlines() if ", " in line]
    names = ["text, int8-token", "text, octavo-4", "writing, int8-token", "writing, octavo-4", "key-value 300, float"]
    assert [name for name in told if name in [*names, "key-value 300, octavo-4"]] == names
    assert "key-value 300, int8-token: " in captured.err and not captured.out


def test_a_converted_directory_beside_its_source(
    source: Path, converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = converted(*C8)
    capsys.readouterr()
    assert main(["evaluate", str(directory), "--reference", str(source), *SMALL]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[2].startswith("tiny quantized") and "the one that comes with Octavo" in said


def test_no_text_and_no_task(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(source), "--windows", "0", "--tasks", "--schemes", "octavo-3"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["bits"]


def test_only_the_reference_is_called_float(
    source: Path, converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the scheme nor a directory of that name takes its row."""
    directory = shutil.copytree(converted(*C8), tmp_path / "float")
    capsys.readouterr()
    assert main(["evaluate", str(directory), "--reference", str(source), *SMALL]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[:2] == ["float", "32.00"] and said[2].startswith("float (converted)")
    assert main(["evaluate", str(source), *SMALL, "--schemes", "float", "int8-token"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[1:3]] == ["float", "int8-token"] and not said[3]
    assert len(said[1].split()) < len(said[2].split())  # no KL of itself


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--schemes", "int8-tokn"], ("int8-tokn", "int8-token")),
        (["--schemes", "ascend-c8"], ("--scheme ascend-c8", "--statistics FILE")),
        (["--reference", "x"], ("--reference", "leave it out")),
        (["--eval_file", "/nowhere.txt"], ("--eval_file /nowhere.txt: cannot be read",)),
        (["--windows", "9999"], ("--eval_file", "tokens", "smaller --windows and --length")),
        (["--length", "100000"], ("--length 100000: the model is made for 4,096 tokens",)),
        (["--trials", "0"], ("--trials 0",)),
        (["--length", "1"], ("--length 1",)),
        (["--last", "60", "--length", "60"], ("--last 60: of --length 60 at most 59 are predicted",)),
        (["--windows", "0", "--eval_file", "x"], ("--eval_file x: is not read with --windows 0",)),
        (["--tasks", "nowhere.yaml"], ("--tasks nowhere.yaml: no such file", "key-value, needles")),
        (["--limit", "3"], ("--limit: is of tasks of lm-eval",)),
        (["--json", "/nowhere/found.json"], ("--json /nowhere/found.json: cannot be written",)),
        (["--statistics", "x.safetensors"], ("--statistics x.safetensors: int8-token, octavo-4 needs no calib",)),
    ],
)
def test_what_cannot_be_measured_of_a_model(
    flags: list[str], parts: tuple[str, ...], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(source), *SMALL[:2], *SMALL[4:], *flags]) == 1
    assert_one_error_line(capsys.readouterr().err, *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ("is converted", "--reference")),
        (["--schemes", "int8-token"], ("--schemes", "a scheme of its own")),
        (["--reference", "{itself}"], ("--reference", "is converted itself")),
    ],
)
def test_what_cannot_be_measured_of_a_converted_directory(
    flags: list[str], parts: tuple[str, ...], converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(converted(*C8))
    capsys.readouterr()
    assert main(["evaluate", directory, *(flag.format(itself=directory) for flag in flags)]) == 1
    assert_one_error_line(capsys.readouterr().err, *parts)


def test_tasks_without_lm_eval(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert main(["evaluate", str(source), "--tasks", "key-valeu"]) == 1
    parts = ("--tasks key-valeu: needs lm-eval;", "pip install lm_eval", "did you mean key-value?")
    assert_one_error_line(capsys.readouterr().err, *parts)
