"""Scales in a byte, values of e2m1 and signs of what codes leave, in whatever codec."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.cache.dynamic_scales import known_levels
from octavo.common.runtime.cache.scale_formats import as_floats, as_stored, rounded_to_e2m1, shared_exponent
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.ops.shared.codes import unpack_indices

pytestmark = pytest.mark.usefixtures("one_thread")

TOKEN = {"granularity": "token", "dynamic": True, "group_size": 16}
E8M0 = Codec("int8", **TOKEN, scale_dtype="e8m0")


@given(some.floats(2.0**-100, 2.0**100, width=32))
def test_e8m0_is_the_next_power_of_two_and_ocps_the_one_before(scale: float) -> None:
    above = as_floats(E8M0, as_stored(E8M0, torch.tensor([scale]))).item()
    below = as_floats(E8M0, shared_exponent(torch.tensor([scale]), 1.0)).item()
    assert below <= scale < 2 * below and above / 2 < scale <= above


def test_ocps_exponents_are_those_of_its_table() -> None:
    """The largest of 1.5 in e2m1, e4m3, e5m2 and int8: 2^-emax. Source: OCP MX 1.0, table 1 (and INT8 in its units)."""
    largest = torch.tensor([1.5])
    assert [shared_exponent(largest, most).item() - 127 for most in (6, 448, 57344, 127)] == [-2, -8, -15, -6]


def test_e4m3_saturates_and_becomes_0() -> None:
    codec = Codec("int4", **TOKEN, scale_dtype="fp8_e4m3", fixed_scale=0.5)
    scales = torch.tensor([1e9, 1.0, 2.0**-10, 2.0**-12])
    assert as_floats(codec, as_stored(codec, scales)).tolist() == [224, 1, 2.0**-10, 0]


@given(some.floats(-9, 9, width=32))
def test_e2m1_is_the_nearest_level(x: float) -> None:
    levels = known_levels(Codec("int4", **TOKEN, levels="e2m1"), torch.device("cpu"))
    found = rounded_to_e2m1(torch.tensor(x))
    assert (levels == found).any() and abs(found - x) == (levels - x).abs().min()


CODECS = [
    Codec("int8", **TOKEN, scale_dtype="e8m0"),
    Codec("int8", **TOKEN, rule="full_range"),
    Codec("int4", **TOKEN, levels="e2m1", scale_dtype="float16", rule="mse"),
    Codec("int4", **TOKEN, levels="e2m1", scale_dtype="fp8_e4m3", rule="mse"),
    Codec("int4", granularity="channel", dynamic=True, group_size=8, levels="e2m1", scale_dtype="e8m0", rule="ocp"),
    Codec("int3", **TOKEN, levels="gaussian", rule="norm", scale_dtype="fp8_e4m3"),
    Codec("int2", **TOKEN, levels="gaussian", scale_dtype="e8m0"),
    Codec("int4", **TOKEN, symmetric=False, residual_sign=True),
    Codec("fp8_e4m3", **TOKEN, scale_dtype="fp8_e4m3"),
    Codec("int2", **TOKEN, levels="gaussian", rule="mse", scale_dtype="fp8_e4m3", residual_sign=True, outliers=1),
]
TOKEN_ZEROS = {**TOKEN, "symmetric": False, "scale_dtype": "fp8_e4m3"}
CHANNEL_ZEROS = {"granularity": "channel", "dynamic": True, "group_size": 8, "symmetric": False,
                 "scale_dtype": "fp8_e4m3"}  # fmt: skip
WITH_ZEROS = [
    Codec("int4", **TOKEN_ZEROS),
    Codec("int3", **TOKEN_ZEROS, rule="mse", fixed_scale=0.25),
    Codec("int2", **TOKEN_ZEROS, levels="gaussian"),
    Codec("int4", **TOKEN_ZEROS, outliers=1, residual_sign=True),
    Codec("int3", **CHANNEL_ZEROS),
    Codec("int4", **CHANNEL_ZEROS, clip=0.9),
    Codec("int2", **CHANNEL_ZEROS, rule="mse"),
    Codec("int3", **CHANNEL_ZEROS, levels="gaussian", rule="mse"),
]
CODECS += WITH_ZEROS


def without(codec: Codec) -> Codec:
    """The same codec with scales in float32 and no signs."""
    plain = {"scale_dtype": "float32", "residual_sign": False, "fixed_scale": 0.0}
    rule = "range" if codec.rule in ("ocp", "full_range") else codec.rule
    return Codec(**{**codec.to_dict(), **plain, "rule": rule})


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: "-".join(map(str, codec.to_dict().values())))
def test_a_field_goes_with_the_others(codec: Codec) -> None:
    """Short scales lose a little, signs win; tokens one by one are stored as all at once, and zeros are zeros."""
    values = torch.randn((2, 3, 24, 64), generator=torch.Generator().manual_seed(0)) * 3
    values[1, 2] = 0
    whole, pieces, plain = CodeStore(codec), CodeStore(codec), CodeStore(without(codec))
    whole.append(values), plain.append(values)
    for part in values.split(8, dim=2):
        pieces.append(part)
    found, before = whole.decoded(0, 24), plain.decoded(0, 24)
    assert torch.equal(found, pieces.decoded(0, 24))
    error, reference = (found - values).square().mean(), (before - values).square().mean()
    assert error < (reference if codec.residual_sign else 3.5 * reference)
    assert found[1, 2].abs().max() < 1e-6
    handle = whole.codes()
    assert (handle.decoder is None) == codec.is_native_on("cpu") == (not (codec.residual_sign or codec.outliers))
    assert codec.token_bits(64) * 2 * 3 * 24 == 8 * sum(part.nbytes for part in whole.saved(24)[1].values())


def by_definition(codec: Codec, parts: dict[str, torch.Tensor], shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """(code - zero) * scale in float64, of what a store has saved: of the codes stored, and of each code there is."""
    levels = known_levels(codec, torch.device("cpu"))
    codes = torch.arange(2.0**codec.bits) - 2 ** (codec.bits - 1) if levels is None else levels
    middle = -0.5 if levels is None else 0.0

    def each(part: torch.Tensor) -> torch.Tensor:
        rows = part.repeat_interleave(shape[2] // part.shape[2], dim=2)
        return rows.repeat_interleave(shape[3] // part.shape[3], dim=3)

    zero, scale = each(parts["zero"].double() + middle), each(parts["scale"].double() * (codec.fixed_scale or 1.0))
    possible = (codes.double().view(-1, 1, 1, 1, 1) - zero) * scale
    indices = unpack_indices(parts["codes"], codec.bits, shape[3]).long()
    return possible.gather(0, indices[None])[0], possible


@pytest.mark.parametrize("codec", [codec for codec in WITH_ZEROS if not codec.outliers], ids=str)
def test_values_are_the_nearest_by_scale_and_zero_as_stored(codec: Codec) -> None:
    values = torch.randn((2, 3, 24, 64), generator=torch.Generator().manual_seed(0)) * 3 + 1
    store, fewer = CodeStore(codec), CodeStore(codec)
    store.append(values), fewer.append(values[:, :, :16])
    parts = store.saved(24)[1]
    assert parts["scale"].dtype == parts["zero"].dtype == torch.float8_e4m3fn
    expected, possible = by_definition(codec, parts, values.shape)
    torch.testing.assert_close(store.decoded(0, 24).double(), expected, atol=1e-5, rtol=1e-6)
    assert ((expected - values).abs() <= (possible - values).abs().amin(dim=0) + 1e-5).all()
    handle = store.codes()
    assert handle.scale.dtype == handle.zero.dtype == torch.float32
    store.crop(16)
    assert torch.equal(store.decoded(0, 16), fewer.decoded(0, 16))


@pytest.mark.parametrize("codec", [Codec(f"int{bits}", **TOKEN_ZEROS) for bits in (2, 3, 4)], ids=str)
@pytest.mark.parametrize("value", [5.0, -5.0, 1e-3, 300.0])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1e-2])
def test_groups_far_from_0_lose_what_e4m3_does_of_their_zero(codec: Codec, value: float, spread: float) -> None:
    """A sixteenth of the zero at most, nearly all of which the codes make up for."""
    values = value * (1 + spread * torch.rand((1, 2, 8, 64), generator=torch.Generator().manual_seed(0)))
    store = CodeStore(codec)
    store.append(values)
    reach = (2**codec.bits - 1) / 2
    limit = abs(value) * (1.07 / 32 / reach + 1.07 / 256 + spread) + 2.0**-10
    assert ((store.decoded(0, 8) - values).abs() <= limit).all()


def test_what_is_too_small_for_e4m3_is_0_and_nan_is_seen() -> None:
    values = torch.full((1, 1, 2, 64), 2.0**-12)
    values[0, 0, 1, 3] = float("nan")
    store = CodeStore(Codec("int4", **TOKEN_ZEROS))
    store.append(values)
    found = store.decoded(0, 2)
    assert torch.equal(found[0, 0, 0], torch.zeros(64)) and found[0, 0, 1].isnan().any()
