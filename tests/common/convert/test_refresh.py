"""Code of today for directories of older versions: weights untouched, whole or not at all, and only for our own."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.common.convert.api import main as convert
from octavo.common.convert.output import bundle
from octavo.common.convert.refresh import main
from octavo.common.errors import OctavoError
from octavo.common.runtime.version import VERSION, check_version
from octavo.models.llama3 import ARCHITECTURE
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ...models.loading import load_without_octavo, save_expected
from ...support import REPOSITORY, assert_one_error_line, convert_flags, random_ids, save_source, tiny_llama
from .test_targets import LLAMA_31

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = ("--w_bit", "4", "--a_bit", "16", "--use_kvcache_quant", "True")
RUNTIME, MODELING = "octavo_runtime.py", "modeling_llama_fa3.py"
OLD_COMMIT, OLD_DIGEST = "0123456789ab", "ab" * 32


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def refresh(directory: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a refreshing says."""
    capsys.readouterr()
    assert main([str(directory)]) == 0
    return capsys.readouterr().out.splitlines()


def edit_config(directory: Path, **entries: Any) -> None:
    """Change entries of config.json; those that are None are taken out."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}, indent=2))


@pytest.fixture
def old(converted: Callable[..., Path], tmp_path: Path) -> Path:
    """A directory as an older version wrote it: code of another commit, whose runtime has one name less, no version."""
    directory = tmp_path / "old"
    shutil.copytree(converted(*FLAGS), directory)
    config = json.loads((directory / "config.json").read_text())
    edit_config(directory, octavo={name: value for name, value in config["octavo"].items() if name != "version"})
    for name in (RUNTIME, MODELING):
        text = (directory / name).read_text()
        text = re.sub(r"from commit \S+;", f"from commit {OLD_COMMIT};", text, count=1)
        text = re.sub(r"# sha256 \w+", f"# sha256 {OLD_DIGEST}", text, count=1)
        text = re.sub(r'NAMESPACE = "octavo_\w+"', 'NAMESPACE = "octavo_older"', text)
        (directory / name).write_text(text.replace("QuantizedCausalLM", "OlderCausalLM"))
    return directory


def test_a_directory_says_which_version_wrote_it(converted: Callable[..., Path]) -> None:
    config = json.loads((converted(*FLAGS) / "config.json").read_text())
    assert config["octavo"]["version"] == VERSION
    assert f'\nversion = "{VERSION}"\n' in (REPOSITORY / "pyproject.toml").read_text()


def test_refreshed_is_what_a_conversion_writes(
    old: Path, converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "OlderCausalLM" in (old / RUNTIME).read_text()
    assert main([str(old)]) == 0
    said = capsys.readouterr().out.splitlines()
    commit = re.search(r"from commit (\S+);", (old / RUNTIME).read_text())[1]
    for name, line in zip((MODELING, RUNTIME), said[:2], strict=True):
        assert line.startswith(f"{old / name}: commit {commit}, sha256 ")
        assert line.endswith(f"; was of commit {OLD_COMMIT}, sha256 {OLD_DIGEST[:12]}")
    assert said[2:] == [
        f"{old / 'config.json'}: Octavo {VERSION}; of a version that gave no number before",
        "weights and all other files are untouched",
    ]
    fresh = converted(*FLAGS)
    assert contents(old) == contents(fresh)

    before = contents(old)
    assert main([str(old)]) == 0
    assert capsys.readouterr().out.count("as it was") == 3 and contents(old) == before
    ids, logits = random_ids(1, 33), []
    for directory in (old, fresh):
        with torch.inference_mode():
            logits.append(LlamaForCausalLM.from_pretrained(directory).eval()(ids).logits)
    assert torch.equal(*logits)


def test_what_a_killed_process_left_is_removed(old: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    left, of_a_running = (old / f".config.json.{process}.partial" for process in (done.pid, os.getppid()))
    for file in (left, of_a_running):
        file.write_text("{")
    assert main([str(old)]) == 0
    assert not left.exists() and of_a_running.exists()


def test_config_says_what_readers_on_transformers_4_look_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_source(tmp_path / "source", tiny_llama(rope_parameters=LLAMA_31).bfloat16())
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "out")) == 0
    fresh = json.loads((tmp_path / "out" / "config.json").read_text())
    edit_config(tmp_path / "out", rope_scaling=None, rope_theta=None, torch_dtype=None)
    added = "without torch_dtype, rope_theta, rope_scaling"
    assert refresh(tmp_path / "out", capsys)[2].endswith(f"of {VERSION} before, {added}")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == fresh
    assert refresh(tmp_path / "out", capsys)[2:] == [
        f"{tmp_path / 'out' / 'config.json'}: Octavo {VERSION}; as it was",
        "weights and all other files are untouched",
    ]


def test_scales_for_models_in_float16_are_named(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first versions wrote deq_scale of a model in float32 as int64, which engines that run it in bfloat16 misread.

    They read it right in float16; torch_dtype, which MindIE goes by, says so from now on.
    """
    directory = tmp_path / "old"
    shutil.copytree(converted(), directory)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".deq_scale")]:
        tensors[name] = tensors[name].view(torch.int32).long()
    save_file(tensors, file)
    edit_config(directory, torch_dtype=None)
    before = file.read_bytes()
    assert refresh(directory, capsys)[3] == (
        "deq_scale is I64, as engines on Ascend read it of a model in float16, and dtype float32 makes vLLM run it in "
        "bfloat16: give it --dtype float16, or convert the model again"
    )
    config = json.loads((directory / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float16") and file.read_bytes() == before
    with torch.inference_mode():
        logits = [LlamaForCausalLM.from_pretrained(path)(random_ids(1, 9)).logits for path in (directory, converted())]
    assert torch.equal(*logits)


@pytest.mark.slow
def test_it_works_wherever_a_process_stops(
    old: Path, converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two of the steps, a process that knows no Octavo loads the directory and computes the same."""
    save_expected(LlamaForCausalLM.from_pretrained(converted(*FLAGS)), tmp_path / "expected")
    put, rows, steps = bundle.put_file, [], 5
    for finished in range(steps):
        directory = tmp_path / f"stopped after {finished}"
        shutil.copytree(old, directory)
        left = iter(range(finished))

        def stopping(file: Path, text: str, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            put(file, text)

        for module in (bundle, sys.modules[main.__module__]):
            monkeypatch.setattr(module, "put_file", stopping)
        assert main([str(directory)]) == 130
        rows.append((directory.name, str(directory), str(tmp_path / "expected")))
    monkeypatch.undo()
    found = load_without_octavo(rows, tmp_path)
    assert found == {name: [True, True, True, "torch.float32"] for name, *_ in rows}
    for _, directory, _ in rows:
        assert main([directory]) == 0
        assert contents(Path(directory)) == contents(converted(*FLAGS))


REFUSED = [
    ({"octavo": None}, "was not converted by Octavo (config.json has no 'octavo'"),
    ({"auto_map": None}, "was not converted by Octavo"),
    ({"octavo": {"scheme": "float", "version": "7.1.2"}}, f"was written by Octavo 7.1.2, and this is {VERSION}"),
    ({"octavo": {"scheme": "float", "version": ["0"]}}, "octavo.version in config.json is ['0'], which is no version"),
    ({"octavo": {"scheme": "float", "folios": 8}}, "octavo.folios in config.json is unknown to Octavo"),
    ({"octavo": {"scheme": {"name": "folded", "folds": 3}}}, "folds"),
    ({"model_type": "mamba"}, "the zoo has none for it"),
]


@pytest.mark.parametrize(("entries", "reason"), REFUSED)
def test_others_are_refused(
    entries: dict[str, Any], reason: str, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(old, **entries)
    before = contents(old)
    assert main([str(old)]) == 1
    assert_one_error_line(capsys.readouterr().err, str(old), reason)
    assert contents(old) == before


def test_files_of_others_and_missing_ones_are_refused(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(old.parent / "nowhere")]) == 1
    assert_one_error_line(capsys.readouterr().err, "nowhere: has no config.json")
    (old / RUNTIME).write_text("import os\n")
    before = contents(old)
    assert main([str(old)]) == 1
    assert_one_error_line(capsys.readouterr().err, "was not written by this command; move it away first")
    assert contents(old) == before
    (old / "quant_model_description.json").unlink()
    assert main([str(old)]) == 1
    assert_one_error_line(capsys.readouterr().err, "quant_model_description.json is missing")


def test_a_load_names_the_command(old: Path) -> None:
    config = json.loads((old / "config.json").read_text())
    edit_config(old, octavo={**config["octavo"], "folios": 8})
    with pytest.raises(OctavoError, match=rf"octavo.folios .* run python -m octavo.refresh {old} there"):
        LlamaForCausalLM.from_pretrained(old)
    edit_config(old, octavo={**config["octavo"], "version": "0.1.1"})
    with pytest.raises(OctavoError, match=r"was written by Octavo 0.1.1, and this is .*trust_remote_code=True"):
        LlamaForCausalLM.from_pretrained(old)


@pytest.mark.parametrize("version", ["0.0.9", "0.1", VERSION, "0.1.0rc1", "0.1.0.dev3"])
def test_older_and_equal_versions_are_served(version: str) -> None:
    check_version("here", {"scheme": "float", "version": version})
