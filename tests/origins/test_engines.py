"""Presets against the formulas of engines that are no libraries: vLLM, LMDeploy, ModelOpt.

Each formula is written out as its source has it, with its own order of steps and its own rounding. Where ours differs,
the tests say by how much.
"""

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.common.runtime.static_scales import static_scale, symmetric_scale
from octavo.ops.shared.codes import unpack_int4

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = 2.0**-11
"""Largest relative error of rounding to float16."""


def values_of(shift: float = 0.0) -> torch.Tensor:
    """`[1, G, S, D]`."""
    return torch.randn(1, 2, 256, 128, generator=torch.Generator().manual_seed(0)) * 2 + shift


def stored(codec: Codec, values: torch.Tensor) -> tuple[CodeStore, torch.Tensor]:
    """A store of the values, and its codes as whole numbers."""
    store = CodeStore(codec)
    codes = store.append(values).codes
    return store, (unpack_int4(codes, values.shape[-1]) if codes.dtype == torch.uint8 else codes).float()


def test_vllms_int8_per_token_head() -> None:
    """scale = max(absmax / 127, 1e-6), codes rounded with halves away from 0, clamped to -128 and 127.

    Source: vLLM 0.33, Triton kernels of `int8_per_token_head`. Ours: a floor of 2^-23, halves to even.
    """
    values = values_of()
    expected = values.abs().amax(dim=-1, keepdim=True) / 127
    scaled = values / expected
    store, codes = stored(load_scheme("int8-token").key, values)
    assert torch.equal(store.codes().scale, expected)
    is_half = scaled.abs().frac() == 0.5
    assert torch.equal(codes[~is_half], (scaled.sign() * (scaled.abs() + 0.5).floor()).clamp(-128, 127)[~is_half])


def test_vllms_int8_per_token_head_by_hand() -> None:
    values = torch.tensor([127.0, -126.6, 2.5, 3.5, -2.5, 0.4, 0.0, -127.0]).view(1, 1, 1, 8)
    store, codes = stored(load_scheme("int8-token").key, values)
    assert store.codes().scale.item() == 1
    assert codes.flatten().tolist() == [127, -127, 2, 4, -2, 0, 0, -127]  # vLLM's: 3, 4 and -3 of the halves


def test_vllms_bytes_per_token_and_head() -> None:
    """264 for K and V of 128 channels in int8, and 136 in int4, where vLLM hides a zero of 4 bits in the scale.

    Ours has it beside the scale, in float32.
    """
    int8, int4 = load_scheme("int8-token"), load_scheme("int4-token")
    assert (int8.key.token_bits(128) + int8.value.token_bits(128)) / 8 == 264
    assert (int4.key.token_bits(128) + int4.value.token_bits(128)) / 8 == 136 + 2 * 4


def test_vllms_fp8_e5m2_is_a_cast() -> None:
    """`--kv-cache-dtype fp8_e5m2`: no scales."""
    values = torch.cat([values_of(), values_of() * 5e3, values_of() * 1e-6], dim=-1)
    store = CodeStore(load_scheme("fp8_e5m2").key)
    codes = store.append(values).codes
    assert values.abs().max() < 57344
    assert torch.equal(codes.view(torch.uint8), values.to(torch.float8_e5m2).view(torch.uint8))


def test_modelopts_fp8_scale() -> None:
    """`k_scale = amax(float32) / 448`. Source: ModelOpt, export/quant_utils.py."""
    largest = torch.rand(1000) * 100 + 1e-3
    assert torch.equal(symmetric_scale(largest, 448), largest / 448)


@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize(("preset", "levels"), [("lmdeploy-int8", 256), ("lmdeploy-int4", 16)])
def test_lmdeploys_online_codes(preset: str, levels: int, shift: float) -> None:
    """scale = (max - min) / 255 (or 15), zeros = -min / scale, code = uint8(x / scale + zeros + 0.5).

    Scale and zeros are stored in half, and codes follow from them as they were in float32; x = (code - zeros) * scale.

    Source: LMDeploy, pytorch/kernels/cuda/fill_kv_cache.py. Ours counts codes from -128 (-8), takes the rounded scale
    and zero for the codes too, and halves to even: the scale is the same to the bit, codes differ by 1 at most, and our
    values are no farther from x in the mean.
    """
    values = values_of(shift)
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    scale = (high - low) / (levels - 1)
    zeros = -low / scale
    expected = (values / scale + zeros + 0.5).floor().clamp(0, levels - 1)
    theirs = (expected - zeros.half().float()) * scale.half().float()
    store, codes = stored(load_scheme(preset).key, values)
    assert torch.equal(store.codes().scale, scale.half())
    difference = (codes + levels / 2 - expected).abs()
    assert difference.max() <= 1 and difference.mean() < 0.1
    ours = store.decoded(0, values.shape[2])
    rounding = HALF * (levels + zeros.abs())
    assert ((ours - values).abs() <= scale * (0.5 + rounding)).all()
    assert (ours - values).square().mean() <= (theirs - values).square().mean()


def test_lmdeploys_int4_packs_the_halves_of_a_head_as_ours() -> None:
    """q1 + 16 * q2 of the first and second half of head_dim."""
    values = torch.arange(16.0).roll(5).view(1, 1, 1, 16)
    store = CodeStore(load_scheme("lmdeploy-int4").key)
    codes = store.append(values).codes.flatten()
    first, second = values.flatten().chunk(2)
    assert store.codes().scale.item() == 1
    assert codes.tolist() == (first + 16 * second).tolist()


def test_lmdeploys_static_scales_by_hand() -> None:
    """scale = (max - min) / 255, zp = (min + max) / 2, code = round((x - zp) / scale), x = code * scale + zp.

    Source: LMDeploy before 0.4, lite/apis/kv_qparams.py. Of -7 to 8.9375: 1 / 16 and 0.96875, so a zero of -15.5; the
    ends are at -127.5 and 127.5, and the upper one, 128 when rounded, is clipped.
    """
    codec = load_scheme("lmdeploy-int8-ptq").key
    scale, zero = static_scale(codec, torch.tensor([[-7.0, 0.5]]), torch.tensor([[1.0, 8.9375]]))
    assert scale.item() == 1 / 16 and zero.item() == -15.5
    store = CodeStore(codec, (scale, zero))
    codes = store.append(torch.tensor([-7.0, -6.9375, 0.96875, 1.0625, 8.9375, 99.0]).view(1, 1, 1, 6)).codes
    assert codes.flatten().tolist() == [-128, -126, 0, 2, 127, 127]


def test_lmdeploys_static_codes() -> None:
    """x / scale + zero rounds otherwise than (x - zp) / scale now and then: codes near a half differ by 1."""
    values = values_of(1.0)
    low, high = values.amin(), values.amax()
    scale, middle = (high - low) / 255, (low + high) / 2
    expected = ((values - middle) / scale).round().clamp(-128, 127)
    codec = load_scheme("lmdeploy-int8-ptq").key
    ours = static_scale(codec, values.amin(dim=(0, 2)), values.amax(dim=(0, 2)))
    assert ours[0].item() == scale.item() and ours[1].item() == (-middle / scale).item()
    codes = CodeStore(codec, ours).append(values).codes.float()
    assert (codes - expected).abs().max() <= 1 and (codes != expected).float().mean() < 1e-3
