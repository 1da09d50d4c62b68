"""Layouts of codes in other projects' checkpoints: packed word by word here, and by the library where there is one."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from octavo.common.convert.dialects.layouts.awq import pack_awq, unpack_awq
from octavo.common.convert.dialects.layouts.compressed_tensors import (
    pack_signed,
    pack_zero_points,
    unpack_signed,
    unpack_zero_points,
)
from octavo.common.convert.dialects.layouts.fp8_block import decode_blocks
from octavo.common.convert.dialects.layouts.gptq import bits_of, pack_gptq, unpack_gptq
from octavo.common.convert.dialects.layouts.words import pack_words, unpack_words, words_of

OUT, IN, GROUP = 64, 96, 32


def whole(low: int, high: int, *shape: int) -> torch.Tensor:
    """Random whole numbers, int8."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(len(shape))).to(torch.int8)


def int32(word: int) -> int:
    """The signed number of 32 bits."""
    return word - 2**32 if word >= 2**31 else word


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_words_are_a_stream_of_bits(bits: int) -> None:
    values = torch.randint(0, 2**bits, (3, 50), generator=torch.Generator().manual_seed(bits))
    words = pack_words(values, bits)
    assert words.dtype == torch.int32 and words.shape == (3, words_of(50, bits))
    for row, found in zip(values.tolist(), words.tolist(), strict=True):
        stream = sum(value << index * bits for index, value in enumerate(row))
        assert found == [int32(stream >> 32 * index & 0xFFFFFFFF) for index in range(len(found))]
    assert torch.equal(unpack_words(words, bits, 50).long(), values)


def test_awq_words_hold_output_channels_in_their_order() -> None:
    codes, zeros, scales = whole(-8, 8, OUT, IN), whole(-8, 8, OUT, IN // GROUP), torch.rand(OUT, IN // GROUP).half()
    parts = pack_awq(codes, zeros, scales)
    for name, values in (("qweight", codes), ("qzeros", zeros)):
        for row, words in enumerate(parts[name].tolist()):
            for word, found in enumerate(words):
                channels = [8 * word + place for place in (0, 2, 4, 6, 1, 3, 5, 7)]
                assert found == int32(sum(int(values[c, row] + 8) << 4 * i for i, c in enumerate(channels)))
    assert torch.equal(parts["scales"], scales.T)
    again = unpack_awq(parts)
    assert all(torch.equal(a, b) for a, b in zip(again, (codes, zeros, scales), strict=True))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_hold_input_channels(bits: int, version: str) -> None:
    middle = 2 ** (bits - 1)
    codes, zeros = whole(-middle, middle, OUT, IN), whole(1 - middle, middle, OUT, IN // GROUP)
    scales = torch.rand(OUT, IN // GROUP).half()
    parts = pack_gptq(codes, zeros, scales, bits, version)
    assert bits_of(tuple(parts["qweight"].shape), IN) == bits
    for channel in (0, OUT - 1):
        stream = sum(int(code) + middle << bits * index for index, code in enumerate(codes[channel]))
        expected = [int32(stream >> 32 * index & 0xFFFFFFFF) for index in range(words_of(IN, bits))]
        assert parts["qweight"][:, channel].tolist() == expected
    less = 1 if version == "gptq" else 0
    stream = sum(int(zero) + middle - less << bits * index for index, zero in enumerate(zeros[:, 1]))
    assert parts["qzeros"][1].tolist() == [int32(stream >> 32 * i & 0xFFFFFFFF) for i in range(words_of(OUT, bits))]
    assert parts["g_idx"].tolist() == [channel // GROUP for channel in range(IN)]
    found = unpack_gptq(parts, bits, IN, version)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, (codes, zeros, scales), strict=True))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packed_codes_are_those_of_compressed_tensors(bits: int) -> None:
    middle = 2 ** (bits - 1)
    codes, zeros = whole(-middle, middle, OUT, 72), whole(-middle, middle, OUT, 3)
    parts = pack_signed(codes, bits)
    assert torch.equal(parts["weight_packed"], pack_to_int32(codes, bits))
    assert parts["weight_shape"].tolist() == [OUT, 72]
    assert torch.equal(pack_zero_points(zeros, bits), pack_to_int32(zeros, bits, packed_dim=0))
    assert torch.equal(unpack_signed(parts["weight_packed"], bits, 72), codes)
    assert torch.equal(unpack_from_int32(parts["weight_packed"], bits, codes.shape), codes)
    assert torch.equal(unpack_zero_points(pack_zero_points(zeros, bits), bits, OUT), zeros)


def test_blocks_at_the_edges_may_be_smaller() -> None:
    codes = torch.randn(130, 70).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2)
    found = decode_blocks(codes, scales, 64, 48)
    for row, column in ((0, 0), (63, 47), (64, 48), (129, 69)):
        assert found[row, column] == codes[row, column].float() * scales[row // 64, column // 48]
