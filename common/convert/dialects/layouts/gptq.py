"""GPTQ's layout of weights in 2 to 8 bits: `w = (code - zero) * scale`, codes and zeros from 0.

N output channels, K input channels, G groups of them. A linear is `qweight`, int32 `[K bits / 32, N]`; `qzeros`, int32
`[G, N bits / 32]`; `scales`, float16 `[G, N]`; `g_idx`, int32 `[K]`, the group of each input channel, which act-order
mixes up. Words hold input channels, and output channels in `qzeros`. The first version of the layout, "gptq", stores
zeros less by 1; "gptq_v2" stores them as they are. Here codes and zeros are less by `2 ** (bits - 1)`, and N comes
first.
"""

from typing import Any

import torch

from .words import WORD_BITS, pack_words, unpack_words

METHOD = "gptq"
"""`quant_method` in config.json."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
FIRST, SECOND = "gptq", "gptq_v2"
"""Versions of the layout, as `checkpoint_format` names them."""


def bits_of(qweight: tuple[int, ...], in_features: int) -> int:
    """Bits of codes by the shape of `qweight`; 0 if it is of no whole number of bits."""
    bits, rest = divmod(qweight[0] * WORD_BITS, in_features)
    return 0 if rest else bits


def plain_order(in_features: int, groups: int) -> torch.Tensor:
    """The group of each input channel where groups are consecutive, int32 `[K]`."""
    return torch.arange(in_features, dtype=torch.int32) // (in_features // groups)


def pack_gptq(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int = 4, version: str = FIRST
) -> dict[str, torch.Tensor]:
    """The tensors of a linear whose groups are consecutive.

    Args:
        codes: int8 `[N, K]` from `-2 ** (bits - 1)`; N and K multiples of 32.
        zeros: whole numbers among the codes, any dtype, `[N, G]`, above the lowest in the first version; 0 of a
            symmetric weight.
        scales: float `[N, G]`.
        version: of the layout.
    """
    middle = 2 ** (bits - 1)
    stored = zeros.T.to(torch.int16) + middle - int(version == FIRST)
    return {
        "qweight": pack_words(codes.to(torch.int16) + middle, bits).T.contiguous(),
        "qzeros": pack_words(stored, bits),
        "scales": scales.T.to(torch.float16).contiguous(),
        "g_idx": plain_order(codes.shape[1], zeros.shape[1]),
    }


def unpack_gptq(
    parts: dict[str, torch.Tensor], bits: int, in_features: int, version: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 `[N, K]`, zeros int16 `[N, G]`, and scales `[N, G]` in their dtype.

    Zeros of the first version may be one more than the highest code, which is what a stored highest code says.
    """
    middle, scales = 2 ** (bits - 1), parts["scales"].T.contiguous()
    codes = (unpack_words(parts["qweight"].T, bits, in_features).to(torch.int16) - middle).to(torch.int8)
    stored = unpack_words(parts["qzeros"], bits, scales.shape[0]).to(torch.int16)
    zeros = (stored - middle + int(version == FIRST)).T.contiguous()
    return codes, zeros, scales


def gptq_config(
    bits: int, group_size: int, symmetric: bool, head: bool = False, version: str = FIRST
) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        bits: of codes.
        group_size: input channels of a group; -1 is all of them.
        symmetric: whether zeros are all the middle code.
        head: whether the last linear is quantized, too.
        version: of the layout.
    """
    return {
        "quant_method": METHOD, "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": False,
        "checkpoint_format": version, "lm_head": head,
    }  # fmt: skip
