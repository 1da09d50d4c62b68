"""AWQ, GPTQ and compressed-tensors of ours as LMDeploy's TurboMind reads them, by its own Python; see the reader.

Not run are TurboMind's kernels, which need CUDA. `make test-engines` unpacks the wheel.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.directory import OctavoDirectory
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags, save_source, tiny_llama
from .environments import packages_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

READER = Path(__file__).with_name("lmdeploy_reader.py")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def run_reader(tmp_path: Path, dialect: str, group: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Convert a tiny Llama, write it in a dialect, and let the reader read that."""
    package = packages_of("lmdeploy_0.18.0")
    source = save_source(tmp_path / "source", tiny_llama(**SIZES))
    given = ("--quantization", "w4a16", "--group_size", group, *flags)
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "ours", *given)) == 0
    rewrite(RewriteRequest(tmp_path / "ours", tmp_path / "theirs", dialect))
    command = [sys.executable, str(READER), str(package), str(tmp_path / "theirs"), str(tmp_path / "found")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


CASES = [
    ("awq", "128", "True"),
    ("awq", "128", "False"),
    ("gptq", "128", "True"),
    ("compressed-tensors", "128", "True"),
    ("compressed-tensors", "32", "False"),
]


@pytest.mark.parametrize(("dialect", "group", "symmetric"), CASES)
def test_codes_scales_and_zeros_are_ours(dialect: str, group: str, symmetric: str, tmp_path: Path) -> None:
    done = run_reader(tmp_path, dialect, group, "--w_sym", symmetric)
    assert done.returncode == 0, done.stderr
    found, directory = load_file(tmp_path / "found"), OctavoDirectory(tmp_path / "ours")
    names = [name for name in directory.form.linears if name != directory.form.head]
    assert len(names) == 3 * 7 and len(found) == len(names) * 4
    for name in names:
        parts = directory.linear(name)
        zero = torch.zeros_like(parts.scale) if parts.zero is None else parts.zero
        assert (parts.zero is None) == (symmetric == "True")
        assert torch.equal(found[f"{name}.weight"].T, (parts.codes + 8).to(torch.uint8))
        assert torch.equal(found[f"{name}.zeros"].T.float(), zero + 8)
        scales = found[f"{name}.scales"].T
        assert torch.equal(scales, parts.scale.to(scales.dtype))
        decoded = found[f"{name}.float"].T.float()
        torch.testing.assert_close(decoded, parts.float_weight(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("dialect", "group", "symmetric", "reason"),
    [
        ("awq", "32", "True", 'Unsupported group_size=32 for model_format="awq"'),
        ("gptq", "32", "True", 'Unsupported group_size=32 for model_format="gptq"'),
        ("gptq", "128", "False", "unsupported quant config"),
        ("compressed-tensors", "64", "True", 'Unsupported group_size=64 for model_format="compressed-tensors"'),
    ],
)
def test_what_it_refuses(dialect: str, group: str, symmetric: str, reason: str, tmp_path: Path) -> None:
    done = run_reader(tmp_path, dialect, group, "--w_sym", symmetric)
    assert done.returncode and reason in done.stderr.splitlines()[-1], done.stderr
