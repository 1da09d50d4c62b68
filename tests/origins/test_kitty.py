"""Kitty: the preset against the formula of the paper (arXiv 2511.18643) in float64, written out."""

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.schemes.kv_scheme import load_scheme

pytestmark = pytest.mark.usefixtures("one_thread")

GROUP, WIDTH, PROMOTED = 128, 64, 8
HALF = 2.0**-11
"""Largest relative error of rounding to float16."""


def keys_of(groups: int = 2) -> torch.Tensor:
    """`[1, G, S, D]`, with channels of many sizes, others in each group."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, groups, GROUP, WIDTH, generator=generator)
    sizes = torch.randn(1, 2, groups, 1, WIDTH, generator=generator).exp()
    return (keys * sizes + sizes).flatten(2, 3)


def affine(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values that share a scale, float64 `[N]`, as they are decoded, and the scale."""
    scale = (x.max() - x.min()) / (2**bits - 1)
    return ((x - x.min()) / scale).round() * scale + x.min(), scale


def assert_near(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    """In steps of the codes, but for those that tip over where a value is as near to two."""
    rounding = 2 * HALF * (2**bits + wanted.abs() / scale)
    assert (((found - wanted) / scale).abs() <= rounding).double().mean() > 0.98


def test_the_papers_keys() -> None:
    """An eighth of the channels of a group of 128 tokens has 4 bits, those of the largest mean magnitude."""
    keys = keys_of()
    store = CodeStore(load_scheme("kitty-2").key)
    store.append(keys)
    found = store.decoded(0, keys.shape[2])
    for own, group in zip(
        *(part.double().unflatten(2, (-1, GROUP)).flatten(0, 2) for part in (found, keys)), strict=True
    ):
        promoted = group.abs().mean(dim=0).argsort(descending=True)[:PROMOTED].tolist()
        for channel in range(WIDTH):
            bits = 4 if channel in promoted else 2
            wanted, scale = affine(group[:, channel], bits)
            assert_near(own[:, channel], wanted, scale, bits)


def test_the_papers_values() -> None:
    """2 bits, affine, per token and head."""
    values, codec = keys_of(), load_scheme("kitty-2").value
    store = CodeStore(codec)
    store.append(values)
    found = store.decoded(0, values.shape[2]).double().flatten(0, 2)
    for own, token in zip(found, values.double().flatten(0, 2), strict=True):
        assert_near(own, *affine(token, 2), 2)


def test_the_papers_sizes() -> None:
    """2.39 bits of 128 channels, of which K's numbers of wider channels take 1 in 128 tokens."""
    scheme = load_scheme("kitty-2")
    key, value = scheme.key.token_bits(128) / 128, scheme.value.token_bits(128) / 128
    assert scheme.key.wide_channels(128) == 16
    assert key == 2 + 2 / 8 + 32 / GROUP + 8 * 16 / (128 * GROUP) and value == 2 + 32 / 128
    assert (key + value) / 2 == pytest.approx(2.39, abs=0.015)
    assert (scheme.sinks, scheme.window, scheme.step(scheme.key)) == (32, 128, GROUP)
    assert not (scheme.rotate_key or scheme.rotate_value)
