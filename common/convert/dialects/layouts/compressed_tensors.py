"""The layouts of compressed-tensors: codes a byte each, or packed in words; `w = (code - zero) * scale`.

N output channels, K input channels, G groups of them. "pack-quantized" is `weight_packed`, int32 `[N, K bits / 32]`, of
codes from 0; `weight_scale` `[N, G]`; `weight_zero_point`, int32 `[N bits / 32, G]`, packed along N, where there are
zeros; `weight_shape`, int64 `[2]`; `weight_g_idx`, int32 `[K]`, where groups are mixed up. "int-quantized" and
"float-quantized" are `weight`, int8 or float8_e4m3fn `[N, K]`, and `weight_scale` `[N, 1]`, `[N, G]` or `[1]`; static
inputs have `input_scale` and `input_zero_point`, `[1]`. Here codes and zeros are signed.
"""

import torch

from .words import pack_words, unpack_words

METHOD = "compressed-tensors"
"""`quant_method` in config.json."""
PACKED_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
PLAIN_PARTS = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")


def pack_signed(codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """`weight_packed` and `weight_shape` of signed codes `[N, K]`."""
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return {"weight_packed": pack_words(codes.to(torch.int16) + 2 ** (bits - 1), bits), "weight_shape": shape}


def unpack_signed(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """`weight_packed` as signed codes, int8 `[N, K]`."""
    return (unpack_words(packed, bits, in_features).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def pack_zero_points(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed zeros `[N, G]`, whole numbers of any dtype, as `weight_zero_point`."""
    return pack_words(zeros.T.to(torch.int16) + 2 ** (bits - 1), bits).T.contiguous()


def unpack_zero_points(packed: torch.Tensor, bits: int, out_features: int) -> torch.Tensor:
    """`weight_zero_point` as signed zeros, int8 `[N, G]`."""
    return unpack_signed(packed.T, bits, out_features).T.contiguous()
