"""The flags of the conversion script: Ascend's names, types and defaults."""

from pathlib import Path
from typing import Any

import pytest

from octavo.common.command import run_script
from octavo.common.convert.flags import REFUSED, build_parser, parse_flags
from octavo.common.errors import OctavoError, first_line
from octavo.common.runtime.schemes.linear_scheme import LinearScheme

REQUIRED = ["--model_path", "in", "--save_directory", "out"]

# Names, types and defaults of MindIE-LLM's quantifier.py and of the scripts built on it, and what Octavo adds.
DEFAULTS: dict[str, Any] = {
    "part_file_size": None,
    "w_bit": 8,
    "a_bit": 8,
    "use_kvcache_quant": False,
    "use_fa_quant": False,
    "scheme": None,
    "kv_cache_dtype": None,
    "kv_scales": "data",
    "calib_file": None,
    "calib_texts": None,
    "act_method": "1",
    "is_dynamic": False,
    "disable_level": 0,
    "disable_names": None,
    "disable_last_linear": True,
    "device_type": "cpu",
    "tokenizer_args": {},
    "input_ids_name": "input_ids",
    "attention_mask_name": "attention_mask",
    "trust_remote_code": False,
    "save_statistics": None,
    "fraction": 0.01,
    "co_sparse": False,
    "anti_method": "",
    "do_smooth": False,
    "use_sigma": False,
    "sigma_factor": 3.0,
    "use_reduce_quant": False,
    "tp_size": 1,
    "is_lowbit": False,
    "mm_tensor": False,
    "w_sym": True,
    "open_outlier": True,
    "group_size": None,
    "fa_amp": 0,
    "resume": False,
    "preset": None,
    "quantization": None,
    "w_method": "MinMax",
    "max_kl": None,
}


def test_no_treatment_has_a_name() -> None:
    for preset in ((), ("--preset", "ascend")):
        assert parse_flags("llama3", [*REQUIRED, *preset, "--anti_method", "none"]).anti_method == ""


def test_defaults() -> None:
    flags = vars(parse_flags("llama3", REQUIRED))
    derived = {"recipe_group": None, "recipe_sym": True, "linear": LinearScheme()}
    assert flags == {"model_path": "in", "save_directory": Path("out"), **DEFAULTS, **derived}
    assert REFUSED.keys() <= DEFAULTS.keys()


def test_values() -> None:
    argv = [*REQUIRED, "--use_fa_quant", "True", "--disable_level", "L3", "--part_file_size", "4"]
    flags = parse_flags("llama3", [*argv, "--tokenizer_args", '{"padding_side": "left"}', "--disable_names", "a", "b*"])
    assert flags.use_fa_quant is True and flags.disable_level == 3 and flags.part_file_size == 4
    assert flags.tokenizer_args == {"padding_side": "left"} and flags.disable_names == ["a", "b*"]


@pytest.mark.parametrize("other", [("--act_method", "3"), ("--w_bit", "16", "--a_bit", "16", "--use_fa_quant", "True")])
def test_what_dynamic_inputs_exclude(other: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_flags("llama3", [*REQUIRED, "--is_dynamic", "True", *other])
    assert stop.value.code == 2
    assert "is_dynamic" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--model_path", "--save_directory"])
def test_required_flags(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    index = REQUIRED.index(missing)
    with pytest.raises(SystemExit) as stop:
        parse_flags("llama3", REQUIRED[:index] + REQUIRED[index + 2 :])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and missing in captured.err


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_flags("llama3", ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in DEFAULTS)
    assert "llama3" in build_parser("llama3").description


def test_errors_end_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str] | None) -> None:
        raise OctavoError("the way out")

    def interrupted(argv: list[str] | None) -> None:
        raise KeyboardInterrupt

    assert run_script(lambda argv: None, []) == 0
    assert run_script(fail, []) == 1
    assert capsys.readouterr().err == "error: the way out\n"
    assert run_script(interrupted, []) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert run_script(lambda argv: 1 / 0, []) == 1
    assert capsys.readouterr().err.startswith("error: ZeroDivisionError: division by zero (")
    monkeypatch.setenv("OCTAVO_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run_script(lambda argv: 1 / 0, [])


def test_reasons_fit_on_a_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("Errors:\n  the first\nthe second")) == "Errors: the first"
    assert first_line(KeyError()) == "KeyError"
