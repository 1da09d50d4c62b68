"""The registry of op benchmarks of `run.py`: what is timed, on which shapes, against what."""

from collections.abc import Callable
from functools import partial

import torch
from cases import Case, Prepared, Variant, check_close, check_equal
from torch.nn import functional

from octavo import ops
from octavo.ops.attention.call import ATTENTION_CALL, AttentionCall, Coded
from octavo.ops.attention.reference import attention_reference
from octavo.ops.codec.reference import encode_reference, encode_token_reference
from octavo.ops.linear.reference import (
    WEIGHT_BLOCK,
    linear_fp8_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)
from octavo.ops.shared.codes import pack_int4

LIMITS = {"cpu": 1e-5, "cuda": 2e-2}
"""Relative error from the reference, as in tests/tolerances.py: of float32 on the CPU, of bfloat16 on a GPU."""
MANY_ROWS = 2e-4
"""The same of attention of many queries over int8 and int4 codes on the CPU, of which fewer digits are multiplied."""
FLOAT = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""The dtype of models, and so of queries and inputs, by device."""
E4M3 = torch.float8_e4m3fn


def codes_of(kind: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Random codes of K or V."""
    if kind == "fp8":
        return torch.randn(shape, device=device).to(E4M3)
    low, high = (-8, 8) if kind == "int4" else (-128, 128)
    codes = torch.randint(low, high, shape, dtype=torch.int8, device=device)
    return pack_int4(codes, shape[-1]) if kind == "int4" else codes


