"""AWQ's layout of W4A16, "gemm" of AutoAWQ: `w = (code - zero) * scale`, codes and zeros from 0 to 15.

N output channels, K input channels, G groups of them. A linear is `qweight`, int32 `[K, N / 8]`; `qzeros`, int32
`[G, N / 8]`; `scales`, float16 `[G, N]`. A word holds 8 output channels, in the order of `_IN_WORD` from the low bits
up. Here codes and zeros are less by 8, those of int4, and N comes first.
"""

from typing import Any

import torch

from .words import pack_words, unpack_words

METHOD = "awq"
"""`quant_method` in config.json."""
PARTS = ("qweight", "qzeros", "scales")
BITS = 4
_MIDDLE = 8
_IN_WORD = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of the 8 output channels of a word lies in each field of it."""


def _pack(values: torch.Tensor) -> torch.Tensor:
    """int8 `[N, R]` from -8 to 7 as int32 `[R, N / 8]`."""
    fields = (values.T + _MIDDLE).unflatten(-1, (-1, len(_IN_WORD)))[..., list(_IN_WORD)]
    return pack_words(fields.flatten(-2), BITS)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_pack`."""
    fields = unpack_words(words, BITS, words.shape[-1] * len(_IN_WORD)).unflatten(-1, (-1, len(_IN_WORD)))
    places = [_IN_WORD.index(channel) for channel in range(len(_IN_WORD))]
    return (fields[..., places].flatten(-2).to(torch.int8) - _MIDDLE).T.contiguous()


def pack_awq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a linear.

    Args:
        codes: int8 `[N, K]`, from -8 to 7; N a multiple of 8.
        zeros: whole numbers from -8 to 7, any dtype, `[N, G]`; 0 of a symmetric weight.
        scales: float `[N, G]`.
    """
    return {
        "qweight": _pack(codes),
        "qzeros": _pack(zeros.to(torch.int8)),
        "scales": scales.T.to(torch.float16).contiguous(),
    }


def unpack_awq(parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 `[N, K]`, zeros int8 `[N, G]`, both from -8 to 7, and scales `[N, G]` in their dtype."""
    return _unpack(parts["qweight"]), _unpack(parts["qzeros"]), parts["scales"].T.contiguous()


def awq_config(group_size: int, left_out: list[str] | None = None) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        group_size: input channels of a group; -1 is all of them.
        left_out: names, or parts of names, of linears in float.
    """
    return {
        "quant_method": METHOD, "bits": BITS, "group_size": group_size, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": left_out or None,
    }  # fmt: skip
