"""The conversion script with bad input: one line that says what to do, and nothing left on the disk."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.common.convert.api import main
from octavo.common.convert.choices import choose_linears
from octavo.common.convert.flag_values import REFUSED
from octavo.common.convert.flags import parse_flags, parse_request
from octavo.common.runtime.cache.sizes import kv_bytes_per_token
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.static_scales import load_statistics
from octavo.models.llama3 import ARCHITECTURE

from ...support import (
    REPOSITORY,
    TEXTS,
    assert_one_error_line,
    convert_flags,
    edit_json,
    files_below,
    quantized_tensors,
    tiny_config,
    tiny_llama,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = REPOSITORY / "models" / "llama3" / "convert_quant_weights.py"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
    """`fails(argv, *parts)`: the conversion ends with one error line that has `parts`, and leaves no file behind."""

    def check(argv: list[str], *parts: str) -> None:
        before = files_below(tmp_path)
        try:
            code = main(ARCHITECTURE, argv)
        except SystemExit as stop:
            code = stop.code
        assert code in (1, 2)
        assert_one_error_line(capsys.readouterr().err, *parts)
        assert files_below(tmp_path) == before

    return check


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> Callable[[Callable[[Path], object]], Path]:
    """`damaged(change)`: a copy of the tiny checkpoint after `change(directory)`."""

    def copy(change: Callable[[Path], object]) -> Path:
        directory = tmp_path / "damaged source"
        shutil.copytree(source, directory)
        change(directory)
        return directory

    return copy


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the tensors of a single-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"

DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config.json": (lambda d: (d / "config.json").unlink(), ("config.json",)),
    "broken config.json": (lambda d: (d / "config.json").write_text("{"), ("config.json",)),
    "config.json is a list": (lambda d: (d / "config.json").write_text("[]"), ("config.json", "object")),
    "another architecture": (lambda d: edit_json(d / "config.json", model_type="gpt2"), ("gpt2", "llama")),
    "quantized by another tool": (
        lambda d: edit_json(d / "config.json", quantization_config={"quant_method": "hqq"}),
        ("quantized already", "'hqq'"),
    ),
    "quantized by Octavo": (lambda d: (d / "quant_model_description.json").write_text("{}"), ("quantized already",)),
    "config of another width": (lambda d: edit_json(d / "config.json", hidden_size=128), ("mismatched", "[320, 64]")),
    "config of more layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=4), ("is 4", "of 3 layers")),
    "config of fewer layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=2), ("is 2", "of 3 layers")),
    "config of other heads": (lambda d: edit_json(d / "config.json", num_key_value_heads=4), ("k_proj",)),
    "config with words for numbers": (
        lambda d: edit_json(d / "config.json", num_attention_heads="four"),
        ("num_attention_heads", "four"),
    ),
    "NaN in a weight": (lambda d: change_weights(d, lambda t: t[UP].view(-1)[5].fill_(float("nan"))), (UP, "NaN")),
    "Inf in a weight": (lambda d: change_weights(d, lambda t: t[UP].view(-1)[5].fill_(float("inf"))), (UP, "Inf")),
    "weights that overflow": (lambda d: change_weights(d, lambda t: t[UP].mul_(1e38)), ("NaN or Inf", "overflows")),
    "a tensor is missing": (lambda d: change_weights(d, lambda t: t.pop(UP)), (UP, "missing")),
    "a tensor too many": (lambda d: change_weights(d, lambda t: t.update(foo=torch.ones(2))), ("foo", "unexpected")),
    "a tensor of integers": (
        lambda d: change_weights(d, lambda t: t.update({UP: t[UP].to(torch.int8)})),
        (UP, "I8"),
    ),
    "truncated weights": (lambda d: os.truncate(d / "model.safetensors", 100_000), ("truncated", "model.safetensors")),
    "empty weights": (lambda d: os.truncate(d / "model.safetensors", 0), ("truncated", "model.safetensors")),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ("model*.safetensors",)),
    "no tokenizer": (
        lambda d: [(d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ("tokenizer",),
    ),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), ("tokenizer",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source(damage: str, damaged: Callable, fails: Callable, tmp_path: Path) -> None:
    change, parts = DAMAGES[damage]
    fails(convert_flags(damaged(change), tmp_path / "out"), *parts)


def test_a_missing_shard(fails: Callable, tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    tiny_llama().save_pretrained(directory, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(directory)
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    fails(convert_flags(directory, tmp_path / "out"), shard.name)


@pytest.mark.parametrize("path", ["nowhere", "no/such-model"])
def test_a_missing_path(path: str, fails: Callable, tmp_path: Path) -> None:
    fails(["--model_path", path, "--save_directory", str(tmp_path / "out"), "--calib_texts", "a"], path, "no such")


def test_a_file_for_a_directory(source: Path, fails: Callable, tmp_path: Path) -> None:
    fails(convert_flags(source / "config.json", tmp_path / "out"), "is a file")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"a text\n\nanother\n", "line 2: holds no text"),
        (b"a text\n   \n", "line 2: holds no text"),
        (b'a text\n{"inputs_pretokenized": \n', "line 2: no valid JSON"),
        (b'{"inputs_pretokenized": "a"}\n{"question": "b"}\n', "line 2: no 'inputs_pretokenized'"),
        (b'{"inputs_pretokenized": 3}\n', "line 1: holds no text"),
        (b'{"inputs_pretokenized": ""}\n', "line 1: holds no text"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_a_bad_calibration_file(content: bytes, part: str, source: Path, fails: Callable, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(content)
    target = str(tmp_path / "out")
    fails(["--model_path", str(source), "--save_directory", target, "--calib_file", str(file)], str(file), part)


def test_other_bad_calibration(source: Path, fails: Callable, tmp_path: Path) -> None:
    common = ["--model_path", str(source), "--save_directory", str(tmp_path / "out")]
    fails([*common, "--calib_file", str(tmp_path / "nowhere")], "nowhere", "cannot be read")
    fails([*common, "--calib_texts", "fine", ""], "text 2", "shorter than a token")
    fails([*common, "--calib_file", str(source / "config.json"), "--calib_texts", "a"], "one of the two")


BAD_FLAGS = [
    (["--nonsense"], "--nonsense"),
    (["--model_pat", "x"], "--model_pat"),
    (["--w_bit", "3"], "--w_bit"),
    (["--w_bit", "4"], "--w_bit 4 --a_bit 8: choose 8 and 8"),
    (["--w_bit", "4"], "is 4 and 16 with --format vllm-ascend-w4a8"),
    (["--w_bit", "4", "--a_bit", "16", "--is_dynamic", "True"], "--is_dynamic"),
    (["--w_bit", "8", "--a_bit", "16", "--act_method", "2"], "--act_method"),
    (["--w_bit", "4", "--a_bit", "16", "--group_size", "48"], "--group_size"),
    (["--group_size", "64"], "W8A8 has symmetric weights"),
    (["--w_sym", "False"], "W8A8 has symmetric weights"),
    (["--quantization", "w4a16", "--is_dynamic", "True"], "exclude each other"),
    (["--quantization", "w5a5"], "--quantization"),
    (["--anti_method", "m5"], "CBQ"),
    (["--anti_method", "m7"], "--anti_method"),
    (["--w_method", "HQQ"], "--w_method"),
    (["--fa_amp", "-1"], "--fa_amp"),
    (["--fa_amp", "100"], "nothing would be quantized"),
    (["--max_kl", "0"], "--max_kl"),
    (["--max_kl", "1e-9"], "nothing was written; most is lost in model.layers."),
    (["--preset", "fast"], "--preset"),
    (["--quantization", "float", "--scheme", "int8-token", "--w_method", "GPTQ"], "--w_method"),
    (["--scheme", "kvquant-4", "--anti_method", "m2"], "codebooks"),
    (["--scheme", "kvquant-4", "--kv_scales", "random"], "--kv_scales random"),
    (["--scheme", "octavo-4c", "--anti_method", "m2"], "bases of octavo-4c"),
    (["--scheme", "octavo-4c", "--kv_scales", "random"], "bases of octavo-4c come from texts"),
    (["--anti_method", "m1", "--disable_names", "*", "--scheme", "int8-token"], "--anti_method m1"),
    (["--anti_method", "m1", "--save_statistics", "f"], "--save_statistics"),
    (["--w_bit", "eight"], "--w_bit"),
    (["--w_bit", "16"], "--a_bit 8"),
    (["--w_bit", "16", "--a_bit", "16"], "quantizes nothing"),
    (["--w_bit", "16", "--a_bit", "16", "--use_fa_quant", "True", "--disable_names", "lm_head"], "--disable_names"),
    (["--w_bit", "16", "--a_bit", "16", "--use_fa_quant", "True", "--disable_level", "L1"], "--disable_level"),
    (["--use_kvcache_quant", "yes"], "--use_kvcache_quant"),
    (["--use_fa_quant", "true"], "--use_fa_quant"),
    (["--use_kvcache_quant", "True", "--use_fa_quant", "True"], "exclude each other"),
    (["--act_method", "4"], "--act_method"),
    (["--is_dynamic", "True", "--act_method", "3"], "--act_method 3"),
    (["--disable_level", "3"], "--disable_level"),
    (["--disable_level", "L01"], "--disable_level"),
    (["--disable_last_linear", "1"], "--disable_last_linear"),
    (["--part_file_size", "0"], "--part_file_size"),
    (["--part_file_size", "-1"], "--part_file_size"),
    (["--part_file_size", "1.5"], "--part_file_size"),
    (["--tokenizer_args", "{"], "--tokenizer_args"),
    (["--tokenizer_args", "[]"], "--tokenizer_args"),
    (["--device_type", "tpu"], "--device_type"),
    (["--disable_names", "model.layers.0.nothing"], "model.layers.0.nothing"),
    (["--input_ids_name", "ids"], "--input_ids_name"),
    (["--attention_mask_name", "seen"], "--attention_mask_name"),
    (["--save_statistics", "/nowhere/at/all"], "--save_statistics"),
]


@pytest.mark.parametrize(("flags", "part"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_a_bad_flag(flags: list[str], part: str, source: Path, fails: Callable, tmp_path: Path) -> None:
    fails(convert_flags(source, tmp_path / "out", *flags), part)


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_of_the_original_that_has_no_effect_here_is_refused(
    flag: str, source: Path, fails: Callable, tmp_path: Path
) -> None:
    kind, harmless, reason = REFUSED[flag]
    other = {float: "0.5", int: "7"}.get(kind, str(not harmless))
    fails(convert_flags(source, tmp_path / "out", f"--{flag}", other), f"--{flag}", reason)
    parse_flags("llama3", convert_flags(source, tmp_path / "out", f"--{flag}", str(harmless)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(source: Path, fails: Callable, tmp_path: Path) -> None:
    fails(convert_flags(source, tmp_path / "out", "--device_type", "cuda"), "cuda")


def test_an_output_that_cannot_be_made(source: Path, fails: Callable, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("mine")
    file.write_text("mine")
    fails(convert_flags(source, full), "exists already")
    fails(convert_flags(source, file), "exists already")
    fails(convert_flags(source, file / "below"), "cannot be written")
    fails(convert_flags(source, file / "far" / "below"), "cannot be written")
    assert (full / "precious").read_text() == file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_output_in_a_read_only_directory(source: Path, fails: Callable, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    fails(convert_flags(source, closed / "out"), "cannot be written")


def test_an_empty_output_directory_is_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out")) == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_disk_that_fills_up(source: Path, tmp_path: Path) -> None:
    """A limit of 100 kB per file stands in for a full disk: writing fails in the middle of the weights."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    target = tmp_path / "new parent" / "out"
    target.parent.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *convert_flags(source, target)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1
    assert_one_error_line(done.stderr, "--save_directory", "File too large", "nothing was kept")
    assert files_below(target.parent) == []


