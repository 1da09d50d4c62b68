"""transformers' own loader of AWQ and GPTQ, by GPTQModel, takes what we write: every tensor, to the same logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags, random_ids, save_source, tiny_llama
from .environments import SECONDS, packages_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

W4, W8 = ("--quantization", "w4a16", "--group_size", "32"), ("--quantization", "w8a16", "--group_size", "32")
OF_HALF = 0.02
"""Largest difference of logits, in their standard deviation, where linears compute in half precision."""
KINDS = {
    "awq": ("awq", W4),
    "awq with zeros": ("awq", (*W4, "--w_sym", "False")),
    "gptq": ("gptq", W4),
    "gptq with zeros": ("gptq", (*W4, "--w_sym", "False")),
    "gptq of 8 bits": ("gptq", W8),
    "gptq of 8 bits with zeros": ("gptq", (*W8, "--w_sym", "False")),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor, str, list[str]]]:
    """By kind: our directory, their logits, the module of their linears, and names of tensors that were not loaded."""
    packages = packages_of("gptqmodel")
    folder = tmp_path_factory.mktemp("gptqmodel")
    source = save_source(folder / "source", tiny_llama())
    for name, (dialect, flags) in KINDS.items():
        assert convert(ARCHITECTURE, convert_flags(source, folder / name / "ours", *flags)) == 0
        rewrite(RewriteRequest(folder / name / "ours", folder / name / "theirs", dialect))
    directories = json.dumps([str(folder / name / "theirs") for name in KINDS])
    script, ids = Path(__file__).with_name("run_gptqmodel.py"), json.dumps(random_ids(1, 24).tolist())
    command = [sys.executable, str(script), str(packages), directories, ids, str(folder / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    said, logits = json.loads(done.stdout.splitlines()[-1]), load_file(folder / "logits")
    return {name: (folder / name / "ours", logits[str(n)], *said[n]) for n, name in enumerate(KINDS)}


@pytest.mark.parametrize("name", KINDS)
def test_transformers_loads_the_same_model(
    name: str, loaded: dict[str, tuple[Path, torch.Tensor, str, list[str]]]
) -> None:
    path, found, linears, problems = loaded[name]
    assert linears.startswith("gptqmodel") and not problems
    ours = ARCHITECTURE.model_class.from_pretrained(path, dtype=torch.float32).eval()
    for module in ours.modules():
        if hasattr(module, "cpu_activations"):
            module.cpu_activations = "float"
    with torch.no_grad():
        expected = ours(random_ids(1, 24)).logits
    assert (found - expected).abs().max() < OF_HALF * expected.std()
