"""Conversions from Python: what is asked for, what comes back, and errors that name fields."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from octavo import ConversionReport, ConvertRequest, OctavoError, convert, load_scheme
from octavo.common.convert.api import main
from octavo.common.convert.report import duration
from octavo.common.runtime.schemes.linear_scheme import LinearScheme
from octavo.models import llama3, qwen2

from ...support import TEXTS, convert_flags, edit_json, files_below, save_source, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ConversionReport:
    """Of a conversion of the tiny Llama that leaves two parts in float and measures what each costs."""
    output = tmp_path_factory.mktemp("reported") / "out"
    asked = {"scheme": "ascend-c8", "anti_method": "m4", "float_costliest": 2, "max_kl": 1.0}
    return convert(ConvertRequest(source, output, calibration=TEXTS, **asked))


def test_a_report_says_what_was_made(report: ConversionReport, source: Path) -> None:
    assert (report.model, report.architecture, report.scheme.name) == (source, "llama3", "ascend-c8")
    assert report.linear == LinearScheme() and set(report.linears.values()) == {"W8A8"}
    assert report.chosen_floats == ("model.layers.0.self_attn", "model.layers.2.self_attn")
    assert report.scheme.float_layers == (0, 2)
    assert report.float_bytes == (source / "model.safetensors").stat().st_size
    assert report.output_bytes == sum(file.stat().st_size for file in report.output.iterdir())
    layer = 2 * 2 * 16  # elements of K and V in 2 heads of 16
    assert report.float_kv_bytes_per_token == 3 * 4 * layer and report.kv_bytes_per_token == (2 * 4 + 1) * layer
    assert report.float_kv_bits == 32 and report.kv_bits >= 8
    assert (report.texts, report.held_back_texts, report.odd_groups) == (8, 1, ())
    assert 0 < report.fidelity.kl < 1 and report.fidelity.tokens > 0 and report.seconds > 0
    layers = range(3)
    assert {cost.name for cost in report.costs} >= {f"model.layers.{index}.self_attn.q_proj" for index in layers}


def test_how_long_it_took_is_said(report: ConversionReport) -> None:
    assert report.summary().splitlines()[-1] == f"took {duration(report.seconds)}"
    said = {7.94: "7.9 s", 59.96: "1 min 0 s", 79: "1 min 19 s", 3599.6: "1 h 0 min", 7530: "2 h 5 min"}
    assert {seconds: duration(seconds) for seconds in said} == said


def test_a_report_is_saved_as_json(report: ConversionReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["output"] == str(report.output) and saved["fidelity"]["kl"] == report.fidelity.kl
    assert load_scheme(saved["scheme"]) == report.scheme and LinearScheme(**saved["linear"]) == report.linear
    assert saved["costs"][0] == vars(report.costs[0])
    assert saved.keys() == report.to_dict().keys() == vars(report).keys()


def test_layers_counted_from_the_end_are_those_of_the_model_that_is_converted(source: Path, tmp_path: Path) -> None:
    scheme = {**load_scheme("turboquant-3").to_dict(), "name": "ends", "float_layers": [0, -1]}
    report = convert(ConvertRequest(source, tmp_path / "out", scheme=scheme, linear=None, calibration=TEXTS))
    assert report.scheme.float_layers == (0, 2) and report.kv_bits < 16
    written = json.loads((tmp_path / "out" / "config.json").read_text())["octavo"]["scheme"]
    assert load_scheme(written).float_layers == (0, 2)


SAME: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "C8 and smoothing": (
        {"scheme": "ascend-c8", "anti_method": "m4", "float_costliest": 2},
        ("--use_kvcache_quant", "True", "--anti_method", "m4", "--fa_amp", "2"),
    ),
    "a cache alone": ({"scheme": "int8-token", "linear": None}, ("--quantization", "float", "--scheme", "int8-token")),
    "odd groups": (
        {"linear": LinearScheme("W8A16", group_size=128), "calibration": TEXTS[:1]},
        ("--a_bit", "16", "--group_size", "128", "--calib_texts", TEXTS[0]),
    ),
    "a layer in float": (
        {"scheme": "ascend-c8", "float_costliest": 11},
        ("--use_kvcache_quant", "True", "--fa_amp", "11"),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_script_prints_the_summary_and_writes_the_same(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, flags = SAME[name]
    output = tmp_path / "out"
    found = convert(ConvertRequest(source, output, **({"calibration": TEXTS} | asked)))
    assert capsys.readouterr().out == "", "nothing is printed"
    output.rename(tmp_path / "first")
    assert main(llama3.ARCHITECTURE, convert_flags(source, output, *flags)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:-1] == found.summary().splitlines()[:-1] and re.fullmatch(r"took \d+\.\d s", said[-1])
    assert files_below(output) == files_below(tmp_path / "first")
    for file in files_below(output):
        assert (output / file).read_bytes() == (tmp_path / "first" / file).read_bytes(), file


def test_what_a_summary_says_of_odd_groups_and_few_tokens(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", tiny_llama(intermediate_size=96))
    asked = {"linear": LinearScheme("W8A16", group_size=64), "calibration": ["Rain fell."], "float_outliers": 1}
    summary = convert(ConvertRequest(source, tmp_path / "out", **asked)).summary().splitlines()
    assert summary[-1].startswith("took ")
    assert summary[-2] == "linears of 96 input channels have groups of 32: 64 do not divide them"
    assert summary[-3] == f"wrote {tmp_path / 'out'}: 20 linears in W8A16 (inputs on the CPU in int8), attention float"
    assert summary[-4].startswith("fewer than 100 tokens") and summary[-5].endswith("of the one calibration text")


def test_the_architecture_is_the_one_of_the_checkpoint_or_given(source: Path, tmp_path: Path) -> None:
    for number, given in enumerate((None, "llama3", llama3.ARCHITECTURE)):
        request = ConvertRequest(source, tmp_path / str(number), architecture=given, calibration=TEXTS)
        assert convert(request).architecture == "llama3"


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A checkpoint of an architecture that the zoo does not have."""
    directory = save_source(tmp_path / "strange", tiny_llama())
    edit_json(directory / "config.json", model_type="gpt2")
    return directory