def _attention(
    batch: int, queries: int, keys: int, heads: int, groups: int, width: int, device: torch.device
) -> Prepared:
    """Causal attention of the last `queries` tokens of `keys`: codes of several kinds, and forms of SDPA."""
    dtype, scaling = FLOAT[device.type], width**-0.5
    query = torch.randn(batch, queries, heads, width, device=device).to(dtype).transpose(1, 2)
    shape = (batch, groups, keys, width)
    token = torch.rand((batch, groups, keys, 1), device=device) * 0.02
    scales = {
        "int8, scales per channel": ("int8", torch.rand((groups, 1, width), device=device) * 0.02),
        "int8, scales per token": ("int8", token),
        "int4, scales per token": ("int4", token),
        "fp8, scales per head": ("fp8", torch.ones((groups, 1, 1), device=device)),
    }
    arguments = {}
    for what, (kind, scale) in scales.items():
        key, value = (codes_of(kind, shape, device) for _ in range(2))
        arguments[what] = AttentionCall(query, Coded(key, scale), Coded(value, scale), scaling)
    ours = [
        Variant(
            what,
            partial(ops.attention, *ATTENTION_CALL.flat(call)),
            2 * (query.nbytes + call.key.codes.nbytes + call.key.scale.nbytes),
        )
        for what, call in arguments.items()
    ]

    def check() -> None:
        for what, call in arguments.items():
            output = ops.attention(*ATTENTION_CALL.flat(call))
            check_close(
                what, output, attention_reference(call), max(LIMITS[device.type], MANY_ROWS if queries > 1 else 0)
            )

    key, value = (torch.randn(shape, device=device) for _ in range(2))

    def sdpa(form: torch.dtype, folded: bool) -> Variant:
        q, k, v = (tensor.to(form) for tensor in (query, key, value))
        options: dict[str, object] = {"is_causal": queries > 1, "enable_gqa": True}
        if folded:
            q, options = q.reshape(batch, groups, heads // groups, width), {}
        name = f"SDPA {str(form).removeprefix('torch.')}{', group folded into the queries' if folded else ''}"
        run = partial(functional.scaled_dot_product_attention, q, k, v, **options)
        return Variant(name, run, q.nbytes * 2 + k.nbytes + v.nbytes)

    if queries > 1:
        return [*ours, sdpa(dtype, False)], check
    # One query sees all keys, so the heads of a group can pass for its queries.
    forms = [sdpa(dtype, True), sdpa(dtype, False)]
    return [*ours, *forms, *([sdpa(torch.bfloat16, True)] if dtype != torch.bfloat16 else [])], check


def _grouped(columns: int, depth: int, group: int, device: torch.device) -> torch.Tensor:
    return torch.rand((columns, depth // group), device=device) * 0.01 + 0.001


def _linear(rows: int, depth: int, columns: int, device: torch.device) -> Prepared:
    """Every linear op against a linear layer in the dtype of models."""
    dtype, limit = FLOAT[device.type], LIMITS[device.type]
    x = torch.randn((rows, depth), device=device).to(dtype)
    weight = torch.randint(-127, 128, (columns, depth), dtype=torch.int8, device=device)
    scale = torch.rand(columns, device=device) * 0.01 + 0.001
    bias = torch.zeros(columns, dtype=torch.int32, device=device)
    step, offset = torch.tensor([0.02], device=device), torch.tensor([3.0], device=device)
    packed = pack_int4(weight >> 4, WEIGHT_BLOCK)
    fp8 = torch.randn((columns, depth), device=device).to(E4M3)
    group = 128 if depth % 128 == 0 else 64
    given: dict[str, tuple[Callable, Callable, tuple]] = {
        "W8A8": (ops.linear_w8a8, linear_w8a8_reference, (x, weight, step, offset, bias, scale)),
        "W8A8 dynamic": (ops.linear_w8a8_dynamic, linear_w8a8_dynamic_reference, (x, weight, scale, None)),
        "W8A16": (
            ops.linear_weight_only,
            linear_weight_only_reference,
            (x, weight, scale[:, None], None, None),
        ),
        f"W4A16, groups of {group}": (
            ops.linear_weight_only,
            linear_weight_only_reference,
            (x, packed, _grouped(columns, depth, group, device), None, None),
        ),
        "fp8": (ops.linear_fp8, linear_fp8_reference, (x, fp8, scale, None, None)),
    }

    def check() -> None:
        for what, (op, reference, arguments) in given.items():
            check_close(what, op(*arguments), reference(*arguments), limit)

    moved = x.nbytes + rows * columns * x.element_size()
    ours = [
        Variant(what, partial(op, *arguments), moved + sum(t.nbytes for t in arguments[1:] if t is not None))
        for what, (op, _, arguments) in given.items()
    ]
    weight_float = weight.to(dtype)
    name = f"F.linear {str(dtype).removeprefix('torch.')}"
    return [*ours, Variant(name, partial(functional.linear, x, weight_float), moved + weight_float.nbytes)], check


def _codec(tokens: int, groups: int, width: int, device: torch.device) -> Prepared:
    """Codes of new tokens, static per channel and dynamic per token, against the references."""
    x = torch.randn((1, tokens, groups, width), device=device).to(FLOAT[device.type]).transpose(1, 2)
    codes, expected = (torch.empty((1, groups, tokens, width), dtype=torch.int8, device=device) for _ in range(2))
    packed = torch.empty((1, groups, tokens, width // 2), dtype=torch.uint8, device=device)
    fp8 = torch.empty((1, groups, tokens, width), dtype=E4M3, device=device)
    scale = torch.rand((groups, 1, width), device=device) * 0.02 + 0.01
    scales = torch.empty((1, groups, tokens, 1), device=device)

    def check() -> None:
        ops.encode(x, scale, None, codes)
        encode_reference(x, scale, None, expected)
        check_equal("static", codes, expected)
        for what, storage in (("int8 per token", codes), ("int4 per token", packed), ("fp8 per token", fp8)):
            wanted, wanted_scales = torch.empty_like(storage), torch.empty_like(scales)
            ops.encode_token(x, storage, scales)
            encode_token_reference(x, wanted, wanted_scales)
            check_equal(f"{what}, scales", scales, wanted_scales)
            check_equal(what, storage.view(torch.uint8), wanted.view(torch.uint8))

    moved = x.nbytes + codes.nbytes
    variants = [
        Variant("static int8", partial(ops.encode, x, scale, None, codes), moved),
        Variant("int8 per token", partial(ops.encode_token, x, codes, scales), moved),
        Variant("int4 per token", partial(ops.encode_token, x, packed, scales), x.nbytes + packed.nbytes),
        Variant("fp8 per token", partial(ops.encode_token, x, fp8, scales), moved),
        Variant("static int8, PyTorch", partial(encode_reference, x, scale, None, codes), moved),
        Variant("int8 per token, PyTorch", partial(encode_token_reference, x, codes, scales), moved),
    ]
    return variants, check


def _attention_case(name: str, *shape: int) -> Case:
    return Case("attention", name, partial(_attention, *shape))


def _linear_case(*shape: int) -> Case:
    return Case("linear", " x ".join(map(str, shape)), partial(_linear, *shape))


_ANYWHERE = [
    _attention_case("decode, 32,768 keys, 32/8 heads of 128", 1, 1, 32768, 32, 8, 128),
    _attention_case("decode, 8,192 keys, 32/8 heads of 128", 1, 1, 8192, 32, 8, 128),
    _attention_case("decode, 8,192 keys, 9/3 heads of 64", 1, 1, 8192, 9, 3, 64),
    _attention_case("decode, 2,048 keys, 9/3 heads of 64", 1, 1, 2048, 9, 3, 64),
    _attention_case("decode, 128 keys, 9/3 heads of 64", 1, 1, 128, 9, 3, 64),
    _attention_case("decode, 8,192 keys, 14/2 heads of 128", 1, 1, 8192, 14, 2, 128),
    _attention_case("prefill, 2,048 tokens, 32/8 heads of 128", 1, 2048, 2048, 32, 8, 128),
    _attention_case("prefill, 2,048 tokens, 9/3 heads of 64", 1, 2048, 2048, 9, 3, 64),
    _linear_case(1, 4096, 4096),
    _linear_case(1, 576, 1536),
    _linear_case(1, 1536, 576),
    _linear_case(1, 576, 49152),
    _linear_case(16, 4096, 4096),
    _linear_case(2048, 576, 1536),
    _linear_case(2048, 4096, 4096),
    Case("codec", "1 token, 8 heads of 128", partial(_codec, 1, 8, 128)),
    Case("codec", "2,048 tokens, 8 heads of 128", partial(_codec, 2048, 8, 128)),
]
_GPU = [
    _attention_case("decode, batch 8, 32,768 keys, 32/8 heads of 128", 8, 1, 32768, 32, 8, 128),
    _attention_case("prefill, 8,192 tokens, 32/8 heads of 128", 1, 8192, 8192, 32, 8, 128),
]
OP_CASES = {"cpu": _ANYWHERE, "cuda": [*_GPU, *_ANYWHERE]}
"""Cases by kind of device."""
