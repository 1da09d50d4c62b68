"""`--adapter` of the commands that speak: what it adds, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.__main__ import main
from octavo.generate import load_converted
from octavo.models.llama3 import ARCHITECTURE

from ..common.runtime.test_adapters import adapter_of
from ..support import assert_one_error_line, tiny_llama, tiny_tokenizer

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

FLAGS = ("--is_dynamic", "True", "--scheme", "int8-token")
TEXT = "Rain fell on"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_of(tiny_llama(), tmp_path / "an adapter")


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["run", *words, "--max_new_tokens", "8"]) == 0
    return capsys.readouterr().out


def test_a_converted_directory_runs_with_an_adapter(
    converted: Callable[..., Path], adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = converted(*FLAGS)
    found = said([str(directory), TEXT, "--adapter", str(adapter)], capsys)
    speaker = load_converted(ARCHITECTURE, directory, "cpu")
    adapted = peft.PeftModel.from_pretrained(speaker.model, adapter)
    ids = tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    wanted = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert found == tiny_tokenizer().decode(wanted[0], skip_special_tokens=True) + "\n"
    assert found != said([str(directory), TEXT], capsys)


def test_a_stock_model_does_too(source: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(source), TEXT, "--scheme", "int8-token"]
    assert said([*words, "--adapter", str(adapter)], capsys) != said(words, capsys)


def test_an_evaluation_puts_it_on_all_that_it_compares(
    source: Path, converted: Callable[..., Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the adapter changes is the same on both sides, so that what is measured is the quantization alone."""
    file = tmp_path / "found.json"
    rest = ["--windows", "1", "--length", "60", "--tasks", "--written", "0", "--json", str(file)]
    for words in ([str(source), "--schemes", "int8-token"], [str(converted(*FLAGS)), "--reference", str(source)]):
        found = []
        for more in ([], ["--adapter", str(adapter)]):
            assert main(["evaluate", *words, *rest, *more]) == 0
            found.append(list(json.loads(file.read_text())["results"].values())[1]["text"])
        plain, adapted = found
        assert adapted["float_perplexity"] != plain["float_perplexity"]
        assert 0 < adapted["kl"] < 10 * plain["kl"]
    capsys.readouterr()
    assert main(["evaluate", str(source), *rest, "--adapter", str(tmp_path / "none")]) == 1
    assert_one_error_line(capsys.readouterr().err, "--adapter", "no such directory")


def _no_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def _other_layers(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({key.replace("layers.1", "layers.9"): part for key, part in load_file(file).items()}, file)


def _part_missing(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({key: part for key, part in load_file(file).items() if "layers.1.self_attn.q" not in key}, file)


def _more_than_it_has(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.more.weight": torch.zeros(320, 64)}, file)


def _no_settings(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{}")


DAMAGES = [
    (_no_weights, "holds no adapter_model.safetensors"),
    (_other_layers, "changes model.layers.9"),
    (_part_missing, "missing keys: model.layers.1.self_attn.q_proj"),
    (_more_than_it_has, "unexpected keys: "),
    (_no_settings, "cannot be loaded ("),
]


@pytest.mark.parametrize(("damage", "line"), DAMAGES, ids=lambda part: getattr(part, "__name__", None))
@pytest.mark.parametrize("kind", ["converted", "stock"])
def test_an_adapter_that_does_not_go(
    kind: str, damage: Callable[[Path], None], line: str, source: Path, converted: Callable[..., Path], adapter: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(adapter)
    words = [str(converted(*FLAGS))] if kind == "converted" else [str(source), "--scheme", "int8-token"]
    capsys.readouterr()
    assert main(["run", *words, "--prompt", TEXT, "--adapter", str(adapter)]) == 1
    assert_one_error_line(capsys.readouterr().err, str(adapter), line)


def test_no_adapter_and_no_peft(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(converted(*FLAGS)), TEXT, "--adapter", str(tmp_path / "none")]
    capsys.readouterr()
    monkeypatch.setattr("octavo.place._plain_speaker", lambda _: pytest.fail("the model is loaded"))
    assert main(words) == 1
    assert_one_error_line(capsys.readouterr().err, "--adapter", "no such directory")
    monkeypatch.setattr("octavo.adapters.find_spec", lambda _: None)
    assert main(words) == 1
    assert_one_error_line(capsys.readouterr().err, "pip install peft")
