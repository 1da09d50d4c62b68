"""The preset nvfp4 against vLLM's reference of the format, with and without a scale of the tensor."""

import dataclasses
from pathlib import Path

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.schemes.kv_scheme import load_scheme

from .environments import run_in

TOKENS, WIDTH = 48, 64

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("unit", [1.0, 0.0625, 0.013])
def test_blocks_are_vllms(unit: float, tmp_path: Path) -> None:
    """Of sizes from 1e-3, where e4m3 has no scale but 0, to 1e4, where it saturates; it divides in another order."""
    values = torch.randn((TOKENS, WIDTH), generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-3, 4, TOKENS)[:, None]
    values[0, :16] = 0
    torch.save(values, tmp_path / "values.pt")
    run_in("vllm", "run_vllm_nvfp4.py", tmp_path, unit)
    theirs = torch.load(tmp_path / "found.pt")
    store = CodeStore(dataclasses.replace(load_scheme("nvfp4").key, fixed_scale=unit))
    store.append(values[None, None])
    found, scale = store.decoded(0, TOKENS)[0, 0], store._scale[0, 0, :TOKENS].float()
    same = (scale == theirs["scales"]).repeat_interleave(16, dim=-1)
    assert same.float().mean() > 0.98 and (scale == 0).any() and scale.max() == 448
    close = (found - theirs["values"]).abs() <= 1e-6 * theirs["values"].abs()
    assert close[same].float().mean() > 0.998, "all but what is as near to two codes"