def test_an_architecture_that_does_not_fit_is_refused(source: Path, strange: Path, tmp_path: Path) -> None:
    def refused(model: Path, given: Any) -> str:
        with pytest.raises(OctavoError) as error:
            convert(ConvertRequest(model, tmp_path / "out", architecture=given, calibration=TEXTS))
        return str(error.value)

    message = refused(strange, None)
    assert "model_type is 'gpt2', and the zoo has none for it (it has" in message and "llama, mistral" in message
    assert "models/qwen2 converts 'qwen2'; give architecture='llama3'" in refused(source, qwen2.ARCHITECTURE)
    message = refused(source, "llama")
    assert message.startswith("architecture llama: is none of") and "llama3, mistral" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such/model"}, "model no/such/model: no such directory"),
        ({"scheme": "int9"}, "int9"),
        ({"scheme": "float", "linear": None}, "linear=None: scheme float quantizes nothing either"),
        ({"kv_scales": "random"}, "kv_scales random: scheme float has no static scales"),
        ({"float_linears": ["nothing"]}, "float_linears nothing: matches no linear layer"),
        ({"calibration": Path("nowhere")}, "calibration nowhere: cannot be read"),
        ({"input_ids_name": "ids"}, "input_ids_name ids: the tokenizer returns"),
        ({"anti_method": "m1", "save_statistics": "file"}, "save_statistics: anti_method m1 changes what is observed"),
        ({"max_kl": 1e-9}, "max_kl 1e-09: KL is"),
        ({"float_costliest": 100, "scheme": "int8-token"}, "nothing would be quantized"),
    ],
)
def test_errors_name_the_field(changes: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    fields = {"model": source, "output": tmp_path / "out", "calibration": TEXTS, **changes}
    with pytest.raises(OctavoError) as error:
        convert(ConvertRequest(**fields))
    assert message in str(error.value) and "--" not in str(error.value)
    assert files_below(tmp_path) == []


def test_an_output_that_is_there_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(OctavoError, match=f"^output {tmp_path}: exists already"):
        convert(ConvertRequest(source, tmp_path, calibration=TEXTS))


def test_files_of_any_size(source: Path, tmp_path: Path) -> None:
    convert(ConvertRequest(source, tmp_path / "out", max_shard_gb=1e-4, calibration=TEXTS))
    sizes = {file: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert len(sizes) > 2
    for file, size in sizes.items():
        with safe_open(file, "pt") as opened:
            assert size <= 1e5 + 1e4 or len(list(opened.keys())) == 1, "the limit counts tensors, not the header"


def test_texts_of_octavo_are_calibrated_on_if_none_are_given(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(ConvertRequest(source, tmp_path / "out", scheme="ascend-c8"))
    assert "no calibration: calibrating on the small text that comes with Octavo" in capsys.readouterr().err
    convert(ConvertRequest(source, tmp_path / "dynamic", scheme="int8-token", linear="W8A16"))
    assert "no calibration: nothing here needs one; measuring what is lost on the small" in capsys.readouterr().err


def test_a_converted_directory_is_the_one_that_the_script_makes(
    source: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    expected = converted("--use_fa_quant", "True")
    convert(ConvertRequest(source, tmp_path / "out", scheme="ascend-fa", calibration=TEXTS))
    assert {file.name: file.read_bytes() for file in expected.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()
    }
