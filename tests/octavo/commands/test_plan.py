"""`octavo plan` as it is typed."""

import json
import re
import sys
from pathlib import Path

import pytest

from octavo.__main__ import main
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import PRESETS, load_scheme
from octavo.planning.report import TELLING

from ...support import assert_one_error_line, save_source, tiny_config, tiny_llama

WIDTH = 130


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose weights are taken away: a plan reads none."""
    directory = save_source(tmp_path_factory.mktemp("plan") / "tiny model", tiny_llama(head_dim=64))
    for file in directory.glob("*.safetensors"):
        file.unlink()
    return directory


def test_a_plan_is_a_table_of_schemes_and_what_the_words_mean(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(source), "--context", "100", "2,000", "--batch", "2", "--memory", "2GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [str(source), "weights: float32, 0.001 GB"]
    titles = [line for line in lines if line.startswith("KV cache of")]
    assert [title.split(",")[0] for title in titles] == ["KV cache of 2 x 100 tokens", "KV cache of 2 x 2"]
    assert all("in GB of 1,000,000,000 bytes; longest and largest in 2 GB" in title for title in titles)
    rows = [line.split() for line in lines if line.split() and line.split()[0] in TELLING]
    assert [row[0] for row in rows] == [*TELLING, *TELLING]
    assert rows[9][1:4] == ["32.00", "32.00", "3,072"] and rows[10][1:4] == ["8.50", "8.50", "816"]
    bits, stored = map(float, rows[13][1:3])
    assert rows[13][0] == "octavo-4" and bits == pytest.approx(
        kv_bits_per_element(tiny_config(head_dim=64), load_scheme("octavo-4"), 2000), abs=0.005
    )
    assert bits + 0.3 < stored < bits + 0.6  # with the floats by which it can be cropped
    longest = {row[0]: int(row[7].replace(",", "")) for row in rows[8:]}
    assert longest["octavo-2"] > longest["octavo-4"] > longest["int8-token"] > longest["float"] > 2000
    assert max(map(len, lines)) <= WIDTH
    assert lines[-1].startswith("With 2 GB: float weights + a float cache serve 2 x 2,000 tokens, and 4,096 at most;")


def test_data_are_in_bytes_and_of_all_schemes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(source), "--schemes", "all", "--preset", "eight-bit", "--json", "--context", "64"]
    assert main([*words, "--device_type", "cuda", "--memory", "1MiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"] == 2**20 and [row["scheme"] for row in found["rows"]] == ["transformers", *PRESETS]
    for row in found["rows"]:
        assert row["cache"]["kept"] <= row["cache"]["allocated"] < row["peak"]["total"]
        assert row["peak"]["process"] == 0
    longest = {row["scheme"]: row["longest"] for row in found["rows"]}
    assert longest["int8-token"] >= longest["float"] > longest["transformers"] == 0
    assert found["rows"][0]["weights"] > found["rows"][1]["weights"]


def test_without_a_memory_nothing_is_said_of_what_fits(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(source), "--schemes", "float", "--device_type", "npu"]) == 0
    out = capsys.readouterr().out
    assert "longest context" not in out and "how much memory npu has: give --memory for what fits" in out


def test_a_preset_weighs_the_same_whatever_rows_there_are(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for scheme in ("transformers", "float"):
        words = ["--preset", "eight-bit", "--schemes", scheme, "--context", "16", "--unit", "MB"]
        assert main(["plan", str(source), *words]) == 0
        said.append(capsys.readouterr().out.splitlines()[1])
    assert said[0] == said[1] and len(set(re.findall(r"[0-9.]+ MB", said[0]))) == 2


def test_a_picture_is_drawn(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.svg"
    words = ["plan", str(source), "--schemes", "float", "octavo-4", "--memory", "1GB", "--context", "256"]
    assert main([*words, "--plot", str(file)]) == 0
    drawn = file.read_text()
    assert drawn.startswith("<?xml") and all(
        f"<!-- {text} -->" in drawn for text in ("octavo-4", "sequences", "tokens")
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--preset", "smallest", "--quantization", "w8a8"], ["--preset and --quantization", "one of the two"]),
        (["--memory", "24"], ["--memory 24: is no size", "24GB or 24GiB"]),
        (["--schemes", "int9-token"], ["no scheme 'int9-token'; did you mean int8-token? (there are "]),
        (["--plot", "none/such.svg"], ["--plot none/such.svg: cannot be written"]),
        (["--plot", "plan.doc"], ["--plot plan.doc: cannot be written", ".svg or .png"]),
        (["--preset", "eight-bits"], ["did you mean eight-bit?"]),
        (["--context", "0"], ["--context: '0' is no positive integer"]),
        (["--batch", "many"], ["--batch: 'many' is no positive integer"]),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    parts: list[str],
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(source.parent)
    try:
        assert main(["plan", str(source), "--context", "16", *words]) == 1
    except SystemExit as stop:
        assert stop.code == 2
    assert_one_error_line(capsys.readouterr().err, *parts)


def test_a_picture_without_matplotlib_says_what_to_install(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", str(source), "--plot", "plan.svg", "--schemes", "float"]) == 1
    assert_one_error_line(capsys.readouterr().err, "--plot: needs matplotlib", "pip install matplotlib")
