"""`octavo compare`: results that are kept and taken up again, presets, a page, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.__main__ import main
from octavo.comparing import conversions, measuring
from octavo.evaluation.evaluating import evaluate

from ...support import TEXTS, assert_one_error_line

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--windows", "1", "--length", "60", "--lengths", "300", "--trials", "2", "--written", "4", "--prompts", "1"]
NAMES = ["int8-token", "octavo-2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(TEXTS) * 3)
    return file


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is measured from here on."""
    found: list[str] = []

    def counted(
        reference: object, others: dict[str, object], plan: object, with_float: bool, expected: object
    ) -> object:
        found.extend(["float"] if with_float else others)
        return evaluate(reference, others, plan, with_float, expected)

    monkeypatch.setattr(measuring, "evaluate", counted)
    return found


def test_results_are_laid_out_and_the_same_command_measures_nothing_again(
    source: Path, text: Path, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "an output"
    command = [
        "compare",
        str(source),
        "--out",
        str(out),
        *SMALL,
        "--eval_file",
        str(text),
        "--max_kl",
        "9",
        "--schemes",
    ]
    assert main([*command, *NAMES]) == 0
    said = capsys.readouterr().out
    assert measured == ["float", "float", "int8-token", "int8-token", "octavo-2", "octavo-2"]
    data = json.loads((out / "results.json").read_text())
    assert [found["name"] for found in data["results"]] == ["float", *NAMES] and data["choice"] == "int8-token"
    float_found, int8, int2 = data["results"]
    assert int8["text"]["kl"] > 0 and int8["lengths"]["300"]["recall"][0]["asked"] == 2
    assert float_found["lengths"]["300"]["cache_bytes"] > int8["lengths"]["300"]["cache_bytes"] > 0
    assert int2["lengths"]["300"]["cache_bytes"] > int8["lengths"]["300"]["cache_bytes"], "it keeps tokens in float"
    assert float_found["bits"] == 32 and float_found["planned_cache_bytes"]["256"] > int8["planned_cache_bytes"]["256"]
    assert f"{int8['text']['kl']:.5f}" in said and "Choose int8-token" in said and said.endswith("index.html\n")
    written = (out / "index.html").read_text()
    assert (
        "Choose int8-token" in written
        and "1 window of 60 tokens" in written
        and "text: text.txt" in written
        and "Choose" in (out / "results.md").read_text()
    )

    measured.clear()
    assert main([*command, *NAMES]) == 0
    assert measured == [] and capsys.readouterr().out == said and (out / "index.html").read_text() == written


def test_what_was_cut_off_goes_on_and_other_conditions_are_measured_again(
    source: Path, text: Path, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(source, model)
    command = [
        "compare",
        str(model),
        "--out",
        str(out),
        *SMALL[:4],
        "--tasks",
        "--written",
        "0",
        "--eval_file",
        str(text),
    ]
    assert main([*command, "--schemes", "int8-token"]) == 0
    measured.clear()
    assert main([*command, "--schemes", *NAMES]) == 0
    assert measured == ["octavo-2"]

    (out / "results" / "int8-token.json").write_text('{"name": "int8-')
    measured.clear()
    capsys.readouterr()
    assert main([*command, "--schemes", *NAMES]) == 0
    assert measured == ["int8-token"] and "int8-token.json cannot be read" in capsys.readouterr().err

    measured.clear()
    assert main([*command, "--schemes", *NAMES, "--length", "50"]) == 0
    assert measured == ["float", *NAMES] and "octavo-2: measured again: other length" in capsys.readouterr().err

    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())
    measured.clear()
    assert main([*command, "--schemes", "octavo-2", "--length", "50"]) == 0
    assert measured == ["float", "octavo-2"] and "float: measured again: other model" in capsys.readouterr().err


def test_a_version_of_other_code_is_measured_again(
    source: Path, text: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", str(source), "--out", str(tmp_path / "out"), *SMALL[:4], "--tasks", "--eval_file", str(text)]
    command += ["--written", "0", "--schemes"]
    assert main(command) == 0
    monkeypatch.setattr(measuring, "VERSION", "0.0.1")
    measured.clear()
    assert main(command) == 0
    assert measured == ["float"]


def test_a_preset_is_converted_for_the_time(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["compare", str(source), "--out", str(out), *SMALL[:4], "--tasks", "--eval_file", str(text)]
    assert main([*command, "--written", "0", "--schemes", "int8-token", "--presets", "four-bit"]) == 0
    found = {each["name"]: each for each in json.loads((out / "results.json").read_text())["results"]}
    assert list(found) == ["float", "int8-token", "preset four-bit"]
    preset = found["preset four-bit"]
    assert preset["text"]["kl"] > 0 and preset["weight_bytes"] < found["float"]["weight_bytes"]
    assert sorted(file.name for file in out.iterdir()) == ["index.html", "results", "results.json", "results.md"]
    assert (out / "results" / "preset-four-bit.json").is_file()


def test_what_each_option_adds_is_told(
    source: Path, text: Path, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps are measured beside the whole, and stand in none of the other tables."""
    out = tmp_path / "out"
    command = ["compare", str(source), "--out", str(out), *SMALL[:4], "--tasks", "--eval_file", str(text)]
    command += ["--written", "0", "--schemes", "int8-token", "--options", "octavo-2", "eight-bit"]
    assert main(command) == 0
    steps = ["octavo-2 up to codes", "octavo-2 up to rotation", "octavo-2 up to sinks", "octavo-2"]
    steps += ["eight-bit up to cache", "eight-bit up to linears", "preset eight-bit"]
    assert measured == ["float", "int8-token", *steps]
    data = json.loads((out / "results.json").read_text())
    results = {each["name"]: each for each in data["results"]}
    found = data["options"]["eight-bit"]
    assert [each["option"] for each in found] == ["cache", "linears", "embeddings"]
    assert found[-1]["kl"] == results["preset eight-bit"]["text"]["kl"]
    assert found[0]["kl"] == pytest.approx(results["int8-token"]["text"]["kl"], rel=1e-3), "the same, but converted"
    plain = results["float"]
    size = plain["weight_bytes"] + max(plain["planned_cache_bytes"].values())
    assert sum(each["saves"] for each in found) == pytest.approx(size / 1e6 - found[-1]["megabytes"])
    assert len(data["options"]["octavo-2"]) == 4 and not (out / "converted").exists()
    said, written = capsys.readouterr().out, (out / "results.md").read_text()
    assert "up to" not in said and "up to" not in written and "## What each option of eight-bit adds" in written
    assert "What each option of octavo-2 adds" in (out / "index.html").read_text()


def test_a_conversion_outlives_what_cuts_its_measurement_off(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["compare", str(source), "--out", str(out), *SMALL[:4], "--tasks", "--eval_file", str(text)]
    command += ["--written", "0", "--schemes", "--presets", "eight-bit"]
    with monkeypatch.context() as cut:
        cut.setattr(measuring, "_planned", lambda speaker: 1 / 0 if speaker.scheme.name != "float" else {256: 1})
        assert main(command) == 1
    assert len(list((out / "converted").glob("*/eight-bit/config.json"))) == 1
    monkeypatch.setattr(conversions, "converted", lambda request: pytest.fail("it is converted already"))
    assert main(command) == 0
    assert not (out / "converted").exists()


def test_all_leaves_out_what_needs_statistics_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from octavo.comparing.candidates import scheme_names

    names = scheme_names(["all"], None)
    assert "octavo-2" in names and "ascend-c8" not in names and "float" not in names
    assert "left out, as they need --statistics FILE: ascend-c8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--schemes", "int8-tokn"], ("int8-tokn", "did you mean int8-token")),
        (["--schemes", "ascend-c8"], ("--scheme ascend-c8", "--statistics FILE")),
        (["--presets", "eight-bt"], ("preset eight-bt", "did you mean eight-bit")),
        (["--options", "octavo-22"], ("--options octavo-22", "did you mean octavo-2")),
        (["--trials", "0"], ("--trials 0",)),
        (["--out", "{source}/config.json"], ("--out", "no directory can be made there")),
        (["--schemes", "{twin}", "{twin}", "int8-token"], ("two are called int8-token",)),
    ],
)
def test_what_cannot_be_compared(
    flags: list[str], parts: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = tmp_path / "mine.json"
    main(["schemes", "int8-token", "--json"])
    twin.write_text(json.dumps(json.loads(capsys.readouterr().out)["definition"]))
    given = [flag.format(source=source, twin=twin) for flag in flags]
    assert main(["compare", str(source), "--out", str(tmp_path / "out"), *SMALL, *given]) == 1
    assert_one_error_line(capsys.readouterr().err, *parts)


def test_a_converted_directory_is_not_what_it_takes(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = converted("--use_kvcache_quant", "True")
    capsys.readouterr()
    assert main(["compare", str(directory), "--out", str(tmp_path / "out")]) == 1
    assert_one_error_line(capsys.readouterr().err, "is converted; compare takes the float model", "--reference")


@pytest.mark.parametrize(
    ("flags", "parts"), [(["--max_kl", "-1"], ("--max_kl", "'-1' is no positive number")), ([], ("--out",))]
)
def test_flags_that_say_nothing(
    flags: list[str], parts: tuple[str, ...], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["compare", str(source), *flags])
    assert_one_error_line(capsys.readouterr().err, *parts)
