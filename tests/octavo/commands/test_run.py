"""`octavo run` and `octavo chat`: converted directories of any architecture, and stock models with a scheme."""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from octavo import QuantizedCache, prepare
from octavo.__main__ import main

from ...support import TEXTS, assert_one_error_line, tiny_tokenizer, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")

C8 = ("--use_kvcache_quant", "True")


def test_a_converted_directory_goes_on_with_a_text(
    converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(converted(*C8))
    capsys.readouterr()
    assert main(["run", directory, "Rain fell on", "--max_new_tokens", "4"]) == 0
    by_place = capsys.readouterr()
    assert main(["run", "--model_path", directory, "--prompt", "Rain fell on", "--max_new_tokens", "4"]) == 0
    by_flags = capsys.readouterr()
    assert main(["run", "--model_path", directory, "Rain fell on", "--max_new_tokens", "4"]) == 0
    by_both = capsys.readouterr()
    assert by_place.out == by_flags.out == by_both.out and by_place.out.startswith("Rain fell on")
    assert "4 tokens, " in by_place.err and "KV cache of" in by_place.err


def test_a_stock_model_runs_with_a_scheme(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(source), "Rain fell on", "--max_new_tokens", "9", "--scheme", "octavo-4"]) == 0
    said = capsys.readouterr().out
    model = prepare(AutoModelForCausalLM.from_pretrained(source).eval())
    ids = tiny_tokenizer()("Rain fell on", return_tensors="pt")["input_ids"]
    cache = QuantizedCache(model.config, scheme="octavo-4")
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, **with_cache(cache))
    assert said == tiny_tokenizer().decode(expected[0], skip_special_tokens=True) + "\n"


def test_a_stock_model_takes_static_scales_from_a_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "statistics.safetensors"
    argv = ["--scheme", "ascend-c8", "--calib_texts", *TEXTS, "--save_statistics", str(file)]
    assert main(["convert", str(source), "--save_directory", str(tmp_path / "out"), *argv]) == 0
    capsys.readouterr()
    run = ["run", str(source), "Rain", "--max_new_tokens", "2", "--scheme", "ascend-c8"]
    assert main([*run, "--statistics", str(file)]) == 0
    assert capsys.readouterr().out.startswith("Rain")
    assert main(run) == 1
    assert_one_error_line(capsys.readouterr().err, "--scheme ascend-c8", "give --statistics FILE")


@pytest.mark.parametrize(
    ("words", "start"), [(["./none"], "error: ./none: "), (["--model_path", "./none"], "error: --model_path ./none: ")]
)
def test_an_error_calls_a_place_as_it_was_given(
    words: list[str], start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words, "--prompt", "Rain"]) == 1
    error = capsys.readouterr().err
    assert_one_error_line(error, "no such directory")
    assert error.startswith(start)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["Rain"], ("is not converted; octavo convert '", "--scheme int8-token runs it as it is")),
        (["Rain", "--scheme", "octavo4"], ("'octavo4'", "did you mean octavo-4?")),
        ([], ("give the text to continue",)),
        (["Rain", "--prompt", "Snow"], ("not allowed with argument",)),
        (["Rain", "--scheme", "octavo-4", "--statistics", "x"], ("--statistics x: octavo-4 needs no calibration",)),
        (["Rain", "--temperature", "1"], ("--temperature: needs --do_sample",)),
        (["Rain", "--seed", "1"], ("--seed: needs --do_sample",)),
        (["Rain", "--system", "You are rain."], ("unrecognized arguments: --system",)),
        (["Rain", "--device_type", "cdua"], ("did you mean cuda?",)),
    ],
)
def test_what_cannot_run(
    flags: list[str], parts: tuple[str, ...], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["run", str(source), *flags])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert_one_error_line(capsys.readouterr().err, *parts)


def test_a_converted_directory_has_a_scheme_of_its_own(
    converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(converted(*C8))
    capsys.readouterr()
    assert main(["run", directory, "Rain", "--scheme", "octavo-4"]) == 1
    assert_one_error_line(capsys.readouterr().err, "--scheme octavo-4", "has a scheme of its own; leave it out")


def test_a_chat(
    converted: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(converted(*C8))
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("And then?\n\n"))
    flags = ["--system", "You are rain.", "--do_sample", "--seed", "1", "--top_k", "5", "--top_p", "0.9"]
    assert main(["chat", directory, "--prompt", "What fell?", "--max_new_tokens", "3", *flags]) == 0
    assert capsys.readouterr().err.count("KV cache of") == 2


def test_a_directory_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path), "Rain"]) == 1
    assert_one_error_line(capsys.readouterr().err, "holds no config.json, so it is no checkpoint")


def test_a_tokenizer_without_a_chat_template(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(converted(*C8), tmp_path / "out")
    (directory / "chat_template.jinja").unlink()
    capsys.readouterr()
    assert main(["chat", str(directory)]) == 1
    assert_one_error_line(capsys.readouterr().err, f"{directory}: its tokenizer has no chat template", "octavo run")
