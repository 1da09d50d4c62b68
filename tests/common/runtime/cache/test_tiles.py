"""Second scales and codes of two widths: with every rule and levels, however tokens come, and in the bits counted."""

import dataclasses

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.schemes.tensor_codec import Codec

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS, TOKENS, WIDTH = 2, 96, 64
HALF = {"scale_dtype": "float16"}
TOKEN = {"granularity": "token", "dynamic": True, "tile": 32, **HALF}
CHANNEL = {"granularity": "channel", "dynamic": True, "group_size": 32, **HALF}
CODECS = [
    Codec("int4", **TOKEN),
    Codec("int8", **TOKEN, symmetric=False, group_size=16),
    Codec("int2", **TOKEN, levels="gaussian", rule="mse"),
    Codec("int3", **TOKEN, levels="gaussian", rule="norm"),
    Codec("fp8_e4m3", **TOKEN),
    Codec("int3", **CHANNEL, tile=32, symmetric=False, rule="mse"),
    Codec("int4", **CHANNEL, tile=32),
    Codec("int2", **CHANNEL, wide_share=0.125, symmetric=False),
    Codec("int2", **CHANNEL, wide_share=0.25, rule="mse"),
    Codec("int2", **CHANNEL, wide_share=0.25, levels="gaussian", symmetric=False),
    Codec("int4", **CHANNEL, wide_share=0.0625, wide_dtype="int8", symmetric=False),
    Codec("int2", **CHANNEL, tile=32, wide_share=0.5, symmetric=False),
]


def values_of(batch: int = 1) -> torch.Tensor:
    """`[B, G, S, D]`, with channels and tokens of many sizes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(batch, GROUPS, TOKENS, WIDTH, generator=generator)
    for shape in ((1, 1, TOKENS, 1), (1, 1, 1, WIDTH)):
        values = values * torch.randn(shape, generator=generator).exp()
    return values


def filled(codec: Codec, values: torch.Tensor, *sizes: int) -> CodeStore:
    """A store that was given the tokens in passes of these sizes."""
    store = CodeStore(codec)
    for part in values.split(sizes or (values.shape[2],), dim=2):
        store.append(part)
    return store


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_codes_do_not_depend_on_how_groups_come(codec: Codec) -> None:
    values = values_of(batch=2)
    at_once, in_passes = filled(codec, values), filled(codec, values, 32, 64)
    assert torch.equal(at_once.decoded(0, TOKENS), in_passes.decoded(0, TOKENS))
    assert torch.equal(at_once.decoded(32, 64), at_once.decoded(0, TOKENS)[:, :, 32:64])
    assert at_once.decoded(0, 0).shape == (2, GROUPS, 0, WIDTH)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec.dtype != "fp8_e4m3"], ids=str)
def test_less_is_lost_than_without(codec: Codec) -> None:
    values = values_of()
    plain = dataclasses.replace(codec, tile=0, wide_share=0.0)
    ours, theirs = ((filled(each, values).decoded(0, TOKENS) - values).square().sum().item() for each in (codec, plain))
    assert 0 < ours < 0.95 * theirs


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_bits_are_counted_as_they_are_stored(codec: Codec) -> None:
    store = filled(codec, values_of())
    rows = [part[:, :, : TOKENS * part.shape[2] // store.storage.shape[2]] for part in store.parts()]
    assert 8 * sum(part.numel() * part.itemsize for part in rows) == codec.token_bits(WIDTH) * TOKENS * GROUPS
    assert not codec.is_native and not codec.is_native_on("cpu") and store.codes().decoder is not None


def test_wider_codes_are_those_of_the_channels_that_are_largest() -> None:
    """Each group of tokens has its own: values on the grid of 4 bits come back, which 2 bits cannot tell apart."""
    codec = Codec("int2", **CHANNEL, wide_share=1 / 32, symmetric=False)
    values = torch.zeros(1, 1, 64, WIDTH)
    for start, channels in ((0, (3, 60)), (32, (8, 9))):
        values[:, :, start : start + 32, channels] = (torch.arange(32.0) % 16)[None, None, :, None]
    store = filled(codec, values)
    assert torch.equal(store.decoded(0, 64), values)
    assert store._channels[0, 0, :2].tolist() == [[3, 60], [8, 9]]


@pytest.mark.parametrize("codec", CODECS[:1] + CODECS[5:6], ids=str)
def test_what_is_all_zero_or_has_channels_of_zeros_stays_so(codec: Codec) -> None:
    values = values_of()
    values[..., :5] = 0
    assert torch.isfinite(filled(codec, values).decoded(0, TOKENS)).all()
    zeros = torch.zeros_like(values)
    assert torch.equal(filled(codec, zeros).decoded(0, TOKENS), zeros)
