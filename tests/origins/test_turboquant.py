"""TurboQuant and SAW-INT4: presets against the formulas of their papers, and of vLLM, written out.

`tests/engines/test_vllm_turboquant.py` has vLLM's own kernels.
"""

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.cache.dynamic_scales import GAUSSIAN_LEVELS, gaussian_levels
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.rotary import hadamard
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec

from ..support import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 128
HALF = 2.0**-11
"""Largest relative error of rounding to float16."""
PAPERS_ERRORS = {2: 0.117, 3: 0.03, 4: 0.009}
"""Mean squared errors of unit vectors by bits, TurboQuant (arXiv 2504.19874), theorem 1; it has two digits."""


def values_of(shift: float = 0.0) -> torch.Tensor:
    """`[1, G, S, D]`, with an outlier channel."""
    values = torch.randn(1, 2, 200, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 + shift
    values[..., 5] *= 4
    return values


def decoded(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    store = CodeStore(codec)
    store.append(values)
    return store.decoded(0, values.shape[2])


def nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The level nearest to each value."""
    return levels[(x[..., None] - levels).abs().argmin(dim=-1)]


def assert_mostly_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor) -> None:
    """All but the few codes that tip over where a value is as near to two."""
    assert ((actual - expected).abs() <= tolerance).float().mean() > 0.999


@pytest.mark.parametrize("bits", GAUSSIAN_LEVELS)
def test_the_papers_formula(bits: int) -> None:
    """x / |x|, rotated, to the nearest of the levels of N(0, 1 / D), times |x|, which is stored."""
    scheme = load_scheme(f"turboquant-mse-{bits}")
    assert scheme.key == scheme.value and scheme.rotate_key and scheme.rotate_value
    rotated = hadamard(values_of())
    norm = rotated.norm(dim=-1, keepdim=True)
    expected = nearest(rotated / norm, gaussian_levels(bits, norm.device) / WIDTH**0.5) * norm
    found = decoded(scheme.key, rotated)
    assert_mostly_close(found, expected, expected.abs() * 2 * HALF)
    lost = (found / norm - rotated / norm).square().sum(dim=-1).mean().item()
    assert lost == pytest.approx(PAPERS_ERRORS[bits], rel=0.2)
    assert scheme.key.token_bits(WIDTH) == bits * WIDTH + 16


@pytest.mark.parametrize(("preset", "bits"), [("turboquant-4", 4), ("turboquant-k3v4", 3), ("turboquant-3", 3)])
def test_vllms_keys_are_decoded_to_their_norm(preset: str, bits: int) -> None:
    """c = levels of the codes, x = norm * c / |c|. Source: vLLM 0.32, NORM_CORRECTION of its decoding kernels."""
    scheme = load_scheme(preset)
    rotated = hadamard(values_of())
    norm = rotated.norm(dim=-1, keepdim=True)
    coded = nearest(rotated / norm, gaussian_levels(bits, norm.device) / WIDTH**0.5)
    expected = norm * coded / coded.norm(dim=-1, keepdim=True)
    found = decoded(scheme.key, rotated)
    near = ((found - expected).abs() <= 2 * HALF * expected.abs()).all(dim=-1)
    assert near.float().mean() > 0.9, "a code that tips over changes the scale of its token"
    torch.testing.assert_close(found.norm(dim=-1, keepdim=True), norm, atol=0, rtol=HALF)
    assert scheme.rotate_key and not scheme.rotate_value


@pytest.mark.parametrize(("preset", "last"), [("turboquant-k8v4", 15), ("turboquant-4", 15), ("turboquant-3", 7)])
def test_vllms_values_are_affine(preset: str, last: int) -> None:
    """scale = (max - min) / 15 (or 7), code = int((x - min) / scale + 0.5), x = code * scale + min, both in float16.

    Source: vLLM 0.32, _store_quantized_value. Ours takes the rounded scale and zero for the codes too.
    """
    values = values_of(1.0)
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    scale = (high - low) / last
    codes = ((values - low) / scale + 0.5).floor().clamp(0, last)
    theirs = codes * scale.half().float() + low.half().float()
    found = decoded(load_scheme(preset).value, values)
    rounding = HALF * (last + low.abs() / scale + last)
    assert ((found - values).abs() <= scale * (0.5 + rounding)).all()
    assert (((found - theirs) / scale).abs() <= 2 * rounding).float().mean() > 0.98
    assert (found - values).square().mean() <= (theirs - values).square().mean() * (1 + 1e-3)


def test_vllms_fp8_keys_are_a_cast() -> None:
    scheme, values = load_scheme("turboquant-k8v4"), values_of()
    assert torch.equal(decoded(scheme.key, values), values.to(torch.float8_e4m3fn).float())
    assert not (scheme.rotate_key or scheme.rotate_value)


def test_the_first_and_last_two_layers_are_in_float() -> None:
    for name in ("turboquant-k8v4", "turboquant-4", "turboquant-k3v4", "turboquant-3"):
        cache = QuantizedCache(tiny_config(num_hidden_layers=6), name)
        assert [layer.scheme.is_quantized for layer in cache.layers] == [False, False, True, True, False, False]
        assert cache.scheme.float_layers == (0, 1, 4, 5)


def test_saw_int4_is_a_rotation_and_int4_per_token() -> None:
    """scale = (max - min) / 15, the smallest value is the first code: from -1.75 to 2 in steps of a quarter."""
    scheme = load_scheme("saw-int4")
    assert scheme.key == scheme.value and scheme.rotate_key and scheme.rotate_value
    values = (torch.arange(16.0) / 4 - 1.75).repeat(2).view(1, 1, 1, 32)
    assert torch.equal(decoded(scheme.key, values), values)
    spread = values_of()
    plain, rotated = decoded(scheme.key, spread), hadamard(decoded(scheme.key, hadamard(spread)))
    assert (rotated - spread).square().mean() < 0.7 * (plain - spread).square().mean(), "the outlier is spread"
