"""The tokenizer of an output loads to the source's, and brings no code that was not asked for."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from octavo.common.convert.api import main
from octavo.models.llama3 import ARCHITECTURE

from ....support import TEXTS, assert_one_error_line, convert_flags, edit_json, files_below, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = ("--w_bit", "16", "--a_bit", "16", "--scheme", "int8-token")
OWN_CODE = """from transformers import PreTrainedTokenizerFast

from .tokenizer_helper import SHOUT


class OwnTokenizer(PreTrainedTokenizerFast):
    def shout(self):
        return SHOUT
"""


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return shutil.copytree(source, tmp_path / "made")


@pytest.fixture
def convert(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """`convert(*flags)`: the output of a conversion of `made`."""

    def run(*flags: str) -> Path:
        assert main(ARCHITECTURE, convert_flags(made, tmp_path / "out", *FLAGS, *flags)) == 0
        return tmp_path / "out"

    return run


def with_own_code(directory: Path) -> None:
    """Give a checkpoint a tokenizer with code of its own, in two files."""
    (directory / "tokenization_own.py").write_text(OWN_CODE)
    (directory / "tokenizer_helper.py").write_text("SHOUT = 'octavo'\n")
    own = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"], "AutoConfig": "configuration_own.OwnConfig"}
    edit_json(directory / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)


def code_in(directory: Path) -> list[str]:
    """Files of code in an output, but for its own two."""
    own = {"modeling_llama_fa3.py"} | {file.name for file in directory.glob("octavo*.py")}
    return [name for name in files_below(directory) if name.endswith(".py") and name not in own]


def test_files_are_carried_as_they_are(made: Path, convert: Callable[..., Path]) -> None:
    (made / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    edit_json(made / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
    shutil.copyfile(made / "tokenizer.json", made / "tokenizer.4.0.0.json")
    target = convert()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.4.0.0.json"):
        assert (target / name).read_bytes() == (made / name).read_bytes(), name
    assert (target / "chat_template.jinja").read_bytes() == (made / "chat_template.jinja").read_bytes()


def test_named_chat_templates_are_carried(made: Path, convert: Callable[..., Path]) -> None:
    templates = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(made)
    assert AutoTokenizer.from_pretrained(convert()).chat_template == templates


def test_arguments_of_the_calibration_do_not_stay(made: Path, convert: Callable[..., Path]) -> None:
    target = convert("--tokenizer_args", '{"padding_side": "left", "model_max_length": 9}')
    found, expected = AutoTokenizer.from_pretrained(target), AutoTokenizer.from_pretrained(made)
    assert (found.padding_side, found.model_max_length) == (expected.padding_side, expected.model_max_length)


def test_a_tokenizer_with_code_of_its_own_is_carried_with_its_code(made: Path, convert: Callable[..., Path]) -> None:
    with_own_code(made)
    target = convert("--trust_remote_code")
    assert code_in(target) == ["tokenization_own.py", "tokenizer_helper.py"]
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert list(settings["auto_map"]) == ["AutoTokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=True)
    assert tokenizer.shout() == "octavo"
    assert tokenizer(TEXTS[0])["input_ids"] == tiny_tokenizer()(TEXTS[0])["input_ids"]


def test_code_of_its_own_is_not_run_unasked(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_own_code(made)
    edit_json(made / "config.json", model_type="llama", tokenizer_class="OwnTokenizer")
    code = main(ARCHITECTURE, convert_flags(made, tmp_path / "out", *FLAGS))
    if code == 1:  # this transformers has no class for it
        assert_one_error_line(capsys.readouterr().err, "--trust_remote_code")
        return
    assert code_in(tmp_path / "out") == []
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_no_code_comes_along(made: Path, convert: Callable[..., Path]) -> None:
    for name in ("tokenizer_tricks.py", "tokenization_own.py", "vocab_tricks.py", "modeling_own.py"):
        (made / name).write_text("raise SystemExit('run')\n")
    edit_json(made / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "somebody/code--own.Own"]},
              tokenizer_class="LlamaTokenizer")  # fmt: skip
    target = convert()
    assert code_in(target) == []
    assert "auto_map" not in json.loads((target / "tokenizer_config.json").read_text())


def test_a_link_that_leads_out_brings_nothing_along(made: Path, tmp_path: Path, convert: Callable[..., Path]) -> None:
    (tmp_path / "secret").write_text("of somebody")
    for name in ("merges.txt", "vocab.txt", "tokenizer_notes.json", "additional_chat_templates/x.jinja"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).symlink_to(tmp_path / "secret")
    shutil.rmtree(made / "additional_chat_templates")
    target = convert()
    assert all("of somebody" not in (target / name).read_text(errors="replace") for name in files_below(target))
    assert not any((target / name).is_symlink() for name in files_below(target))


def linked(directory: Path) -> Path:
    """A directory of links to the files of another one."""
    links = directory.parent / "links"
    links.mkdir()
    for file in directory.iterdir():
        (links / file.name).symlink_to(file)
    return links


def snapshot(directory: Path) -> Path:
    """The directory as the hub's cache has it."""
    place = directory.parent / "models--a--b"
    (place / "blobs").mkdir(parents=True)
    (place / "snapshots" / "1").mkdir(parents=True)
    for number, file in enumerate(directory.iterdir()):
        file.rename(place / "blobs" / str(number))
        (place / "snapshots" / "1" / file.name).symlink_to(f"../../blobs/{number}")
    return place / "snapshots" / "1"


