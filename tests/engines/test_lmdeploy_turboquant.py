"""The preset turboquant-lmdeploy against LMDeploy's own kernels, which run in Triton's interpreter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.rotary import hadamard
from octavo.common.runtime.schemes.kv_scheme import load_scheme

from .environments import packages_of, run_with, said_by

GROUPS, TOKENS, WIDTH = 2, 32, 64
SCRIPT = Path(__file__).with_name("run_lmdeploy_turboquant.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What LMDeploy says of random k and v `[G, S, D]`, k with large channels, and v not about 0."""
    folder, packages = tmp_path_factory.mktemp("turboquant"), packages_of("lmdeploy_0.18.0")
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn((GROUPS, TOKENS, WIDTH), generator=generator) for _ in range(2))
    key[..., 3] += 4
    states = {"key": key, "value": value + 0.5}
    for name, part in states.items():
        torch.save(part, folder / f"{name}.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        said = said_by(run_with(packages, SCRIPT, packages, folder))
    return {**said, **states, "decoded": dict(zip(states, torch.load(folder / "decoded.pt"), strict=True))}


@pytest.mark.parametrize("part", ["key", "value"])
def test_k_and_v_are_lmdeploys(part: str, answers: dict[str, Any]) -> None:
    """Its levels have more digits, and its codes are by the norm before that is rounded to float16."""
    codec, theirs = getattr(load_scheme("turboquant-lmdeploy"), part), answers["decoded"][part]
    store = CodeStore(codec)
    store.append(hadamard(answers[part])[None])
    found = store.decoded(0, TOKENS)[0]
    difference = (found - theirs).abs() / theirs.square().mean(dim=-1, keepdim=True).sqrt()
    assert (difference < 3e-3).float().mean() > 0.995, "all but what is as near to two codes"


def test_a_token_takes_lmdeploys_bytes(answers: dict[str, Any]) -> None:
    scheme = load_scheme("turboquant-lmdeploy")
    assert scheme.rotate_key and scheme.rotate_value
    assert (scheme.key.token_bits(WIDTH) + scheme.value.token_bits(WIDTH)) / 8 == answers["bytes"]
