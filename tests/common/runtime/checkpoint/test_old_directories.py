"""Directories that an older Octavo wrote: the bundle command mends their code, and leaves their weights alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.common.convert.output.bundle import main
from octavo.common.runtime.passes import whole_passes
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ....metrics import rmse_in_std
from ....models.loading import load_without_octavo, save_expected
from ....support import CACHE_NAME, REPOSITORY, convert_flags, random_ids
from ....tolerances import TOLERANCES

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

OLD = "75351b5"
"""The last commit whose converted directories know no cache by its new name, so that they need transformers < 5.24."""
FLAGS = {
    "W8A8, C8": ("--use_kvcache_quant", "True"),
    "FAQuant": ("--is_dynamic", "True", "--use_fa_quant", "True"),
    "W4A16, octavo-4": ("--w_bit", "4", "--a_bit", "16", "--scheme", "octavo-4"),
}
CONVERT = """
import json, sys
import torch
from safetensors.torch import save_file
from octavo.common import bundle
from octavo.common.convert import main
from octavo.models.llama3 import ARCHITECTURE
assert bundle.__file__.startswith(sys.argv[1]), bundle.__file__
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[2]))
for flags in json.loads(sys.argv[3]):
    assert main(ARCHITECTURE, flags) == 0
    directory = flags[flags.index("--save_directory") + 1]
    model = ARCHITECTURE.model_class.from_pretrained(directory).eval()
    # what gives a pass its cache here knows the old name only, so that the pass is given one, by the name of today
    model.base_model._forward_pre_hooks.clear()
    with torch.inference_mode():
        save_file({"logits": model(ids, **{sys.argv[4]: model.new_cache()}).logits}, directory + " logits")
"""


@pytest.fixture(scope="module")
def old(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Directories that the code of `OLD` converted, each with what its model computed beside it."""
    root = tmp_path_factory.mktemp("old")
    archive = ["git", "-C", str(REPOSITORY), "archive", OLD, "common", "models", "ops"]
    try:
        packed = subprocess.run(archive, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"commit {OLD} is not here: a clone that is shallow, or no git")
    (root / "octavo").mkdir()
    subprocess.run(["tar", "x", "-C", str(root / "octavo")], input=packed, check=True)
    directories = {name: root / f"converted {number}" for number, name in enumerate(FLAGS)}
    jobs = [convert_flags(source, directories[name], *flags) for name, flags in FLAGS.items()]
    arguments = [str(root), json.dumps(random_ids(2, 90).tolist()), json.dumps(jobs), CACHE_NAME]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", CONVERT, *arguments]  # run where the octavo of today is not beside it
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    yield directories


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_one_command_mends_them(old: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for name, directory in old.items():
        before = contents(directory)
        assert main(["--arch", "llama3", "--out", str(directory)]) == 0
        said = capsys.readouterr().out
        assert said.count("was of commit ") == 2 and "untouched" in said
        after = contents(directory)
        assert before.keys() == after.keys()
        assert {file for file in before if before[file] != after[file]} == {
            "modeling_llama_fa3.py",
            "octavo_runtime.py",
        }

        model = LlamaForCausalLM.from_pretrained(directory).eval()
        with torch.inference_mode(), whole_passes(model.base_model):  # as that code did, module by module
            output = model(random_ids(2, 90))
        assert getattr(output, CACHE_NAME).scheme == model.scheme and model.scheme.is_quantized
        expected = load_file(f"{directory} logits")["logits"]
        error = rmse_in_std(output.logits, expected)
        assert error <= TOLERANCES["logits rmse with codes tipped over"]
        save_expected(model, tmp_path / f"{len(rows)}.safetensors")
        rows.append((name, str(directory), str(tmp_path / f"{len(rows)}.safetensors")))
    found = load_without_octavo(rows, tmp_path)
    assert found == {name: [True, True, True, "torch.float32"] for name in FLAGS}
