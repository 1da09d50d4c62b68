"""The grid of quantized linears, one case of it from end to end, and the tables of its rows."""

import csv
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from octavo import ConvertRequest

from ..support import REPOSITORY, TEXTS, save_source, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return import_module("weights")


@pytest.fixture
def tables(weights: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/weight_tables.py` with results of its own, of which there are none yet."""
    module = import_module("weight_tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Flags for the tiny Llama; all files lie in `tmp_path`."""
    (tmp_path / "calibration.txt").write_text("\n".join(TEXTS))
    (tmp_path / "evaluation.txt").write_text("\n".join(reversed(TEXTS)))
    files = {
        "--model_path": save_source(tmp_path / "tiny", tiny_llama()),
        "--calib_file": tmp_path / "calibration.txt",
        "--eval_file": tmp_path / "evaluation.txt",
        "--results": tmp_path / "weights.csv",
    }
    return [str(part) for pair in files.items() for part in pair] + ["--windows", "2", "--length", "48"]


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_cases_have_names_and_columns_of_their_own(weights: ModuleType) -> None:
    settings = weights.grid()
    assert len({setting.name for setting in settings}) == len(settings)
    own = [setting for setting in settings if not setting.name.startswith(weights.RECIPE)]
    requests = [ConvertRequest("M", "D", **setting.asked) for setting in own]
    assert all(request not in requests[:number] for number, request in enumerate(requests))
    rows = [weights.described(setting) for setting in own]
    assert len({tuple(value for name, value in row.items() if name != "case") for row in rows}) == len(own)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("W8A8 + C8, anti none, act 1", ("W8A8", "", "1", "MinMax", "ascend-c8", "recipe")),
        ("W8A8 all but lm_head, anti m6, act mse", ("W8A8", "m6", "mse", "MinMax", "float", "lm_head")),
        ("W8A8_DYNAMIC all, anti m6", ("W8A8_DYNAMIC", "m6", "", "MinMax", "float", "none")),
        ("W8A16, anti none", ("W8A16", "", "", "MinMax", "float", "lm_head")),
        ("W4A16 g64 affine, anti m3, GPTQ", ("W4A16, groups of 64, affine", "m3", "", "GPTQ", "float", "lm_head")),
        (
            "W4A16 g128 affine, anti m3, GPTQ, down and v in float",
            ("W4A16, groups of 128, affine", "m3", "", "GPTQ", "float", "*.down_proj, *.v_proj, lm_head"),
        ),
        ("preset ascend-fa", ("W8A8", "m6", "1", "MinMax", "ascend-fa", "recipe")),
    ],
)
def test_columns_say_what_is_asked_for(weights: ModuleType, name: str, expected: tuple[str, ...]) -> None:
    (setting,) = (setting for setting in weights.grid() if setting.name == name)
    row = weights.described(setting)
    assert tuple(row[column] for column in weights.COLUMNS[4:10]) == expected


def test_a_case_is_converted_scored_and_not_measured_twice(
    weights: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weights.main([*arguments, "--only", "W8A8_DYNAMIC all, anti none"]) == 0
    (row,) = read(tmp_path / "weights.csv")
    assert tuple(row) == weights.COLUMNS
    assert row["model"] == "tiny" and row["kind"] == "W8A8_DYNAMIC" and row["linears"] == "none"
    assert row["calibration"] == f"{len(TEXTS)} texts of calibration.txt" and row["text"] == "evaluation.txt"
    assert (row["windows"], row["length"]) == ("2", "48")
    assert 0 < float(row["kl"]) < 0.1 < float(row["top1"]) <= 1
    assert 0 < float(row["megabytes"]) < (tmp_path / "tiny" / "model.safetensors").stat().st_size / 1e6
    assert weights.main([*arguments, "--only", "W8A8_DYNAMIC all, anti none"]) == 0
    assert read(tmp_path / "weights.csv") == [row]
    capsys.readouterr()
    assert weights.main([*arguments, "--only", "W8A8_DYNAMIC all, anti m?", "--list"]) == 0
    assert capsys.readouterr().out.count("\n") == 5


def test_a_case_that_fails_is_reported_and_the_others_are_measured(
    weights: ModuleType,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = weights.Setting("broken", {"float_linears": ["no.such.linear"]})
    refused = weights.Setting("refused", {"anti_method": "m5"})
    monkeypatch.setattr(weights, "grid", lambda: [broken, refused, weights.Setting("whole", {"linear": "w8a16"})])
    assert weights.main(arguments) == 1
    assert [row["case"] for row in read(tmp_path / "weights.csv")] == ["whole"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not measured: ")]
    assert "no.such.linear" in lines[0] and "m5 is CBQ" in lines[1]


def test_a_glob_that_names_no_case_is_refused(weights: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        weights.main([*arguments, "--only", "W2A2*"])
    assert refused.value.code == 2


def record(weights: ModuleType, file: Path, *rows: dict[str, Any]) -> None:
    """Append rows of cases, with columns changed."""
    settings = {setting.name: setting for setting in weights.grid()}
    rest = {"commit": "c", "code": "d", "model": "m", "megabytes": "1.5", "seconds": "2", "calibration": "3 texts of a"}
    rest |= {"text": "b", "windows": "2", "length": "2048", "perplexity": "11", "float_perplexity": "10", "top1": "0.9"}
    rest["bits"] = "4.531"
    whole = [rest | weights.described(settings[row["case"]]) | row for row in rows]
    import_module("rows").append_rows(file, weights.COLUMNS, whole)


def test_tables_of_no_rows_say_so(tables: ModuleType) -> None:
    assert tables.weights_table() == "No weights are measured yet."
    assert tables.best_weights_table() == "No weights are measured yet."


def test_the_matrix_marks_the_least_and_leaves_gaps(weights: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    record(
        weights,
        tmp_path / "weights.csv",
        {"case": "W8A8 + C8, anti m2, act mse", "kl": "0.020000"},
        {"case": "W8A8 + C8, anti none, act 1", "kl": "0.900000"},
        {"case": "W8A8 + C8, anti none, act 1", "kl": "0.050000"},
        {"case": "preset ascend", "kl": "0.010000"},
        {"case": "W4A16 g128 affine, anti m3, GPTQ, down and v in float", "kl": "0.07"},
    )
    lines = tables.weights_table().split("\n")
    start = lines.index("| anti_method | act_method 1 (minmax) | act_method mse |")
    assert lines[start + 2] == "| none | 0.05000 |  |"
    assert lines[start + 3] == "| m2 |  | **0.02000** |"
    (preset,) = (line for line in lines if "| ascend-c8 | recipe |" in line and "0.01000" in line)
    assert preset == ("| W8A8 | ascend-c8 | recipe | m6 | 1 | MinMax | 4.531 | 1.5 | 0.01000 | +10.00 % | 90.0 % |")
    assert any("| down_proj, v_proj, lm_head |" in line for line in lines)
    assert lines[0] == "**m**" and "2 windows of 2,048 tokens of b" in lines[-1] and "3 texts of a" in lines[-1]


def test_rows_of_a_table_have_the_same_conditions(weights: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    record(
        weights,
        tmp_path / "weights.csv",
        {"case": "W8A16, anti none", "kl": "0.1", "windows": "1"},
        {"case": "W4A16 g64, anti none, MSE", "kl": "0.3"},
        {"case": "W4A16 g64, anti none, GPTQ", "kl": "0.2"},
        {"case": "W8A16, anti none", "kl": "0.4", "model": "other", "windows": "1"},
    )
    table = tables.weights_table()
    assert table.count("| W8A16 |") == 1 and "0.40000" in table and "0.10000" not in table
    best = tables.best_weights_table()
    assert "0.20000" in best and "0.30000" not in best and "of other: 1 window of" in best
