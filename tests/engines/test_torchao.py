"""The presets mxfp8 and mxfp4 against torchao's reference of OCP's formats: the same exponents, codes and values."""

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.schemes.kv_scheme import load_scheme

from .environments import packages_of, run_with, said_by

TOKENS, WIDTH = 40, 64
SCRIPT = Path(__file__).with_name("run_torchao.py")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["mxfp8", "mxfp4"])
def test_blocks_are_torchaos(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of sizes from 1e-3 to 1e2, in bfloat16 with many values in the middle between two codes."""
    packages = packages_of("torchao")
    values = torch.randn((1, 2, TOKENS, WIDTH), generator=torch.Generator().manual_seed(0))
    values = (values * torch.logspace(-3, 2, TOKENS)[:, None]).to(dtype)
    torch.save(values, tmp_path / "values.pt")
    said_by(run_with(packages, SCRIPT, tmp_path, preset))
    theirs: dict[str, Any] = torch.load(tmp_path / "found.pt")
    codec = load_scheme(preset).key
    store = CodeStore(codec)
    store.append(values)
    assert torch.equal(store._scale[:, :, :TOKENS], theirs["exponents"])
    assert torch.equal(store.decoded(0, TOKENS), theirs["values"])
    assert codec == load_scheme(preset).value