def test_the_script_as_a_user_runs_it(source: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    target = tmp_path / "a directory" / "of mine"
    command = [sys.executable, str(SCRIPT), *convert_flags(source, target, "--use_kvcache_quant", "True")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"KV cache, bytes per token +768 +192\n", done.stdout), done.stdout
    assert "18 linears in W8A8, attention ascend-c8" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert again.returncode == 1 and again.stdout == ""
    assert again.stderr == f"error: --save_directory {target}: exists already; choose another directory or remove it\n"


# What flags do where they have an effect.


def test_part_of_the_linears(source: Path, tmp_path: Path) -> None:
    def linears(*flags: str) -> list[str]:
        return choose_linears(
            tiny_llama(), parse_request(ARCHITECTURE, convert_flags(source, tmp_path, *flags)), stated, "lm_head"
        )

    stated = ["*.mlp.down_proj", "lm_head"]
    assert len(linears()) == 3 * 6 and not any("down_proj" in name for name in linears())
    assert "lm_head" in linears("--disable_last_linear", "False")
    chosen = linears("--disable_names", "*.q_proj", "model.layers.1.*")
    assert len(chosen) == 2 * 6 and "model.layers.0.mlp.down_proj" in chosen, "replaces the list that is stated"
    assert len(linears("--is_dynamic", "True")) == 3 * 7, "what is stated is for static scales"


def test_disable_level_in_the_output(converted: Callable[..., Path]) -> None:
    def quantized(*flags: str) -> list[str]:
        description = json.loads((converted(*flags) / "quant_model_description.json").read_text())
        return [n for n, label in description.items() if n.endswith(".weight") and label == "W8A8"]

    assert len(quantized()) == 18
    floats = {*quantized()} - {*quantized("--disable_level", "L5")}
    units = {re.sub(r"(q|k|v|gate|up)_proj", lambda found: "qkv" if found[1] in "qkv" else "mlp", n) for n in floats}
    assert len(units) == 5, "q, k and v are one, and gate and up"


def test_calibration_files_and_texts_give_the_same(
    source: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"inputs_pretokenized": text}) if n % 2 else text for n, text in enumerate(TEXTS)]
    file.write_text("\n".join(lines))
    target = tmp_path / "out"
    argv = ["--model_path", str(source), "--save_directory", str(target), "--calib_file", str(file)]
    assert main(ARCHITECTURE, argv) == 0
    expected, found = quantized_tensors(converted()), quantized_tensors(target)
    assert list(expected) == list(found) and all(torch.equal(expected[name], found[name]) for name in expected)