@pytest.mark.parametrize("kind", [linked, snapshot])
def test_a_source_of_links(kind: Callable[[Path], Path], made: Path, tmp_path: Path) -> None:
    edit_json(made / "tokenizer_config.json", padding_side="left")
    expected = AutoTokenizer.from_pretrained(made)
    assert main(ARCHITECTURE, convert_flags(kind(made), tmp_path / "out", *FLAGS)) == 0
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.get_vocab() == expected.get_vocab() and found.padding_side == "left"
    assert not any((tmp_path / "out" / name).is_symlink() for name in files_below(tmp_path / "out"))


def test_a_sentencepiece_model_is_carried(made: Path, convert: Callable[..., Path], tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")  # which transformers reads such models with
    (tmp_path / "texts").write_text("\n".join(TEXTS * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=120, model_type="bpe",
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (made / name).unlink()
    shutil.copyfile(tmp_path / "tokenizer.model", made / "tokenizer.model")
    (made / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    expected = LlamaTokenizer.from_pretrained(made)
    target = convert()
    assert (target / "tokenizer.model").read_bytes() == (made / "tokenizer.model").read_bytes()
    found = AutoTokenizer.from_pretrained(target)
    assert [found(text)["input_ids"] for text in TEXTS] == [expected(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("broken", ["{", "[]"])
def test_a_broken_tokenizer_is_named_before_the_first_layer(
    broken: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "tokenizer_config.json").write_text(broken)
    assert main(ARCHITECTURE, convert_flags(made, tmp_path / "out", *FLAGS)) == 1
    captured = capsys.readouterr().err
    assert_one_error_line(captured, "tokenizer")
    assert "converting" not in captured and os.listdir(tmp_path) == ["made"]


def test_what_only_its_class_can_say_is_saved_by_its_class(
    made: Path, convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the list of names misses stands for whatever transformers reads some day."""
    from octavo.common.convert.source import tokenizer as tokenizer_files

    kept: tuple[Any, ...] = tuple(name for name in tokenizer_files.TOKENIZER_DATA if name != "chat_template.jinja")
    monkeypatch.setattr(tokenizer_files, "TOKENIZER_DATA", kept)
    assert AutoTokenizer.from_pretrained(convert()).chat_template == tiny_tokenizer().chat_template
