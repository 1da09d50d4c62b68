"""Quantized linears run from their codes: a loaded checkpoint takes the memory that its files do, and little more."""

from pathlib import Path

import pytest

from octavo.common.convert.api import main
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags, run_python, save_source, tiny_llama
from .loading import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads resident memory from /proc"),
]

SHAPE = {"num_hidden_layers": 10, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
KINDS = {
    "W8A8": ("--disable_names", "lm_head"),
    "W8A8_DYNAMIC": ("--is_dynamic", "True"),
    "W8A16": ("--w_bit", "8", "--a_bit", "16"),
    "W4A16": ("--w_bit", "4", "--a_bit", "16", "--group_size", "128"),
}
MOST = 1.1
"""Resident memory, against the weights on disk, of which embeddings are a part in their own dtype."""

LOAD = """
import ctypes, json, re, sys
import torch
from transformers import AutoModelForCausalLM

def resident():
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what is freed is no part of the model, and how much glibc keeps of it is chance
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    total, of_weights = int(fields["RssAnon"].split()[0]), False
    for line in open("/proc/self/smaps"):
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            of_weights = line.rstrip().endswith(".safetensors")
        elif of_weights and line.startswith("Rss:"):
            total += int(line.split()[1])
    return 1024 * total

def loaded(source):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    with torch.inference_mode():
        model(torch.arange(3, 35)[None])
    return model

tiny = loaded(sys.argv[1])
before = resident()
model = loaded(sys.argv[2])
print(json.dumps(resident() - before))
"""
"""Pages of mapped weights count as anonymous ones do: what is read from the file in place is no less in memory. Those
of libraries do not. The tiny model is loaded first, so that what libraries allocate is there already."""


@pytest.fixture(scope="module")
def large_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 270 MB in bf16 whose memory is in its linears."""
    model = tiny_llama(initializer_range=0.02, **SHAPE).bfloat16()
    return save_source(tmp_path_factory.mktemp("large"), model)


@pytest.mark.parametrize("kind", KINDS)
def test_resident_memory_is_the_size_on_disk(kind: str, source: Path, large_source: Path, tmp_path: Path) -> None:
    for name, directory in {"tiny": source, "large": large_source}.items():
        assert main(ARCHITECTURE, convert_flags(directory, tmp_path / name, *KINDS[kind])) == 0
    growth = run_python(
        LOAD, str(tmp_path / "tiny"), str(tmp_path / "large"), environment=environment(tmp_path / "cache")
    )
    on_disk = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert growth <= MOST * on_disk, f"{growth / 1e6:.1f} MB for {on_disk / 1e6:.1f} MB on disk"
