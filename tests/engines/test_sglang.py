"""AWQ, GPTQ and compressed-tensors of ours as SGLang loads them, by its own configs, linears and Llama; see the reader.

Not run are its kernels, which need CUDA. `make test-engines` unpacks the wheel.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.common.convert.api import main as convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags, save_source, tiny_llama
from .environments import packages_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

READER = Path(__file__).with_name("sglang_reader.py")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
W4 = ("--quantization", "w4a16", "--group_size", "32")
CASES = {
    "awq": ("awq", (*W4, "--w_sym", "False"), 1),
    "gptq": ("gptq", W4, 1),
    "compressed-tensors": ("compressed-tensors", (*W4, "--scheme", "vllm-fp8"), 0),
}
"""Format, flags of a conversion, and the dimension of output channels."""


def run_reader(tmp_path: Path, dialect: str, flags: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
    """Convert a tiny Llama, write it in a dialect, and let the reader load that."""
    package = packages_of("sglang")
    source = save_source(tmp_path / "source", tiny_llama(**SIZES))
    assert convert(ARCHITECTURE, convert_flags(source, tmp_path / "ours", *flags)) == 0
    rewrite(RewriteRequest(tmp_path / "ours", tmp_path / "theirs", dialect))
    command = [sys.executable, str(READER), str(package), str(tmp_path / "theirs"), dialect, str(tmp_path / "found")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_loaded(name: str, tmp_path: Path) -> None:
    dialect, flags, dim = CASES[name]
    done = run_reader(tmp_path, dialect, flags)
    assert done.returncode == 0, done.stderr
    found, stored = load_file(tmp_path / "found"), load_file(tmp_path / "theirs" / "model.safetensors")
    checked = set()
    for key, tensor in found.items():
        parent, _, part = key.rpartition(".")
        owner, _, linear = parent.rpartition(".")
        names = [f"{owner}.{shard}.{part}".lstrip(".") for shard in FUSED.get(linear, (linear,))]
        if linear == "attn":
            names = [f"{owner}.{part}"]
        checked.update(names)
        if part in ("g_idx", "weight_shape"):
            continue
        expected = torch.cat([stored[each] for each in names], dim=dim) if len(names) > 1 else stored[names[0]]
        assert torch.equal(tensor, expected.to(tensor.dtype).view(tensor.shape)), key
    needed = {
        key for key in stored if "_proj." in key or key.endswith(("k_scale", "v_scale"))
    }  # of queries it has none
    assert needed <= checked, needed - checked
    assert any("attn.k_scale" in key for key in found) == (dialect == "compressed-tensors")


def test_zeros_of_gptq_are_refused(tmp_path: Path) -> None:
    done = run_reader(tmp_path, "gptq", (*W4, "--w_sym", "False"))
    assert done.returncode and "Unsupported quantization config: bits=4, sym=False" in done.stderr
