"""`octavo convert`: what most should do without a flag, where it goes, and what to do next."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM

from octavo.__main__ import main
from octavo.commands.convert import SUFFIX, _next_commands, _usual
from octavo.common.convert import presets
from octavo.place import Place, usual_output

from ...support import TEXTS, assert_one_error_line, edit_json, quantized_tensors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion without a flag, in a directory with a space."""
    place = tmp_path_factory.mktemp("my models") / "tiny llama"
    shutil.copytree(source, place)
    assert main(["convert", str(place)]) == 0
    return place.with_name("tiny llama-octavo")


def test_without_a_flag_it_is_eight_bit_and_lies_beside_the_model(made: Path, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main(["convert", "--model_path", str(source), "--save_directory", str(target), "--preset", "eight-bit"]) == 0
    expected, found = quantized_tensors(target), quantized_tensors(made)
    assert list(expected) == list(found) and all(expected[name].equal(found[name]) for name in expected)
    assert AutoModelForCausalLM.from_pretrained(made, trust_remote_code=True).scheme.name == "int8-token"


def test_it_is_not_overwritten_and_the_ways_out_are_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.with_name("tiny llama")
    assert main(["convert", str(source)]) == 1
    parts = (f"{made}: exists already", f"octavo run '{made}'", f"octavo convert '{source}' --save_directory DIR")
    assert_one_error_line(capsys.readouterr().err, *parts)


def test_it_says_what_it_takes_and_what_to_do_next(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "tiny"
    shutil.copytree(source, place)
    assert main(["convert", str(place), "--calib_texts", *TEXTS]) == 0
    captured = capsys.readouterr()
    assert "--preset eight-bit: 8 bits throughout" in captured.err
    lines = [shlex.split(line, comments=True) for line in captured.out.split("to go on:\n")[1].splitlines()]
    output = str(tmp_path / "tiny-octavo")
    assert [line[1:] for line in lines] == [
        ["chat", output],
        ["evaluate", output, "--reference", str(place)],
        ["serve", output],
    ]
    assert main([*lines[1][1:], "--windows", "1", "--length", "8", "--written", "0", "--tasks"]) == 0


def test_without_a_chat_template_a_text_goes_on_and_codes_of_others_are_no_reference(made: Path) -> None:
    report = SimpleNamespace(output=made, source_codes="awq")
    template = made / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    try:
        commands = [line.split()[1] for line in _next_commands(report, "tiny", False)]
    finally:
        template.write_text(text)
    assert commands == ["run", "info", "serve"]


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        ({"model_path"}, {}, ["--preset", "eight-bit"]),
        ({"model_path", "scheme"}, {}, ["--preset", "eight-bit"]),
        ({"model_path", "calib_file", "resume"}, {}, ["--preset", "eight-bit"]),
        ({"model_path", "preset"}, {}, []),
        ({"model_path", "w_bit"}, {}, []),
        ({"model_path", "use_kvcache_quant"}, {}, []),
        ({"model_path", "format"}, {}, []),
        ({"model_path"}, {"quantization_config": {"quant_method": "awq"}}, ["--scheme", "int8-token"]),
        ({"model_path", "scheme"}, {"quantization_config": {"quant_method": "awq"}}, []),
        (
            {"model_path", "requantize"},
            {"quantization_config": {"quant_method": "awq"}},
            ["--preset", "eight-bit"],
        ),
    ],
)
def test_what_is_taken_where_nothing_is_asked_for(given: set[str], settings: dict, words: list[str]) -> None:
    found, why = _usual(Place(Path("model"), settings), given)
    assert found == words and bool(why) == bool(words)


def test_a_scheme_takes_the_place_of_that_of_the_preset(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main(["convert", str(source), "--scheme", "octavo-4", "--save_directory", str(target)]) == 0
    model = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    assert model.scheme.name == "octavo-4" and "W8A16" in model.config.octavo["quantized_linears"].values()


def test_where_an_output_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "a model"
    model.mkdir()
    monkeypatch.chdir(model)
    assert usual_output(str(model), SUFFIX) == usual_output(".", SUFFIX) == tmp_path / "a model-octavo"
    assert usual_output(f"{model}/", SUFFIX) == tmp_path / "a model-octavo"
    assert usual_output("someone/their-model", SUFFIX) == Path("their-model-octavo")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--preset", "eightbit"], ("preset eightbit", "did you mean eight-bit?")),
        (["--scheme", "int8-tokn"], ("did you mean int8-token?",)),
        (["--calib_fil", "x"], ("did you mean --calib_file?",)),
        (["--quantization", "w8a8_dynamc"], ("did you mean w8a8_dynamic?",)),
    ],
)
def test_what_is_mistyped(
    flags: list[str], parts: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["convert", str(source), "--save_directory", str(tmp_path / "out"), *flags])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2) and not (tmp_path / "out").exists()
    assert_one_error_line(capsys.readouterr().err, *parts)


def test_all_flags_are_in_one_help_or_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main(["convert", flag])
        texts[flag] = capsys.readouterr().out
    assert "--preset" in texts["--help"] and "--w_sym" not in texts["--help"]
    assert all(flag in texts["--help-all"] for flag in ("--preset", "--w_sym", "--open_outlier"))


def test_old_names_of_presets_go_on_working(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    presets._told.cache_clear()
    argv = ["convert", str(source), "--save_directory", str(tmp_path / "out"), "--calib_texts", *TEXTS]
    assert main([*argv, "--preset", "memory-first"]) == 0
    assert capsys.readouterr().err.count("preset memory-first is called four-bit now") == 1


def test_an_output_for_an_engine_ends_with_its_own_commands(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["convert", str(source), "--save_directory", str(tmp_path / "out"), "--calib_texts", *TEXTS]
    assert main([*argv, "--format", "compressed-tensors"]) == 0
    assert "to go on:" not in capsys.readouterr().out


def test_a_hub_id_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "nobody/no-such-model"]) == 1
    assert_one_error_line(capsys.readouterr().err, "no-such-model: no such directory, and the hub could not be asked: ")


def test_the_hub_says_that_it_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HFValidationError("nobody--has it")

    monkeypatch.setattr("octavo.common.convert.source.checkpoint.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "nobody--has"]) == 1
    assert_one_error_line(capsys.readouterr().err, "no such directory, and no hub model (nobody--has it)")


def test_a_damaged_config(source: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source, tmp_path / "tiny")
    edit_json(tmp_path / "tiny" / "config.json", model_type=None)
    assert main(["convert", str(tmp_path / "tiny")]) == 1
    assert_one_error_line(capsys.readouterr().err, "model_type is None")
