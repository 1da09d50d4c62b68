"""Codes of K, V and q: encoding and decoding; see README.md and reference.py."""

import torch

from ..shared.codes import code_width
from ..shared.registry import define_op, implement
from .cpu import CODEC_KERNEL, decode_cpu, encode_cpu, encode_token_cpu
from .cuda import CODEC_CUDA, decode_cuda, encode_cuda, encode_token_cuda
from .npu import DECODE_NPU, ENCODE_NPU, ENCODE_TOKEN_NPU, decode_npu, encode_npu, encode_token_npu
from .reference import decode_reference, encode_reference, encode_token_reference


def _encode_fake(*unused: object, **unused_by_name: object) -> None:
    return None


def _decode_fake(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_group: int = 1,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], code_width(codes, bits)), dtype=torch.float32)


encode = define_op("encode", encode_reference, _encode_fake, mutates=("codes",))
encode_token = define_op("encode_token", encode_token_reference, _encode_fake, mutates=("codes", "scale", "zero"))
decode = define_op("decode", decode_reference, _decode_fake)
implement("encode", "CPU", encode_cpu, CODEC_KERNEL.description)
implement("encode_token", "CPU", encode_token_cpu, CODEC_KERNEL.description)
implement("decode", "CPU", decode_cpu, CODEC_KERNEL.description)
implement("encode", "CUDA", encode_cuda, CODEC_CUDA)
implement("encode_token", "CUDA", encode_token_cuda, CODEC_CUDA)
implement("decode", "CUDA", decode_cuda, CODEC_CUDA)
implement("encode", "PrivateUse1", encode_npu, ENCODE_NPU)
implement("encode_token", "PrivateUse1", encode_token_npu, ENCODE_TOKEN_NPU)
implement("decode", "PrivateUse1", decode_npu, DECODE_NPU)
