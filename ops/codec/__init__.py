"""Encoding of K, V (and q) into 8-bit codes; the semantics are in README.md and reference.py."""

import torch

from ..library import define, implement
from .cpu import CODEC_KERNEL, encode_cpu, encode_token_cpu
from .npu import ENCODE_NPU, ENCODE_TOKEN_NPU, encode_npu, encode_token_npu
from .reference import encode_reference, encode_token_reference


def _encode_fake(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, codes: torch.Tensor) -> None:
    return None


def _encode_token_fake(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    return None


encode = define("encode(Tensor x, Tensor scale, Tensor? zero, Tensor(a!) codes) -> ()", encode_reference, _encode_fake)
encode_token = define(
    "encode_token(Tensor x, Tensor(a!) codes, Tensor(b!) scale) -> ()", encode_token_reference, _encode_token_fake
)
implement("encode", "CPU", encode_cpu, CODEC_KERNEL.description)
implement("encode_token", "CPU", encode_token_cpu, CODEC_KERNEL.description)
implement("encode", "PrivateUse1", encode_npu, ENCODE_NPU)
implement("encode_token", "PrivateUse1", encode_token_npu, ENCODE_TOKEN_NPU)
