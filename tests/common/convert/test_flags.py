"""The flags of the conversion script: Ascend's names, types and defaults."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo import ConvertRequest
from octavo.common.command import run_script
from octavo.common.convert.flag_values import REFUSED
from octavo.common.convert.flags import build_parser, parse_flags, parse_request, recipe_fields
from octavo.common.convert.presets import RECIPES
from octavo.common.errors import OctavoError, first_line
from octavo.common.runtime.schemes.linear_scheme import LinearScheme
from octavo.models.llama3 import ARCHITECTURE

from ...support import REPOSITORY

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
    "disable_last_linear": None,
    "embeddings": "float",
    "cpu_activations": "int8",
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
    "scale_bits": None,
    "fa_amp": 0,
    "target": None,
    "pdmix": False,
    "format": "ascend",
    "resume": False,
    "requantize": False,
    "preset": None,
    "quantization": None,
    "w_method": "MinMax",
    "max_kl": None,
    "w_bits_mean": None,
}


def test_no_treatment_has_a_name() -> None:
    for preset in ((), ("--preset", "ascend")):
        assert parse_flags("llama3", [*REQUIRED, *preset, "--anti_method", "none"]).anti_method == ""


def test_defaults() -> None:
    flags = vars(parse_flags("llama3", REQUIRED))
    derived = {"recipe_group": None, "recipe_sym": True, "recipe_scale_bits": None, "linear": LinearScheme()}
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


def test_the_readme_names_every_flag() -> None:
    text = (REPOSITORY / "models" / "llama3" / "README.md").read_text(encoding="utf-8")
    flags = [flag for action in build_parser("llama3")._actions for flag in action.option_strings if flag[:2] == "--"]
    assert [flag for flag in flags if not re.search(rf"`{flag}\b", text)] == []


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


# What flags ask of a conversion.


def asked(*flags: str) -> ConvertRequest:
    return parse_request(ARCHITECTURE, [*REQUIRED, *flags])


REACHES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "part_file_size": (("4",), {"max_shard_gb": 4}),
    "resume": ((), {"resume": True}),
    "requantize": ((), {"requantize": True}),
    "preset": (("ascend",), {"scheme": "ascend-c8", "anti_method": "m6"}),
    "w_bit": (("8", "--a_bit", "16"), {"linear": LinearScheme("W8A16")}),
    "a_bit": (("16", "--w_bit", "4"), {"linear": LinearScheme("W4A16", group_size=64)}),
    "quantization": (("fp8",), {"linear": LinearScheme("WFP8AFP8_DYNAMIC")}),
    "w_sym": (("False", "--a_bit", "16"), {"linear": LinearScheme("W8A16", symmetric=False)}),
    "group_size": (("32", "--a_bit", "16"), {"linear": LinearScheme("W8A16", group_size=32)}),
    "scale_bits": (("8", "--w_bit", "4", "--a_bit", "16"), {"linear": LinearScheme("W4A16_DOUBLE", group_size=32)}),
    "w_method": (("GPTQ",), {"linear": LinearScheme(w_method="GPTQ")}),
    "anti_method": (("m2",), {"anti_method": "m2"}),
    "use_kvcache_quant": (("True",), {"scheme": "ascend-c8"}),
    "use_fa_quant": (("True",), {"scheme": "ascend-fa"}),
    "scheme": (("octavo-4",), {"scheme": "octavo-4"}),
    "kv_cache_dtype": (("fp8",), {"scheme": "fp8"}),
    "kv_scales": (("none",), {"kv_scales": "none"}),
    "calib_file": (("texts",), {"calibration": Path("texts")}),
    "calib_texts": (("a", "b"), {"calibration": ("a", "b")}),
    "act_method": (("2",), {"linear": LinearScheme(act_method="histogram")}),
    "is_dynamic": (("True",), {"linear": LinearScheme("W8A8_DYNAMIC")}),
    "disable_level": (("L3",), {"float_outliers": 3}),
    "fa_amp": (("2",), {"float_costliest": 2}),
    "w_bits_mean": (
        ("5", "--w_bit", "4", "--a_bit", "16"),
        {"linear": LinearScheme("W4A16", group_size=64), "mean_bits": 5},
    ),
    "max_kl": (("0.5",), {"max_kl": 0.5}),
    "target": (("vllm-ascend",), {"target": "vllm-ascend"}),
    "pdmix": (("True",), {"pdmix": True}),
    "format": (("gguf",), {"format": "gguf"}),
    "disable_names": (("a", "b*"), {"float_linears": ("a", "b*")}),
    "disable_last_linear": (("False",), {"float_head": False}),
    "device_type": (("npu",), {"device": "npu"}),
    "embeddings": (("int8",), {"embeddings": "int8"}),
    "cpu_activations": (
        ("float", "--a_bit", "16"),
        {"linear": LinearScheme("W8A16"), "cpu_activations": "float"},
    ),
    "tokenizer_args": (('{"padding_side": "left"}',), {"tokenizer_arguments": {"padding_side": "left"}}),
    "input_ids_name": (("ids",), {"input_ids_name": "ids"}),
    "attention_mask_name": (("mask",), {"attention_mask_name": "mask"}),
    "trust_remote_code": ((), {"trust_remote_code": True}),
    "save_statistics": (("file",), {"save_statistics": Path("file")}),
}
"""What follows a flag, and the fields that it sets."""


@pytest.mark.parametrize("flag", REACHES)
def test_every_flag_reaches_the_request(flag: str) -> None:
    values, fields = REACHES[flag]
    assert asked(f"--{flag}", *values) == replace(asked(), **fields) != asked()


def test_no_flag_is_forgotten() -> None:
    assert REACHES.keys() | REFUSED.keys() == DEFAULTS.keys()


def test_no_flags_ask_for_what_a_request_without_fields_asks_for() -> None:
    assert asked() == ConvertRequest("in", "out", architecture=ARCHITECTURE)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--w_bit", "8", "--cpu_activations", "float"), "--cpu_activations: W8A8 quantizes inputs on every device"),
        (
            ("--w_bit", "16", "--a_bit", "16", "--scheme", "octavo-8", "--cpu_activations", "float"),
            "every linear in float",
        ),
        (("--embeddings", "int8", "--disable_last_linear", "False"), "both say what lm_head is"),
        (
            ("--embeddings", "int8", "--disable_last_linear", "True"),
            "--embeddings int8 and --disable_last_linear True exclude each other: both say what lm_head is",
        ),
        (
            ("--w_bit", "16", "--a_bit", "16", "--scheme", "octavo-8", "--disable_last_linear", "False"),
            "--disable_last_linear: --w_bit 16 leaves every linear in float",
        ),
    ],
)
def test_what_says_nothing_or_twice_is_refused(
    flags: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        asked(*flags)
    assert reason in capsys.readouterr().err


def test_what_is_given_is_told_from_what_is_so_anyway() -> None:
    """A quantized checkpoint keeps its linears unless a flag says how they are to be."""
    assert not asked().linear_is_given and not asked("--cpu_activations", "float").linear_is_given
    for flags in (("--w_bit", "8"), ("--act_method", "1"), ("--quantization", "w8a8"), ("--preset", "ascend")):
        assert asked(*flags).linear_is_given
    assert (
        ConvertRequest("in", "out", linear="w8a8").linear_is_given and not ConvertRequest("in", "out").linear_is_given
    )


def test_embeddings_alone_may_be_quantized() -> None:
    flags = ("--quantization", "float", "--embeddings", "int8", "--cpu_activations", "float")
    assert (asked(*flags).linear, asked(*flags).cpu_activations) == (None, "float")
    assert asked("--is_dynamic", "True", *flags[2:]).cpu_activations == "float"


def test_a_flag_of_the_head_takes_the_place_of_that_of_a_recipe() -> None:
    assert asked("--preset", "eight-bit").embeddings == "int8"
    for flags in (
        ("--embeddings", "float"),
        ("--disable_last_linear", "True"),
        ("--disable_last_linear", "False"),
        ("--disable_names", "*.q_proj", "lm_head"),
        ("--disable_names", "lm_*"),
    ):
        assert asked("--preset", "eight-bit", *flags).embeddings == "float"
    assert asked("--preset", "eight-bit", "--disable_names", "*.q_proj").embeddings == "int8"


def test_a_head_in_float_beside_linears_in_float_says_nothing_new() -> None:
    flags = ("--quantization", "float", "--scheme", "octavo-8", "--disable_last_linear", "True")
    assert asked(*flags).float_head is True


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--calib_file", "f", "--calib_texts", "a"), "--calib_file and --calib_texts: give one of the two"),
        (("--target", "mindie", "--format", "gguf"), "--target mindie and --format gguf exclude each other"),
    ],
)
def test_flags_that_exclude_each_other(flags: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        asked(*flags)
    assert stop.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_in_python_is_the_one_of_the_flag(name: str) -> None:
    assert ConvertRequest("in", "out", architecture=ARCHITECTURE, **recipe_fields(name)) == asked("--preset", name)
    with pytest.raises(OctavoError, match="preset fastest: is none of eight-bit"):
        recipe_fields("fastest")
