"""KVarN: presets against the formula of the paper (arXiv 2606.03458), one tile at a time in float64, written out."""

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.cache.tile_scales import column_scales
from octavo.common.runtime.rotary import hadamard
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec

pytestmark = pytest.mark.usefixtures("one_thread")

TILE, WIDTH, ROUNDS = 128, 64, 16
HALF = 2.0**-11
"""Largest relative error of rounding to float16."""
BITS = {"kvarn-4": (4, 4), "kvarn-k4v2": (4, 2), "kvarn-2": (2, 2)}


def values_of(tiles: int = 2) -> torch.Tensor:
    """`[1, G, S, D]`, rotated, with an outlier channel and tokens of many sizes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2, tiles * TILE, WIDTH, generator=generator)
    values = values * torch.randn(1, 2, tiles * TILE, 1, generator=generator).exp()
    values[..., 5] += 8
    return hadamard(values)


def decoded(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    store = CodeStore(codec)
    store.append(values)
    return store.decoded(0, values.shape[2])


def apart(tile: torch.Tensor) -> float:
    """The largest standard deviation by the smallest, of columns and of rows, added."""
    columns, rows = tile.std(dim=0), tile.std(dim=1)
    return float(columns.max() / columns.min() + rows.max() / rows.min())


def balanced(tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of the rows `[R]` and columns `[C]` of a tile `[R, C]` in float64 that balance it."""
    rows, columns = torch.zeros(tile.shape[0]).double(), torch.zeros(tile.shape[1]).double()
    tried = [(apart(tile), rows, columns)]
    for _ in range(ROUNDS):
        spread = (tile / columns.exp() / rows.exp()[:, None]).std(dim=0).clamp(1e-3, 1e3)
        columns = (columns + spread.log()).clamp(-0.3, 10)
        spread = (tile / columns.exp() / rows.exp()[:, None]).std(dim=1).clamp(1e-3, 1e3)
        rows = (rows + spread.log()).clamp(-0.3, 10)
        tried.append((apart(tile / columns.exp() / rows.exp()[:, None]), rows, columns))
    least = min(distance for distance, _, _ in tried)
    _, rows, columns = [each for each in tried if each[0] == least][-1]
    return rows.exp(), columns.exp()


def theirs(tile: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a tile `[R, C]` in float64 is decoded to, and the step of its codes: affine by rows once it is balanced."""
    rows, columns = balanced(tile)
    even = tile / columns / rows[:, None]
    low, high = even.min(dim=1).values, even.max(dim=1).values
    scale = (high - low) / (2**bits - 1)
    codes = ((even - low[:, None]) / scale[:, None]).round()
    step = (scale * rows)[:, None] * columns
    return codes * step + (low * rows)[:, None] * columns, step.expand_as(tile)


def tiles_of(values: torch.Tensor, is_key: bool) -> list[torch.Tensor]:
    """Matrices `[R, C]` in float64: rows are the channels of K and the tokens of V."""
    tiles = values.double().unflatten(2, (-1, TILE)).flatten(0, 2)
    return [tile.T if is_key else tile for tile in tiles]


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("preset", BITS)
def test_the_papers_formula(preset: str, part: str) -> None:
    scheme, values, is_key = load_scheme(preset), values_of(), part == "key"
    codec, bits = getattr(scheme, part), BITS[preset][0 if is_key else 1]
    found = tiles_of(decoded(codec, values), is_key)
    for tile, own in zip(tiles_of(values, is_key), found, strict=True):
        wanted, step = theirs(tile, bits)
        rounding = 4 * HALF * (2**bits + wanted.abs() / step)  # of two scales and a zero, in steps
        near = ((own - wanted) / step).abs() <= rounding
        assert near.double().mean() > 0.99, "all but codes that tip over where a value is as near to two"
        assert ((own - tile) / step).abs().le(0.5 + rounding).double().mean() > 0.999
        assert (own - tile).square().mean() < 1.02 * (wanted - tile).square().mean()


def test_the_second_scale_is_that_of_the_paper() -> None:
    for tile in tiles_of(values_of(), is_key=True):
        found = column_scales(tile.float())[0]
        torch.testing.assert_close(found, balanced(tile)[1].float(), rtol=1e-3, atol=0)


def test_tokens_times_channels_lose_nothing_once_they_are_balanced() -> None:
    """x = a_t * b_d * (1 or -1): two levels are left, where one scale per channel has all the sizes of tokens."""
    signs = 1.0 - 2 * ((torch.arange(TILE)[:, None] + torch.arange(WIDTH)) % 2)
    tokens = torch.linspace(4, 12, TILE).view(-1, 1)
    values = (signs * tokens * torch.linspace(1, 2, WIDTH))[None, None]
    codec = load_scheme("kvarn-2").key
    single = Codec(**{**codec.to_dict(), "tile": 0})
    dual, plain = (decoded(each, values) for each in (codec, single))
    assert ((dual - values).abs() / values.abs()).max() < 0.03
    assert ((plain - values).abs() / values.abs()).mean() > 0.1


def test_presets_are_what_their_tiles_take() -> None:
    """A record of theirs, of 128 tokens and 128 channels: codes, and each three times 128 halves for K and for V."""
    for preset, (key, value) in BITS.items():
        scheme = load_scheme(preset)
        bytes_of_tile = TILE * (scheme.key.token_bits(128) + scheme.value.token_bits(128)) / 8
        assert bytes_of_tile == TILE * 128 * (key + value) / 8 + 6 * 128 * 2
        assert (scheme.sinks, scheme.window, scheme.step(scheme.key), scheme.step(scheme.value)) == (128, 0, TILE, TILE)
        assert scheme.rotate_key and scheme.rotate_value
        assert scheme.key.granularity == "channel" and scheme.value.granularity == "token"
