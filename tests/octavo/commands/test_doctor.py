"""`octavo doctor`: from weights alone, and with what is measured."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.__main__ import main
from octavo.common.convert.calibration.texts import default_texts
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.recommending import measuring
from octavo.recommending.measuring import CALIBRATED, OWN

from ...support import assert_one_error_line, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--measure", "--length", "60"]


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    """The measured part of the data."""
    assert main(["doctor", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["measured"]


def test_without_measure_nothing_is_read_but_weights(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(source)]) == 0
    said = capsys.readouterr().out
    assert "for 4 bits: octavo-4" in said and "KL" not in said
    assert main(["doctor", str(source), "--json"]) == 0
    assert "measured" not in json.loads(capsys.readouterr().out)


def test_the_usual_schemes_are_measured_until_one_passes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict = measured(capsys, str(source), *SMALL, "--kl", "1e-9")
    plain, *rows = strict["results"]
    assert plain["scheme"] == "float" and plain["bits"] == 32 and {row["scheme"] for row in rows} <= set(OWN)
    bits = [row["bits"] for row in rows]
    assert bits == sorted(bits) and not any(row["passes"] for row in rows) and len(rows) > 5
    for row in rows:
        counted = kv_bits_per_element(tiny_config(), load_scheme(row["scheme"]), 8192)
        assert row["bits"] == pytest.approx(counted)
    nearest = min(rows, key=lambda row: row["fidelity"]["kl"])
    assert f"the nearest is {nearest['scheme']}" in strict["advice"]

    second = rows[1]["fidelity"]["kl"]
    found = measured(capsys, str(source), *SMALL, "--kl", str(max(second, nearest["fidelity"]["kl"])))["results"]
    assert found[-1]["passes"] and not any(row["passes"] for row in found[:-1])
    assert [row["fidelity"] for row in found[1:]] == [row["fidelity"] for row in rows[: len(found) - 1]]


def test_calibrated_schemes_are_measured_beside_the_usual_ones(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "own texts.txt"
    texts.write_text("\n".join(default_texts()[:20]), encoding="utf-8")
    found = measured(capsys, str(source), *SMALL, "--kl", "1e-9", "--calibrate")
    assert {row["scheme"] for row in found["results"]} == {"float", *OWN, *CALIBRATED}
    kls = {row["scheme"]: row["fidelity"]["kl"] for row in found["results"][1:]}
    assert kls["octavo-2c"] < kls["octavo-2"] and kls["octavo-2tc"] < kls["octavo-2t"]

    words = [*SMALL, "--kl", "9", "--calibrate", "--calib_file", str(texts), "--schemes", "octavo-2c", "int8-token"]
    found = measured(capsys, str(source), *words)
    assert f"--scheme octavo-2c --calib_file '{texts}' --save_directory" in found["advice"]
    assert found["conditions"]["calib_file"] == str(texts)
    assert found["results"][1]["fidelity"]["kl"] != kls["octavo-2c"], "other texts give another basis"

    assert main(["doctor", str(source), *SMALL, "--kl", "9"]) == 0
    assert "--calibrate measures them, too" in " ".join(capsys.readouterr().out.split())


def test_all_that_are_named_are_measured_and_the_fewest_bits_that_pass_are_advised(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--schemes", "int8-token", "octavo-4", "float", "--kl", "9", "--context", "2048"]
    assert main(["doctor", str(source), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(lines) if "bytes a token" in line)
    rows = [line.split() for line in lines[start + 1 : start + 4]]
    assert [row[0] for row in rows] == ["float", "octavo-4", "int8-token"] and rows[1][-1] == rows[2][-1] == "passes"
    assert rows[1][1] == f"{kv_bits_per_element(tiny_config(), load_scheme('octavo-4'), 2048):.2f}"
    assert "bits: of an element of K and V in sequences of 2,048 tokens" in "\n".join(lines)
    assert lines[-1].startswith(
        f"Choose octavo-4: of those measured the fewest bits, {rows[1][1]}, with a KL of 9 at most"
    )
    assert re.search(
        r"octavo convert '.*tiny llama' --scheme octavo-4 --save_directory '.*tiny llama-octavo-4'$", lines[-1]
    )


def test_recall_is_asked_of_those_that_keep_the_kl_and_decides(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    evaluate = measuring.evaluate

    def counted(reference: object, others: dict, plan: measuring.Plan, *rest: object) -> dict:
        found = evaluate(reference, others, plan, *rest)
        if plan.tasks:
            (name,) = found
            asked.append(name)
            found[name].recall = {("key-value", 300): measuring.Score(0 if name == "octavo-4" else 2, 2)}
        return found

    monkeypatch.setattr(measuring, "evaluate", counted)
    words = [
        *SMALL,
        "--schemes",
        "octavo-2",
        "octavo-4",
        "octavo-8",
        "--recall",
        "10",
        "--lengths",
        "300",
        "--trials",
        "2",
    ]
    kls = {
        row["scheme"]: row["fidelity"]["kl"]
        for row in measured(capsys, str(source), *words, "--kl", "9")["results"][1:]
    }
    asked.clear()
    found = measured(capsys, str(source), *words, "--kl", str((kls["octavo-2"] + kls["octavo-4"]) / 2))
    assert asked == ["float", "octavo-4", "octavo-8"]
    faults = {row["scheme"]: row["fault"] for row in found["results"]}
    assert faults == {"float": "", "octavo-2": "KL", "octavo-4": "recall", "octavo-8": ""}
    assert found["advice"].startswith("Choose octavo-8:") and found["conditions"]["recall"] == 10


def test_usual_schemes_that_the_model_does_not_bear_are_left_out(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "OWN", ("ascend-c8", "int8-token"))
    assert main(["doctor", str(source), *SMALL, "--json"]) == 0
    captured = capsys.readouterr()
    assert "ascend-c8: left out: " in captured.err
    assert [row["scheme"] for row in json.loads(captured.out)["measured"]["results"]] == ["float", "int8-token"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--kl", "0.1"], ("--kl: is of --measure", "leave it out")),
        (["--calibrate"], ("--calibrate: is of --measure", "leave it out")),
        ([*SMALL, "--calib_file", "T"], ("--calib_file: is of --calibrate", "leave it out")),
        ([*SMALL, "--calibrate", "--calib_file", "T"], ("--calib_file T: cannot be read",)),
        ([*SMALL, "--trials", "5"], ("--trials: is of --recall POINTS", "leave it out")),
        ([*SMALL, "--schemes", "octavo-44"], ("octavo-44", "did you mean octavo-4")),
        ([*SMALL, "--schemes", "float"], ("--schemes: there is nothing to measure beside float",)),
        ([*SMALL, "--schemes", "ascend-c8"], ("--scheme ascend-c8", "--statistics FILE")),
        ([*SMALL, "--eval_file", "/nowhere"], ("--eval_file /nowhere: cannot be read",)),
        ([*SMALL, "--windows", "99999"], ("--eval_file: the text has", "smaller --windows and --length")),
        (["--measure", "--length", "9999"], ("--length 9999: the model is made for 4,096 tokens",)),
        ([*SMALL, "--recall", "5", "--lengths", "60", "--kl", "9"], ("--lengths 60: too short",)),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    flags: list[str], parts: tuple[str, ...], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(source), *flags]) == 1
    assert_one_error_line(capsys.readouterr().err, *parts)


def test_a_converted_directory_is_refused_before_anything_is_measured(
    converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = converted("--use_kvcache_quant", "True")
    capsys.readouterr()
    assert main(["doctor", str(directory), *SMALL]) == 1
    assert_one_error_line(capsys.readouterr().err, "is quantized already; give the float checkpoint")
