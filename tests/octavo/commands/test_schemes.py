"""`octavo schemes` and `octavo presets`: every one is listed, with what is true of it."""

import json
from pathlib import Path

import pytest

from octavo import Scheme, load_scheme
from octavo.__main__ import main
from octavo.commands import presets, schemes
from octavo.common.convert.presets import RECIPES, RENAMED
from octavo.common.runtime.schemes.kv_scheme import PRESETS
from octavo.ops.shared.registry import served_by
from octavo.ops.shared.triton_helpers import TESTED
from octavo.wording import COMPARED, WHEN, codec_short, codec_words, usual_bits

from ...support import assert_one_error_line

WIDEST = 120


def test_every_scheme_is_listed_and_has_its_use() -> None:
    lines = schemes.table("cpu")
    named = [line.split()[0] for line in lines[1 : 1 + len(PRESETS)]]
    assert sorted(named) == sorted(PRESETS) == sorted(WHEN) and all(WHEN.values())
    assert max(map(len, lines)) <= WIDEST
    assert any(
        line.startswith("bits: of an element of K and V in sequences of 2,048 tokens of a model") for line in lines
    )
    bits = [schemes._code_bits(load_scheme(name)) for name in named]
    assert bits == sorted(bits, reverse=True)


def test_what_is_only_compared_with_is_listed_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes"]) == 0
    shown = capsys.readouterr().out
    listed = [line.split()[0] for line in shown.splitlines()[1 : 1 + len(WHEN) - len(COMPARED)]]
    assert sorted(listed) == sorted(set(WHEN) - set(COMPARED)) and max(map(len, shown.splitlines())) <= WIDEST
    assert (
        "--all lists those to be compared with as well: oscar, saw, turboquant, turboquant-mse, kivi, kitty, kvarn, "
        "kvquant." in shown
    )
    assert main(["schemes", "--all"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in PRESETS) and "--all" not in shown


def test_bits_count_layers_in_float() -> None:
    """Four of 32 layers are in 16 bits; the others of 4.125 and 4.25."""
    assert usual_bits(load_scheme("turboquant-4")) == pytest.approx((28 * (4.125 + 4.25) / 2 + 4 * 16) / 32)


def test_what_is_said_of_a_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes", "octavo-3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["key"], data["value"]) == ("int3 per channel x 64, affine", "int3 per token, gaussian levels")
    assert data["bits"] == 3.51 and data["needs_calibration"] is False
    assert Scheme.from_dict(data["definition"]) == load_scheme("octavo-3")
    assert main(["schemes", "--json"]) == 0
    assert [found["name"] for found in json.loads(capsys.readouterr().out)] == list(PRESETS)


def test_a_definition_is_a_file_that_a_conversion_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes", "kvquant-3"]) == 0
    text, _, definition = capsys.readouterr().out.partition("as a file for --scheme FILE.json:\n")
    assert "calibrated levels, static, 1 outlier(s)" in text and "as it was before RoPE" in text
    file = tmp_path / "mine.json"
    file.write_text(definition)
    assert load_scheme(file) == load_scheme("kvquant-3")
    assert main(["schemes", str(file)]) == 0
    assert "kvquant-3" in capsys.readouterr().out


def test_the_kernel_is_that_of_the_report() -> None:
    assert served_by("attention", "CPU").startswith(schemes.kernel_of(load_scheme("int8-token"), "cpu"))
    assert schemes.kernel_of(load_scheme("kvquant-2"), "cpu").endswith(", decoded"), "outliers"
    assert schemes.kernel_of(load_scheme("octavo-2"), "cuda") == f"Triton ({TESTED}), decoded"
    assert schemes.kernel_of(load_scheme("octavo-4"), "cuda") == f"Triton ({TESTED})"
    assert served_by("linear_grouped", "NPU") == "reference (PyTorch)"
    with pytest.raises(KeyError):
        served_by("nothing", "CPU")


def test_codecs_in_words() -> None:
    key = load_scheme("octavo-4").key
    assert (codec_words(key), codec_short(key)) == ("int4 per channel x 64, affine", "int4 channel/64")
    assert codec_words(None) == codec_short(None) == "float"
    assert codec_words(load_scheme("kitty-2").key) == "int2 per channel x 128, affine, 12.5% int4"
    assert codec_words(load_scheme("kvarn-4").value) == "int4 per token, affine, second scales"


@pytest.mark.parametrize("command", ["schemes", "presets"])
def test_a_name_that_there_is_not(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, nearest = {"schemes": ("octavo_4", "octavo-4"), "presets": ("eigth-bit", "eight-bit")}[command]
    assert main([command, name]) == 1
    assert_one_error_line(capsys.readouterr().err, f"did you mean {nearest}?")


@pytest.mark.parametrize("text", ["{}", "[]", '{"key": {"dtype": "int8"}}'])
def test_a_file_without_a_scheme_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    assert main(["schemes", str(file)]) == 1
    assert_one_error_line(capsys.readouterr().err, f"scheme {file}: holds no scheme")


def test_every_preset_is_listed_with_what_it_makes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = presets.table()
    assert [line.split()[0] for line in lines[1 : 1 + len(RECIPES)]] == list(RECIPES)
    assert max(map(len, lines)) <= WIDEST
    facts = presets.facts_of("w8a8-c8")
    assert (facts["linears"], facts["scheme"], facts["needs_calibration"]) == ("W8A8_DYNAMIC", "ascend-c8", True)
    assert presets.facts_of("eight-bit")["needs_calibration"] is False
    assert main(["presets", "w8a8-c8"]) == 0
    assert "  --is_dynamic True\n" in capsys.readouterr().out
    assert main(["presets", "--json"]) == 0
    assert [found["name"] for found in json.loads(capsys.readouterr().out)] == list(RECIPES)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_tells_the_new(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", old]) == 0
    assert capsys.readouterr().out.startswith(f"{RENAMED[old]}: ")
