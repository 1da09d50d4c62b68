"""Rewriting: whole or not at all, the source untouched, and the same by the flag of a conversion."""

import hashlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.common import progress
from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.directory import OctavoDirectory
from octavo.common.convert.dialects.rewriting import RewriteRequest, main, refusals, rewrite
from octavo.common.convert.dialects.table import DIALECTS, dialect_of
from octavo.common.convert.request import ConvertRequest
from octavo.common.errors import OctavoError
from octavo.models.llama3 import ARCHITECTURE

from ....support import assert_one_error_line, convert_flags, edit_json, files_below, save_source, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

FORMAT = "compressed-tensors"
_KILLED = """
import os, signal
from octavo.common.convert.output.shards import PlannedFiles
write = PlannedFiles.write
def stop(self, name, tensor, first_row=0):
    write(self, name, tensor, first_row)
    os.kill(os.getpid(), int(sys.argv.pop()))
import sys
PlannedFiles.write = stop
from octavo.rewrite import main
sys.exit(main(sys.argv[1:5] + ["--format", "compressed-tensors"]))
"""


def digests(directory: Path) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in files_below(directory)}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_nothing_half_written(
    how: signal.Signals, converted: Callable[..., Path], tmp_path: Path
) -> None:
    path, target = converted("--is_dynamic", "True"), tmp_path / "out"
    before = digests(path)
    flags = ["--model_path", str(path), "--save_directory", str(target)]
    subprocess.run([sys.executable, "-c", _KILLED, *flags, str(int(how))], capture_output=True, check=False)
    assert not target.exists() and digests(path) == before
    if how == signal.SIGINT:
        assert os.listdir(tmp_path) == []
    rewrite(RewriteRequest(path, target, FORMAT))
    assert os.listdir(tmp_path) == ["out"] and digests(path) == before


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_what_is_decoded_is_in_the_dtype_of_the_source(name: str, tmp_path: Path) -> None:
    """Also where norms, which are then all that is left in float, are in another."""
    model = tiny_llama().to(torch.bfloat16)
    for part, module in model.named_modules():
        if "norm" in part:
            module.float()
    flags = ("--quantization", "w8a16", "--group_size", "32", "--embeddings", "int8", "--scheme", "float")
    source = save_source(tmp_path / "source", model)
    edit_json(source / "config.json", dtype="bfloat16")
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "ours", *flags)) == 0
    assert {header.dtype for header in OctavoDirectory(tmp_path / "ours").floats().values()} == {"F32"}
    rewrite(RewriteRequest(tmp_path / "ours", tmp_path / "theirs", name))
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    dtypes = {stored[f"{part}.weight"].dtype for part in ("model.embed_tokens", "lm_head")}
    assert dtypes == {torch.bfloat16} and stored["model.norm.weight"].dtype == torch.float32


def test_files_of_a_given_size(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("--is_dynamic", "True")
    rewrite(RewriteRequest(path, tmp_path / "one", FORMAT))
    rewrite(RewriteRequest(path, tmp_path / "many", FORMAT, max_shard_gb=1e-4))
    names = [name for name in files_below(tmp_path / "many") if name.endswith(".safetensors")]
    assert len(names) > 3 and "model.safetensors.index.json" in files_below(tmp_path / "many")
    found = {name: tensor for file in names for name, tensor in load_file(tmp_path / "many" / file).items()}
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_bar_shows_what_takes_long(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("quick", 2.0), ("long", 0.0)):
        monkeypatch.setattr(progress, "PROGRESS_AFTER", seconds)
        rewrite(RewriteRequest(converted("--is_dynamic", "True"), tmp_path / name, FORMAT))
        assert ("writing:" in capfd.readouterr().err) == (name == "long")


def test_a_conversion_writes_the_same(source: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    flags = ("--is_dynamic", "True", "--scheme", "vllm-fp8")
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "a", *flags, "--format", FORMAT)) == 0
    rewrite(RewriteRequest(converted(*flags), tmp_path / "b", FORMAT))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_conversion_derives_what_the_engine_holds(source: Path, tmp_path: Path) -> None:
    flags = ("--quantization", "fp8", "--scheme", "vllm-fp8-head", "--format", FORMAT)
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags)) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.v_scale"].shape == (2, 1, 1)


def test_a_conversion_is_refused_before_it_is_made(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--scheme", "octavo-4", "--format", FORMAT)
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags)) == 1
    said = capsys.readouterr().err
    assert_one_error_line(said, "--format compressed-tensors:", "give --scheme vllm-fp8, or --scheme int8-token")
    assert "--statistics" not in said  # which a rewriting has
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_says_who_reads_it(name: str) -> None:
    dialect = DIALECTS[name]
    assert dialect.engines and all(engine.versions and engine.reads for engine in dialect.engines)


def test_static_scales_need_statistics(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = converted("--is_dynamic", "True")
    flags = ["--model_path", str(path), "--save_directory", str(tmp_path / "out"), "--format", FORMAT]
    assert main([*flags, "--scheme", "vllm-fp8"]) == 1
    assert_one_error_line(capsys.readouterr().err, "--scheme vllm-fp8:", "give --statistics FILE")


ENGINES = {
    "vllm": "compressed-tensors or awq or gptq or modelopt",
    "SGLang": "compressed-tensors or awq or gptq",
    "hf": "compressed-tensors or awq or gptq",
    "trtllm": "modelopt",
    "tensorrt-llm": "modelopt",
    "lmdeploy": "compressed-tensors or awq or gptq",
    "llama.cpp": "gguf",
    "llamacpp": "gguf",
    "ort": "onnxruntime-genai",
    "onnxruntime": "onnxruntime-genai",
    "mindie": "ascend",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_in_the_place_of_a_format_names_those_it_reads(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--model_path", str(tmp_path), "--format", engine, "--save_directory", str(tmp_path / "out")])
    assert_one_error_line(capsys.readouterr().err, f"--format: {engine} is an engine; give --format {ENGINES[engine]} ")
    with pytest.raises(OctavoError, match=f"--format {engine}: is an engine; give {ENGINES[engine]}$"):
        dialect_of(engine)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="--format none: is none of compressed-tensors"):
        rewrite(RewriteRequest(tmp_path, tmp_path / "out", "none"))


def test_a_target_is_of_our_own_format(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="target mindie: is of the format ascend, not gguf"):
        ConvertRequest(tmp_path, tmp_path / "out", target="mindie", format="gguf")


def test_commands_name_a_place_with_a_space(converted: Callable[..., Path]) -> None:
    """As one word, in all formats that hold one of three conversions."""
    fp8 = ("--scheme", "vllm-fp8", "--w_bit", "16", "--a_bit", "16")
    found = set()
    for flags in (("--w_bit", "4", "--a_bit", "16", "--group_size", "32"), fp8, ("--scheme", "ascend-c8", *fp8[2:])):
        form = OctavoDirectory(converted(*flags)).form
        for name in (name for name, reason in refusals(form).items() if reason is None):
            words = [shlex.split(line, comments=True) for line in DIALECTS[name].serve(form, Path("/a place/out"))]
            assert words and all(any("/a place/out" in word for word in line) for line in words), name
            found.add(name)
    assert found >= {"compressed-tensors", "awq", "gptq", "modelopt", "onnxruntime-genai"}, found
