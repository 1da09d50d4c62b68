"""The turboquant presets against vLLM's own kernels, which run in Triton's interpreter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.rotary import hadamard
from octavo.common.runtime.schemes.kv_scheme import KV_CACHE_DTYPES, load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec

from .environments import run_in

GROUPS, TOKENS, WIDTH, LAYERS = 2, 24, 64, 30
DTYPES = [name for name in KV_CACHE_DTYPES if name.startswith("turboquant")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says of random k and v `[G, S, D]`, k with large channels, and v not about 0."""
    folder: Path = tmp_path_factory.mktemp("turboquant")
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn((GROUPS, TOKENS, WIDTH), generator=generator) for _ in range(2))
    key[..., 3] += 4
    states = {"key": key, "value": value + 0.5}
    for name, part in states.items():
        torch.save(part, folder / f"{name}.pt")
    said = run_in("vllm", "run_turboquant.py", folder, LAYERS, *DTYPES, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    return {**said, **states, "decoded": {dtype: torch.load(folder / f"{dtype}.pt") for dtype in DTYPES}}


def ours(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    """What a store of ours holds of values `[G, S, D]`, float32 `[1, G, S, D]`."""
    store = CodeStore(codec)
    store.append(values[None])
    return store.decoded(0, values.shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_and_bytes_are_vllms(dtype: str, answers: dict[str, Any]) -> None:
    scheme = load_scheme(dtype)
    assert list(scheme.of_model(LAYERS).float_layers) == answers["float_layers"]
    assert (scheme.key.token_bits(WIDTH) + scheme.value.token_bits(WIDTH)) / 8 == answers["bytes"][dtype]


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name.endswith("_nc")])
def test_keys_are_vllms(dtype: str, answers: dict[str, Any]) -> None:
    """Its levels are integrated in 200 steps, up to 2e-3 off Lloyd's and Max's, so that few codes near a middle differ.

    One that does changes the norm of the codes, by which all of its token are divided. Steps are 0.26 at least.
    """
    theirs = answers["decoded"][dtype][0].float()
    found = ours(load_scheme(dtype).key, hadamard(answers["key"]))
    difference = (found - theirs).abs() * WIDTH**0.5 / theirs.norm(dim=-1, keepdim=True)
    assert (difference.amax(dim=-1) <= 8e-3).float().mean() > 0.9, "all codes of the token are the same"
    assert (difference > 0.1).float().mean() < 2e-3
    torch.testing.assert_close(found.norm(dim=-1), theirs.norm(dim=-1), atol=0, rtol=1e-3)


def test_keys_in_fp8_are_a_cast(answers: dict[str, Any]) -> None:
    """The interpreter rounds to fp8 otherwise than devices do, so that vLLM's bytes are others there."""
    found = ours(load_scheme("turboquant_k8v4").key, answers["key"])
    assert torch.equal(found[0], answers["key"].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_vllms(dtype: str, answers: dict[str, Any]) -> None:
    """It stores the smallest value in float16, and codes by the scale before that is rounded; halves go up."""
    value, theirs = answers["value"], answers["decoded"][dtype][1].float()
    codec = load_scheme(dtype).value
    found = ours(codec, value)
    step = (value.amax(dim=-1, keepdim=True) - value.amin(dim=-1, keepdim=True)) / (2**codec.bits - 1)
    difference = ((found - theirs) / step).abs()
    assert (difference <= 0.02).float().mean() > 0.99 and difference.max() < 1.02
    assert (found - value).square().mean() <= 1.01 * (theirs - value).square().mean()
