"""The comparison says nothing of equal trees and each difference of others; what this tree writes is as it was."""

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..support import REPOSITORY
from .command import main
from .compare import compare, differences
from .conversions import all_conversions, presets_of
from .layout import LAID_OUT, LAYOUT_FILE, layout_of
from .record import Record, make_record
from .sources import SOURCES

STOCK, PLAIN = "scheme kvquant-2 of qwen2", "fa of mistral"
TWICE = (STOCK, PLAIN, "refused: two schemes")
TENSOR = "model.layers.1.self_attn.q_proj.weight"
WAY_OUT = "python -m tests.comparison layout writes it anew, if that is meant"


@pytest.fixture(scope="module")
def records() -> tuple[Record, Record]:
    """Of this tree: what layout.json holds and one refusal, and a few of these again, made at the same time."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda names: make_record(REPOSITORY, names), ((*LAID_OUT, *TWICE), TWICE))
    return first, second


@pytest.fixture
def record(records: tuple[Record, Record]) -> Record:
    """A record of one's own to change."""
    return copy.deepcopy(records[1])


def test_two_records_of_a_tree_are_equal(records: tuple[Record, Record]) -> None:
    first, second = records
    assert second["conversions"].keys() == set(TWICE)
    for part in ("conversions", "sources"):
        assert {name: first[part][name] for name in second[part]} == second[part]


def test_a_record_holds_what_was_asked(record: Record) -> None:
    of_stock, plain, refused = (record["conversions"][name] for name in TWICE)
    assert len(of_stock["tensors"]) > 20 and len(plain["logits"]) == 6 and of_stock["statistics"]
    # kvquant stores K before RoPE, for which padding, as the answer has it, is refused; the other passes are equal
    assert list(of_stock["logits"])[-1] == "error of the answer"
    assert of_stock["logits"] == of_stock["logits of the stock model"]
    assert plain["run"]["code"] == 0 and plain["said"][-1].startswith(f"wrote FOLDER/outputs/{PLAIN}")
    assert refused["code"] == 2 and refused.keys() == {"code", "said"}
    assert record["sources"]["mistral"]["doctor"]["code"] == 0


def test_what_the_tree_writes_is_as_it_was(records: tuple[Record, Record]) -> None:
    made = {name: layout for name, layout in layout_of(records[0]).items() if name in LAID_OUT}
    found = list(differences(json.loads(LAYOUT_FILE.read_text(encoding="utf-8")), made))
    assert not found, "\n".join([*found, WAY_OUT])


def _rename(conversion: dict[str, Any]) -> None:
    conversion["tensors"] = {name.replace("q_proj", "query"): t for name, t in conversion["tensors"].items()}


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "a byte of a tensor": (
        lambda made: made["tensors"][TENSOR].update(bytes="other"),
        [f"tensors: {TENSOR}: bytes: ", " -> other"],
    ),
    "a dtype": (lambda made: made["tensors"][TENSOR].update(dtype="U8"), [f"tensors: {TENSOR}: dtype: I8 -> U8"]),
    "a name": (_rename, [f"tensors: {TENSOR}: only in the first", "q_proj", "query", "only in the second"]),
    "logits": (lambda made: made["logits"].update(chunk="other"), ["logits: chunk: ", " -> other"]),
    "a key of a config": (
        lambda made: made["files"]["config.json"].update(hidden_size=1),
        ["files: config.json: hidden_size: 128 -> 1"],
    ),
    "a file": (lambda made: made["files"].pop("tokenizer.json"), ["files: tokenizer.json: only in the first"]),
    "a line of the summary": (lambda made: made["said"].insert(0, "more"), ["said: ", "said[0]: "]),
    "an exit code": (lambda made: made.update(code=1), ["code: 0 -> 1"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_difference_is_said(
    change: str, records: tuple[Record, Record], record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alter, parts = CHANGES[change]
    alter(record["conversions"][PLAIN])
    files = tmp_path / "first.json", tmp_path / "second.json"
    for file, content in zip(files, (records[1], record), strict=True):
        file.write_text(json.dumps(content))
    assert main(["compare", str(files[0]), str(files[0])]) == 0
    assert capsys.readouterr().out.startswith("compared 3 conversions, ")
    assert main(["compare", *map(str, files)]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith(f"{PLAIN}: ") for line in lines)
    assert all(part in "\n".join(lines) for part in parts)
    assert summary.endswith(f": {len(lines)} differences")


def test_conversions_and_versions_of_one_record_alone_are_said(records: tuple[Record, Record], record: Record) -> None:
    del record["conversions"][PLAIN]
    record["made with"]["torch"] = "0"
    assert [line.split(":")[0] for line in compare(records[1], record)] == ["made with", PLAIN]
    assert compare(record, records[1])[-1] == f"{PLAIN}: only in the second"


def test_names_are_unique_and_every_source_is_converted() -> None:
    conversions = all_conversions(presets_of(REPOSITORY))
    assert len({conversion.name for conversion in conversions}) == len(conversions)
    assert {conversion.source for conversion in conversions} == SOURCES.keys()
    assert set(LAID_OUT) <= {conversion.name for conversion in conversions}
    assert len(presets_of(REPOSITORY)) > 20


def test_a_name_that_no_conversion_has_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing of the kind"):
        make_record(REPOSITORY, ["nothing of the kind"])