def test_conversion_is_deterministic(source: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    flags = ("--use_fa_quant", "True")
    target = tmp_path / "out"
    assert main(ARCHITECTURE, convert_flags(source, target, *flags)) == 0
    for name in files_below(target):
        assert (target / name).read_bytes() == (converted(*flags) / name).read_bytes(), name


def test_statistics_are_saved_and_serve_a_stock_model(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", "--save_statistics", str(file))) == 0
    statistics = load_statistics(file)
    assert statistics.layers == 3 and statistics.metadata["model_type"] == "llama"
    tokens = sum(len(tiny_tokenizer()(text)["input_ids"]) for text in TEXTS[:-1])
    assert int(statistics.metadata["tokens"]) == tokens, "the last text is held back"


def test_without_texts_the_small_one_that_comes_along(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--model_path", str(source), "--save_directory", str(tmp_path / "out"), "--use_kvcache_quant", "True"]
    assert main(ARCHITECTURE, argv) == 0
    assert "small text that comes with Octavo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scheme", "float_bytes", "expected"),
    [
        ("float", 2, 3 * 2 * 2 * 16 * 2),
        ("float", 4, 3 * 2 * 2 * 16 * 4),
        ("ascend-c8", 2, 3 * 2 * 2 * 16),
        ("ascend-fa", 2, 3 * 2 * 2 * 16),
        ("int8-token", 2, 3 * 2 * 2 * (16 + 4)),
    ],
)
def test_kv_bytes_per_token_use_the_kv_heads(scheme: str, float_bytes: int, expected: int) -> None:
    assert kv_bytes_per_token(tiny_config(), load_scheme(scheme), float_bytes) == expected


def test_permissions_follow_the_umask(converted: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out")) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}
