"""Rules of dynamic scales, and the formulas of the systems that schemes are named after, on worked examples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.cache.dynamic_scales import GAUSSIAN_LEVELS, gaussian_levels, group_scale, scale_of_norm
from octavo.common.runtime.cache.scale_formats import as_floats, zero_as_floats
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.common.runtime.static_scales import static_scale
from octavo.ops import decode, encode
from octavo.ops.shared.codes import code_range

pytestmark = pytest.mark.usefixtures("one_thread")

TOKEN = {"granularity": "token", "dynamic": True, "rule": "mse"}
CHANNEL = {"granularity": "channel", "dynamic": True, "group_size": 16, "rule": "mse"}
HALF = {"scale_dtype": "float16"}
MSE_CODECS = [
    Codec("int8", **TOKEN),
    Codec("int4", **TOKEN, symmetric=False),
    Codec("int3", **CHANNEL, symmetric=False, **HALF),
    Codec("int2", **CHANNEL, symmetric=False),
    Codec("int2", **CHANNEL),
    Codec("int2", **TOKEN, levels="gaussian", **HALF),
    Codec("int3", **TOKEN, levels="gaussian", symmetric=False),
    Codec("int4", **TOKEN, levels="gaussian"),
    Codec("int4", **CHANNEL, symmetric=False, scale_dtype="fp8_e4m3"),
]


def through_codes(codec: Codec, groups: torch.Tensor) -> torch.Tensor:
    """What the codes of groups `[N, n]`, a scale each, stand for."""
    scale, zero = group_scale(codec, groups)
    scale = as_floats(codec, scale).float()[:, None, None]
    zero = None if zero is None else zero_as_floats(codec, zero).float()[:, None, None]
    levels = gaussian_levels(codec.bits, groups.device) if codec.levels == "gaussian" else None
    width = codec.stored_width(groups.shape[1])
    codes = torch.empty((1, len(groups), 1, width), dtype=codec.stored_dtype)
    divisor = scale.masked_fill(scale == 0, torch.inf)
    encode(groups[None, :, None], divisor, zero, codes, bits=codec.bits, levels=levels)
    return decode(codes, scale, zero, 1, codec.bits, levels)[0, :, 0]


@settings(deadline=None, max_examples=40)
@given(
    codec=some.sampled_from(MSE_CODECS),
    seed=some.integers(0, 2**31),
    size=some.floats(1e-3, 1e3),
    offset=some.floats(-5, 5),
    power=some.sampled_from([1, 3]),
)
def test_the_least_squared_error_is_never_more_than_that_of_the_range(
    codec: Codec, seed: int, size: float, offset: float, power: int
) -> None:
    values = torch.randn((12, 16), generator=torch.Generator().manual_seed(seed)) ** power
    values = (values + offset) * size
    by_range = Codec(**{**codec.to_dict(), "rule": "range"})
    best, plain = ((through_codes(one, values) - values).square().sum(dim=-1) for one in (codec, by_range))
    assert (best <= plain * (1 + 1e-4)).all()


@pytest.mark.parametrize("codec", [codec for codec in MSE_CODECS if codec.bits < 8], ids=str)
def test_the_least_squared_error_is_worth_its_time(codec: Codec) -> None:
    values = torch.randn((500, 64), generator=torch.Generator().manual_seed(0))
    by_range = Codec(**{**codec.to_dict(), "rule": "range"})
    best, plain = ((through_codes(one, values) - values).square().mean() for one in (codec, by_range))
    assert best < (0.999 if codec.levels == "gaussian" else 0.95) * plain


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zeros_in_a_byte_lose_next_to_nothing(bits: int) -> None:
    """Since the neighbours of the nearest are tried: of 4 bits, 3 % more are lost without."""
    values = torch.randn((4000, 64), generator=torch.Generator().manual_seed(0))
    half = Codec(f"int{bits}", **CHANNEL, symmetric=False, **HALF)
    short = Codec(**{**half.to_dict(), "scale_dtype": "fp8_e4m3"})
    in_half, in_bytes = ((through_codes(codec, values) - values).square().mean() for codec in (half, short))
    assert in_bytes < 1.01 * in_half


@pytest.mark.parametrize("bits", GAUSSIAN_LEVELS)
def test_gaussian_levels_are_a_fixed_point_of_lloyd_and_symmetric(bits: int) -> None:
    """A level is the mean of a normal distribution over the interval of values that are nearest to it."""
    levels = gaussian_levels(bits, torch.device("cpu")).double()
    assert len(levels) == 2**bits and torch.equal(levels, -levels.flip(0)) and (levels.diff() > 0).all()
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    middles = (levels[1:] + levels[:-1]) / 2
    ends = torch.cat((torch.tensor([-40.0]).double(), middles, torch.tensor([40.0]).double()))
    density, mass = normal.log_prob(ends).exp(), normal.cdf(ends)
    centres = (density[:-1] - density[1:]) / mass.diff()
    torch.testing.assert_close(centres, levels, atol=2e-4, rtol=0)


@pytest.mark.parametrize("codec", MSE_CODECS, ids=str)
def test_degenerate_groups_are_finite_and_nan_is_seen(codec: Codec) -> None:
    zeros, equal, outlier = torch.zeros(1, 16), torch.full((1, 16), 5.0), torch.zeros(1, 16)
    outlier[0, 7] = 6e4
    assert torch.equal(through_codes(codec, zeros).abs().clamp_min(1e-6), torch.full((1, 16), 1e-6))
    found = through_codes(codec, equal)
    assert torch.isfinite(found).all() and ((found - 5).abs() <= 5 * (0.6 if codec.levels == "gaussian" else 0.3)).all()
    assert torch.isfinite(through_codes(codec, outlier)).all()
    zeros[0, 3] = float("nan")
    assert through_codes(codec, zeros).isnan().any()


@pytest.mark.parametrize("bits", GAUSSIAN_LEVELS)
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_rule_norm_keeps_the_norm_and_the_codes_of_the_range(bits: int, scale_dtype: str) -> None:
    codec = Codec(f"int{bits}", "token", dynamic=True, levels="gaussian", rule="norm", scale_dtype=scale_dtype)
    plain = Codec(**{**codec.to_dict(), "rule": "range"})
    values = torch.randn((1, 2, 50, 64), generator=torch.Generator().manual_seed(0)) * 3
    values[0, 0, 7] = 0
    stores = CodeStore(codec), CodeStore(plain)
    kept, ranged = (store.append(values) for store in stores)
    assert torch.equal(kept.codes, ranged.codes)
    found = stores[0].decoded(0, 50)
    torch.testing.assert_close(found.norm(dim=-1), values.norm(dim=-1), atol=0, rtol=2.0**-11)
    assert torch.equal(found[0, 0, 7], torch.zeros(64))
    torch.testing.assert_close(kept.scale[..., 0], scale_of_norm(codec, values, ranged.scale[..., 0]))


def test_lmdeploy_static() -> None:
    """zp = (min + max) / 2, scale = (max - min) / 255, q = round((x - zp) / scale): the ends are -127.5 and 127.5."""
    codec = load_scheme("lmdeploy-int8-ptq").value
    low, high = torch.tensor([[-1.0, -3.0], [0.5, -2.0]]), torch.tensor([[4.0, 1.0], [1.0, 7.2]])
    scale, zero = static_scale(codec, low, high)
    zp, step = (-3.0 + 7.2) / 2, (7.2 + 3.0) / 255
    assert scale.shape == zero.shape == (1, 1, 1)
    assert float(scale) == pytest.approx(step) and float(-zero * scale) == pytest.approx(zp)
    x = torch.tensor([-3.0, 7.2, zp, 0.01, zp + 10.4 * step, -50.0]).view(1, 1, 1, 6)
    codes = torch.empty(x.shape, dtype=torch.int8)
    encode(x, scale, zero, codes)
    assert codes.flatten().tolist() == [-128, 127, 0, round((0.01 - zp) / step), 10, -128], "127.5 is clipped to 127"
    found = decode(codes, scale, zero)[0, 0, 0, :5]
    assert ((found - x[0, 0, 0, :5]).abs() <= 0.501 * step).all()


def test_lmdeploy_dynamic() -> None:
    """Per token and head: scale = (max - min) / (2 ** bits - 1), the smallest value is the first code."""
    for preset, last in (("lmdeploy-int8", 255), ("lmdeploy-int4", 15)):
        store = CodeStore(load_scheme(preset).key)
        x = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [3.0, 3.0, 3.5, 7.0]]).view(1, 1, 2, 4)
        handle = store.append(x)
        low = x.amin(dim=-1, keepdim=True)
        step = ((x.amax(dim=-1, keepdim=True) - low) / last).half().float()
        torch.testing.assert_close(handle.scale.float(), step)
        expected = low + ((x - low) / step).round() * step
        torch.testing.assert_close(store.decoded(0, 2), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("preset", ["kivi-2", "kivi-4"])
def test_kivi(preset: str) -> None:
    """mn and (mx - mn) / (2 ** bits - 1) of K per channel over 32 tokens, of V per token over 32 channels."""
    scheme = load_scheme(preset)
    values = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 3 + 1
    last = 2**scheme.key.bits - 1
    for codec, groups in ((scheme.key, values.unflatten(2, (2, 32)).transpose(-1, -2)),
                          (scheme.value, values.unflatten(3, (2, 32)))):  # fmt: skip
        mn = groups.amin(dim=-1, keepdim=True)
        step = ((groups.amax(dim=-1, keepdim=True) - mn) / last).half().float()
        expected = mn + ((groups - mn) / step).round().clamp(0, last) * step
        is_key = codec is scheme.key
        expected = expected.transpose(-1, -2).flatten(2, 3) if is_key else expected.flatten(3)
        store = CodeStore(codec)
        handle = store.append(values)
        assert handle.scale.shape == handle.zero.shape == ((2, 3, 2, 64) if is_key else (2, 3, 64, 2))
        found = store.decoded(0, 64)
        # the zero point in float16 moves values near the middle of two codes to the other one
        near = (found - expected).abs() > 0.01
        assert near.float().mean() < 5e-3
        assert ((found - values).abs() <= 0.51 * store.codes().scale.float().amax() * 1.02).all()


def test_ranges_of_codes_are_those_of_their_bits() -> None:
    for codec in MSE_CODECS:
        low, high = code_range(codec.stored_dtype, codec.bits)
        assert (low, high) == (-(2 ** (codec.bits - 1)), 2 ** (codec.bits - 1) - 1)
