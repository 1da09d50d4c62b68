"""The openvino presets against OpenVINO's CPU plugin: what it keeps of k and v, and what its attention answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.schemes.kv_scheme import load_scheme

from .environments import run_in

GROUPS, TOKENS, WIDTH = 2, 24, 64

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def states() -> dict[str, torch.Tensor]:
    """Random q, k and v `[1, G, S, D]`, k with large channels, and v not about 0."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((1, GROUPS, TOKENS, WIDTH), generator=generator) for _ in range(3))
    key[..., 3] += 4
    return {"query": query, "key": key, "value": value + 0.5}


def answers(states: dict[str, torch.Tensor], precision: str, folder: Path) -> tuple[dict[str, str], Any]:
    """What OpenVINO says its settings are, and its output and states."""
    np.savez(folder / "given.npz", **{name: part.numpy() for name, part in states.items()})
    said = run_in("openvino", "run_openvino.py", folder / "given.npz", folder / "found.npz", precision)
    return said, np.load(folder / "found.npz")


def ours(preset: str, part: torch.Tensor) -> torch.Tensor:
    """What a store of ours holds."""
    store = CodeStore(load_scheme(preset).key)
    store.append(part)
    return store.decoded(0, TOKENS)


def test_eight_bits_are_its_default_and_kept_as_ours(states: dict[str, torch.Tensor], tmp_path: Path) -> None:
    said, found = answers(states, "default", tmp_path)
    assert "uint8" in said["KEY_CACHE_PRECISION"] and "uint8" in said["VALUE_CACHE_PRECISION"]
    assert said["KEY_CACHE_GROUP_SIZE"] == said["VALUE_CACHE_GROUP_SIZE"] == "0", "all channels share a scale"
    for name in ("key", "value"):
        part = states[name]
        step = (part.amax(dim=-1, keepdim=True) - part.amin(dim=-1, keepdim=True)) / 255
        difference = (ours("openvino-u8", part) - torch.from_numpy(found[name])).abs() / step
        assert (difference < 1e-3).float().mean() > 0.999, "all but what is as near to two codes"
        assert difference.max() < 1.01


@pytest.mark.parametrize("precision", ["u8", "u4"])
def test_its_attention_to_what_it_keeps_is_to_ours(
    precision: str, states: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """What 2026.4 shows of states in u4 is no state at all, so that its answer has to say what they are."""
    said, found = answers(states, precision, tmp_path)
    assert f"uint{precision[1]}" in said["KEY_CACHE_PRECISION"]
    key, value = (ours(f"openvino-{precision}", states[name]) for name in ("key", "value"))
    attend = torch.nn.functional.scaled_dot_product_attention
    query = states["query"][:, :, -1:]
    expected, exact = attend(query, key, value), attend(query, states["key"], states["value"])
    theirs = torch.from_numpy(found["output"])
    assert (theirs - expected).norm() < 0.02 * (exact - expected).norm()
