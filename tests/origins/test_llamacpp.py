"""The llamacpp presets against `gguf`, the package of llama.cpp whose quantizers are bit-exact with ggml's.

Left out are blocks of which the largest value is below 2^-120: the reciprocal of their scale may be infinite, and what
ggml makes of that is undefined. Their d is 0 here as there, and so are the values.
"""

import numpy
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.cache.dynamic_scales import llamacpp_codes
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.ops.shared.codes import unpack_int4

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")]

BLOCK = 32
TYPES = {"q8_0": Type.Q8_0, "q4_0": Type.Q4_0, "q4_1": Type.Q4_1}
TYPE_BYTES = {kind: GGML_QUANT_SIZES[type][1] for kind, type in TYPES.items()}
HALF = 2.0**-11
"""Largest relative error of rounding to float16."""
BELOW_HALF = 0.5 - 2.0**-25
"""The largest float32 below a half; with a half added, it rounds to 1."""


def _random(scale: float, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(256, 2 * BLOCK, generator=generator) * scale + shift


def _ties() -> torch.Tensor:
    """Multiples of half a step, with the ends of the range among them, so that the step is a power of two."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-14, 15, (64, 2 * BLOCK), generator=generator) / 2.0
    rows[:, ::BLOCK], rows[:, 1::BLOCK] = -8.0, 7.0  # steps of 1: Q4_0 and Q4_1
    wide = torch.randint(-253, 254, (64, 2 * BLOCK), generator=generator) / 2.0
    wide[:, ::BLOCK] = 127.0  # of 1: Q8_0
    wide[:, 2::BLOCK], wide[:, 3::BLOCK] = BELOW_HALF, -BELOW_HALF
    return torch.cat((rows, wide))


def _two_farthest() -> torch.Tensor:
    """The value farthest from 0 with both signs; which is first decides the sign of Q4_0's scale."""
    rows = _random(1.0).clamp(-2, 2)
    rows[::2, 5::BLOCK], rows[::2, 9::BLOCK] = 3.0, -3.0
    rows[1::2, 5::BLOCK], rows[1::2, 9::BLOCK] = -3.0, 3.0
    return rows


VALUES = {
    "random": _random(1.0),
    "random in float16": _random(1.0).half(),
    "random in bfloat16": _random(3.0).bfloat16(),
    "far from 0": _random(1.0, 200.0),
    "zeros": torch.zeros(4, 2 * BLOCK),
    "negative zeros": -torch.zeros(4, 2 * BLOCK),
    "ties": _ties(),
    "farthest twice": _two_farthest(),
    "all equal": torch.tensor([5.0, -5.0, 1e-3, -1e-3, 3e4, 6e-8]).repeat_interleave(2 * BLOCK).view(6, -1),
    "nearly equal": 5 + _random(1e-4).abs(),
    "one far out": torch.where(torch.arange(2 * BLOCK) % BLOCK == 7, 1e3, _random(1e-2)),
    "huge": _random(1e4).clamp(-6e4, 6e4),
    "tiny": _random(1e-5),
    "tiny in float16": _random(1e-6).half(),
    "scales that are 0 in float16": _random(1e-9),
    "tiny beyond float16": _random(1e-34),
}


def unpacked(blocks: numpy.ndarray, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of ggml's blocks, uint8, as codes `[..., W, 32]`, and d and m `[..., W]` in float16 (m is 0 where none is).

    block_q8_0 is d and 32 int8; block_q4_0 d and 16 bytes, of which byte i holds the values i and i + 16 from the low
    bits up; block_q4_1 d, m and such bytes. Source: ggml-common.h.
    """
    heads = 2 if kind == "q4_1" else 1
    rows = torch.from_numpy(blocks.reshape(*blocks.shape[:-1], -1, TYPE_BYTES[kind]).copy())
    scales, packed = rows[..., : 2 * heads].contiguous().view(torch.float16), rows[..., 2 * heads :].contiguous()
    codes = packed.view(torch.int8) if kind == "q8_0" else unpack_int4(packed, BLOCK)
    return codes, scales[..., 0], scales[..., 1] if heads == 2 else torch.zeros_like(scales[..., 0])


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """float16 or float32 as integers, so that signs of zeros and infinities count."""
    return x.contiguous().view({torch.float16: torch.int16, torch.float32: torch.int32}[x.dtype])


@pytest.mark.parametrize("kind", TYPES)
def test_the_cache_takes_as_many_bytes(kind: str) -> None:
    scheme = load_scheme(f"llamacpp-{kind}")
    assert scheme.key == scheme.value
    assert scheme.key.token_bits(128) / 8 == 4 * TYPE_BYTES[kind]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", VALUES)
def test_codes_and_scales_are_ggmls_to_the_bit(name: str, kind: str) -> None:
    values = VALUES[name]
    expected = unpacked(quantize(values.float().numpy(), TYPES[kind]), kind)
    groups = values.float().unflatten(-1, (-1, BLOCK))
    codes, scale, minimum = llamacpp_codes(groups, 8 if kind == "q8_0" else 4, kind == "q4_1")
    assert torch.equal(codes, expected[0].float())
    assert torch.equal(bits_of(scale), bits_of(expected[1]))
    assert torch.equal(bits_of(minimum), bits_of(expected[2]))


def decoded_by_both(name: str, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The values of our cache, those of ggml, and ggml's blocks as `unpacked` gives them, for 4 heads."""
    values = VALUES[name].view(1, -1, 4, 2 * BLOCK).transpose(1, 2) if len(VALUES[name]) % 4 == 0 else None
    values = VALUES[name][None, None] if values is None else values
    store = CodeStore(load_scheme(f"llamacpp-{kind}").key)
    store.append(values)
    blocks = quantize(values.float().numpy(), TYPES[kind])
    expected = torch.from_numpy(dequantize(blocks, TYPES[kind]))
    return store.decoded(0, values.shape[2]), expected, blocks


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", VALUES)
def test_the_cache_holds_ggmls_values(name: str, kind: str) -> None:
    actual, expected, _ = decoded_by_both(name, kind)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", VALUES)
def test_q4_1_in_the_cache_differs_by_the_rounding_of_its_zero_point(name: str) -> None:
    """ggml holds the minimum m, the cache the zero point -8 - m / d, in float16 both: off by 2^-11 |m + 8 d| at most.

    Beside that, float32 rounds (code - zero) * d, a few 2^-24 of |m| + 15 d.
    """
    actual, expected, blocks = decoded_by_both(name, "q4_1")
    _, scale, minimum = (part.float() for part in unpacked(blocks, "q4_1"))
    bound = HALF * (minimum.abs() + 8 * scale) + 2.0**-22 * (minimum.abs() + 15 * scale)
    assert (actual.isfinite() & expected.isfinite()).all()
    assert ((actual - expected).abs().unflatten(-1, (-1, BLOCK)) <= bound[..., None]).all()


@pytest.mark.parametrize("name", ["zeros", "all equal", "scales that are 0 in float16", "tiny beyond float16"])
def test_q4_1_of_equal_values_is_ggmls_to_the_bit(name: str) -> None:
    actual, expected, _ = decoded_by_both(name, "q4_1")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("kind", "size"), [("q8_0", 5e8), ("q4_0", 2e6)])
def test_scales_beyond_float16_are_infinite_as_in_ggml(kind: str, size: float) -> None:
    values = _random(size)
    codes, scale, _ = llamacpp_codes(values.unflatten(-1, (-1, BLOCK)), 8 if kind == "q8_0" else 4, False)
    expected_codes, expected_scale, _ = unpacked(quantize(values.numpy(), TYPES[kind]), kind)
    assert scale.isinf().any()
    assert torch.equal(codes, expected_codes.float()) and torch.equal(scale, expected_scale)
