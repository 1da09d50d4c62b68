"""The op cases of `gpu.py`: attention over codes and linears, each beside the best that PyTorch has in 16 bits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from cases import Case, check_close
from shapes import E4M3, FLOAT, LIMITS, OP_CASES, codes_of
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo import ops
from octavo.ops.attention.call import ATTENTION_CALL, AttentionCall, Coded
from octavo.ops.attention.reference import attention_reference


@dataclass(frozen=True)
class Measured:
    """A variant that fails for itself, and is made when its turn comes.

    Attributes:
        what: its name.
        make: gives what is timed, whose result has been checked, and the bytes that it reads and writes.
    """

    what: str
    make: Callable[[], tuple[Callable[[], object], int]]


@dataclass(frozen=True)
class GpuCase:
    """Variants of one shape.

    Attributes:
        op: attention, linear or model.
        name: of the shape.
        variants: in the order in which they are measured, the most wanted first.
        wall: time what somebody waits, not what the device computes.
    """

    op: str
    name: str
    variants: Callable[[torch.device], Iterator[Measured]]
    wall: bool = False


@dataclass(frozen=True)
class Shape:
    """Causal attention of the last `queries` tokens of `keys`: `[B, H, Q, D]` on `[B, G, S, D]`."""

    batch: int
    queries: int
    keys: int
    heads: int
    groups: int
    width: int

    def query(self, device: torch.device) -> torch.Tensor:
        """Random queries in the dtype of models."""
        shape = (self.batch, self.queries, self.heads, self.width)
        return torch.randn(shape, device=device).to(FLOAT[device.type]).transpose(1, 2)

    def stored(self) -> tuple[int, int, int, int]:
        """Shape of K and of V."""
        return self.batch, self.groups, self.keys, self.width


SCALES = {
    "int8, scales per channel": ("int8", "channel", False),
    "int8, scales per token": ("int8", "token", False),
    "fp8, scales per head": ("fp8", "head", False),
    "int4, scales per token": ("int4", "token", False),
    "int8, int8 queries": ("int8", "head", True),
    "fp8, fp8 queries": ("fp8", "head", True),
}
"""Codes, what scales vary along, and whether queries are quantized too."""


def _of_codes(shape: Shape, kind: str, form: str, quantizes: bool, device: torch.device) -> tuple[Callable, int]:
    sizes = {"channel": (shape.groups, 1, shape.width), "head": (shape.groups, 1, 1)}
    size = sizes.get(form, (*shape.stored()[:3], 1))
    scale = torch.rand(size, device=device) * (0.5 if kind == "fp8" else 0.02) + 0.005
    key, value = (Coded(codes_of(kind, shape.stored(), device), scale) for _ in range(2))
    largest = torch.finfo(E4M3).max if kind == "fp8" else 127.0
    query_scale = torch.full((shape.heads, 1, 1), 4.0 / largest, device=device) if quantizes else None
    call = AttentionCall(shape.query(device), key, value, shape.width**-0.5, query_scale)
    flat = ATTENTION_CALL.flat(call)
    check_close(kind, ops.attention(*flat), attention_reference(call), LIMITS[device.type])
    moved = 2 * (call.query.nbytes + key.codes.nbytes + scale.nbytes)
    return partial(ops.attention, *flat), moved


def _sdpa(shape: Shape, backend: SDPBackend | None, folded: bool, device: torch.device) -> tuple[Callable, int]:
    q = shape.query(device)
    k, v = (torch.randn(shape.stored(), device=device).to(q.dtype) for _ in range(2))
    options: dict[str, bool] = {"is_causal": shape.queries > 1, "enable_gqa": True}
    if folded:  # the heads of a group pass for its queries, all of which see all keys
        q, options = q.reshape(shape.batch, shape.groups, -1, shape.width), {}

    def run() -> torch.Tensor:
        if backend is None:
            return functional.scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, **options)

    return run, 2 * q.nbytes + k.nbytes + v.nbytes


def _flex(shape: Shape, device: torch.device) -> tuple[Callable, int]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q = shape.query(device)
    k, v = (torch.randn(shape.stored(), device=device).to(q.dtype) for _ in range(2))
    mask = None
    if shape.queries > 1:
        sizes = (None, None, shape.queries, shape.keys)
        mask = create_block_mask(lambda b, h, row, column: row >= column, *sizes, device=device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, q, k, v, block_mask=mask, enable_gqa=True), 2 * q.nbytes + k.nbytes + v.nbytes


def _attention(shape: Shape, device: torch.device) -> Iterator[Measured]:
    ours = [Measured(what, partial(_of_codes, shape, *form, device)) for what, form in SCALES.items()]
    plain = str(FLOAT[device.type]).removeprefix("torch.")
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    backends = backends if device.type == "cuda" else {}
    yield from ours[:4]
    for name, backend in backends.items():
        yield Measured(f"SDPA {name} {plain}", partial(_sdpa, shape, backend, False, device))
        if shape.queries == 1:
            yield Measured(f"SDPA {name} {plain}, group folded", partial(_sdpa, shape, backend, True, device))
    yield Measured(f"SDPA {plain}", partial(_sdpa, shape, None, False, device))
    yield from ours[4:]
    if device.type == "cuda":  # it is a compiled kernel, or nothing
        yield Measured(f"flex attention {plain}", partial(_flex, shape, device))


def _of_case(case: Case, device: torch.device) -> Iterator[Measured]:
    """The variants of a case of `run.py`, of which ours are timed if all of them are right."""
    variants, check = case.prepare(device)
    checked = cache(check)

    def make(index: int) -> tuple[Callable, int]:
        if index < len(variants) - 1:
            checked()
        return variants[index].run, variants[index].nbytes

    for index, variant in enumerate(variants):
        yield Measured(variant.what, partial(make, index))


def _linears(names: tuple[str, ...]) -> list[GpuCase]:
    found = {case.name: case for case in OP_CASES["cuda"] if case.op == "linear"}
    return [GpuCase("linear", name, partial(_of_case, found[name])) for name in names]


def attention_case(name: str, *shape: int) -> GpuCase:
    """Attention on one shape, as `Shape` has it."""
    return GpuCase("attention", name, partial(_attention, Shape(*shape)))


DECODE = [
    attention_case("decode, batch 8, 32,768 keys, 32/8 heads of 128", 8, 1, 32768, 32, 8, 128),
    attention_case("decode, batch 1, 32,768 keys, 32/8 heads of 128", 1, 1, 32768, 32, 8, 128),
    attention_case("decode, batch 1, 2,048 keys, 32/8 heads of 64", 1, 1, 2048, 32, 8, 64),
]
PREFILL = [
    attention_case("prefill, 8,192 tokens, 32/8 heads of 128", 1, 8192, 8192, 32, 8, 128),
    attention_case("prefill, 2,048 tokens, 32/8 heads of 128", 1, 2048, 2048, 32, 8, 128),
]
LINEARS = _linears(("1 x 4096 x 4096", "16 x 4096 x 4096", "2048 x 4096 x 4096"))
