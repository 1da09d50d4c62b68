"""The registry of `run.py`: what is timed, on which shapes, against what. B is 1 everywhere."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from octavo import ops
from octavo.ops.attention.reference import attention_reference
from octavo.ops.codec.reference import encode_reference, encode_token_reference
from octavo.ops.linear.reference import linear_w8a8_reference

LARGEST_RMSE = 1e-5
"""Difference from the reference's attention, relative: that of tests/tolerances.py."""


@dataclass
class Variant:
    """One way to do the work of a case, and the bytes that it has to read and write."""

    what: str
    run: Callable[[], object]
    nbytes: int


@dataclass
class Case:
    """An op on one shape. `prepare` makes its variants, ours first, and a check that raises if ours is wrong."""

    op: str
    name: str
    prepare: Callable[[], tuple[list[Variant], Callable[[], None]]]


def cpu_model() -> str:
    """Name of the processor, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    if not difference <= LARGEST_RMSE:
        raise AssertionError(f"the kernel is {difference:.1e} off its reference")


def _equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(actual, expected):
        raise AssertionError("the kernel does not equal its reference")


def _attention(
    queries: int, keys: int, heads: int, groups: int, width: int
) -> tuple[list[Variant], Callable[[], None]]:
    """Causal attention of the last `queries` tokens of `keys`: int8 per channel and per token, and forms of SDPA."""
    query = torch.randn(1, queries, heads, width).transpose(1, 2)
    key, value = (torch.randint(-128, 128, (1, groups, keys, width), dtype=torch.int8) for _ in range(2))
    channel, token = torch.rand(groups, 1, width) * 0.02, torch.rand(1, groups, keys, 1) * 0.02
    key_float, value_float = key * channel, value * channel
    scaling = width**-0.5

    def int8(scale: torch.Tensor) -> Callable[[], torch.Tensor]:
        return partial(ops.attention, query, key, value, scale, None, scale, None, None, None, scaling, True)

    def sdpa(dtype: torch.dtype, folded: bool) -> Variant:
        q, k, v = (tensor.to(dtype) for tensor in (query, key_float, value_float))
        options: dict[str, object] = {"is_causal": queries > 1, "enable_gqa": True}
        if folded:
            q, options = q.reshape(1, groups, heads // groups, width), {}
        name = f"SDPA {str(dtype).removeprefix('torch.')}{', group folded into the queries' if folded else ''}"
        run = partial(functional.scaled_dot_product_attention, q, k, v, **options)
        return Variant(name, run, q.nbytes * 2 + k.nbytes + v.nbytes)

    def check() -> None:
        for scale in (channel, token):
            _same(
                int8(scale)(),
                attention_reference(query, key, value, scale, None, scale, None, None, None, scaling, True),
            )

    rest = query.nbytes * 2 + key.nbytes + value.nbytes
    ours = [
        Variant("int8, scales per channel", int8(channel), rest + 2 * channel.nbytes),
        Variant("int8, scales per token", int8(token), rest + 2 * token.nbytes),
    ]
    if queries == 1:  # one query sees all keys, so the heads of a group can pass for its queries
        return [*ours, sdpa(torch.float32, True), sdpa(torch.float32, False), sdpa(torch.bfloat16, True)], check
    return [*ours, sdpa(torch.float32, False)], check


def _linear(rows: int, depth: int, columns: int) -> tuple[list[Variant], Callable[[], None]]:
    """W8A8 against a linear layer in float32."""
    x = torch.randn(rows, depth)
    weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)
    weight_float = weight.float()
    bias, scale = torch.zeros(columns, dtype=torch.int32), torch.rand(columns) * 0.01
    arguments = (x, weight, torch.tensor([0.02]), torch.tensor([3.0]), bias, scale)
    moved = x.nbytes + rows * columns * 4

    def check() -> None:
        _equal(ops.linear_w8a8(*arguments), linear_w8a8_reference(*arguments))

    variants = [
        Variant("W8A8", partial(ops.linear_w8a8, *arguments), moved + weight.nbytes + bias.nbytes + scale.nbytes),
        Variant("F.linear float32", partial(functional.linear, x, weight_float), moved + weight_float.nbytes),
    ]
    return variants, check


def _codec(tokens: int, groups: int, width: int) -> tuple[list[Variant], Callable[[], None]]:
    """Codes of new tokens, static per channel and dynamic per token, against the references."""
    x = torch.randn(1, tokens, groups, width).transpose(1, 2)
    codes, expected = (torch.empty((1, groups, tokens, width), dtype=torch.int8) for _ in range(2))
    scale, scales = torch.rand(groups, 1, width) * 0.02 + 0.01, torch.empty(1, groups, tokens, 1)

    def check() -> None:
        ops.encode(x, scale, None, codes)
        encode_reference(x, scale, None, expected)
        _equal(codes, expected)
        ops.encode_token(x, codes, scales)
        encode_token_reference(x, expected, scales.clone())
        _equal(codes, expected)

    moved = x.nbytes + codes.nbytes
    variants = [
        Variant("static", partial(ops.encode, x, scale, None, codes), moved),
        Variant("per token", partial(ops.encode_token, x, codes, scales), moved),
        Variant("static, PyTorch", partial(encode_reference, x, scale, None, codes), moved),
        Variant("per token, PyTorch", partial(encode_token_reference, x, codes, scales), moved),
    ]
    return variants, check


CASES = [
    Case("attention", "decode, 32,768 keys, 32/8 heads of 128", partial(_attention, 1, 32768, 32, 8, 128)),
    Case("attention", "decode, 8,192 keys, 32/8 heads of 128", partial(_attention, 1, 8192, 32, 8, 128)),
    Case("attention", "decode, 8,192 keys, 9/3 heads of 64", partial(_attention, 1, 8192, 9, 3, 64)),
    Case("attention", "decode, 2,048 keys, 9/3 heads of 64", partial(_attention, 1, 2048, 9, 3, 64)),
    Case("attention", "decode, 8,192 keys, 14/2 heads of 128", partial(_attention, 1, 8192, 14, 2, 128)),
    Case("attention", "prefill, 2,048 tokens, 32/8 heads of 128", partial(_attention, 2048, 2048, 32, 8, 128)),
    Case("attention", "prefill, 2,048 tokens, 9/3 heads of 64", partial(_attention, 2048, 2048, 9, 3, 64)),
    Case("linear_w8a8", "1 x 4096 x 4096", partial(_linear, 1, 4096, 4096)),
    Case("linear_w8a8", "1 x 576 x 1536", partial(_linear, 1, 576, 1536)),
    Case("linear_w8a8", "1 x 1536 x 576", partial(_linear, 1, 1536, 576)),
    Case("linear_w8a8", "16 x 576 x 1536", partial(_linear, 16, 576, 1536)),
    Case("linear_w8a8", "2048 x 576 x 1536", partial(_linear, 2048, 576, 1536)),
    Case("linear_w8a8", "2048 x 4096 x 4096", partial(_linear, 2048, 4096, 4096)),
    Case("codec", "1 token, 8 heads of 128", partial(_codec, 1, 8, 128)),
    Case("codec", "2,048 tokens, 8 heads of 128", partial(_codec, 2048, 8, 128)),
]
