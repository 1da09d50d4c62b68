"""Random calls of attention over codes, and what they have to give."""

from dataclasses import dataclass

import torch

from octavo.ops import attention, attention_lse
from octavo.ops.attention.call import ATTENTION_CALL, AttentionCall
from octavo.ops.attention.reference import attention_lse_reference, attention_reference

from ..metrics import relative_rmse
from ..tolerances import TOLERANCES

UNUSED = 9
"""Tokens of capacity behind those in use: K and V are views of storage, as the cache hands them out."""


CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = {torch.int8: 0.02, torch.uint8: 0.3, torch.float8_e4m3fn: 0.1, torch.float8_e5m2: 0.1}
"""Scales with which random codes come out of about the size of normal values."""


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Codes in float64; those of int4 lie in the halves of bytes."""
    if codes.dtype != torch.uint8:
        return codes.double()
    return torch.cat((codes & 15, codes >> 4), dim=-1).double() - 8


def expanded(part: torch.Tensor, keys: int, width: int, group: int) -> torch.Tensor:
    """A scale or zero for each token and channel, in float64."""
    part = part.double().repeat_interleave(width // part.shape[-1], dim=-1)
    return part.expand(*part.shape[:-2], keys, width) if part.shape[-2] == 1 else tokens_of(part, keys, group)


def tokens_of(part: torch.Tensor, keys: int, group: int) -> torch.Tensor:
    return part.repeat_interleave(group, dim=-2)[..., :keys, :]


@dataclass
class Call:
    """Arguments of the op, by name."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    key_zero: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    value_zero: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    scaling: float = 0.125
    causal: bool = True
    length: torch.Tensor | None = None
    window: int = 0
    key_group: int = 1
    value_group: int = 1
    position_query: torch.Tensor | None = None
    position_table: torch.Tensor | None = None
    position_start: torch.Tensor | None = None

    def has_many_rows(self) -> bool:
        """Whether so many queries read a KV head of codes that fewer digits of them are multiplied."""
        rows = self.query.shape[2] * self.query.shape[1] // self.key.shape[1]
        return rows > 192 and {self.key.dtype, self.value.dtype} <= {torch.int8, torch.uint8}

    def call(self) -> AttentionCall:
        return ATTENTION_CALL.of(**vars(self))

    def run(self) -> torch.Tensor:
        return attention(**vars(self))

    def run_lse(self) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_lse(**vars(self))

    def reference(self) -> torch.Tensor:
        return attention_reference(self.call())

    def reference_lse(self) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_lse_reference(self.call())

    def oracle(self) -> torch.Tensor:
        return self.oracle_lse()[0]

    def oracle_lse(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax over decoded K and V in float64, with the mask or causality written out, and log-sum-exp."""
        heads, queries, width = self.query.shape[1:]
        keys, ratio = self.key.shape[2], heads // self.key.shape[1]
        key, value = (
            (unpacked(codes) - (0 if zero is None else expanded(zero, keys, width, group)))
            * (1 if scale is None else expanded(scale, keys, width, group))
            for codes, scale, zero, group in (
                (self.key, self.key_scale, self.key_zero, self.key_group),
                (self.value, self.value_scale, self.value_zero, self.value_group),
            )
        )
        scores = self.query.double() @ key.repeat_interleave(ratio, dim=1).mT * self.scaling
        if self.position_query is not None:
            rows = self.position_start.view(-1, 1) + torch.arange(keys)
            table = self.position_table.double()[rows.clamp(0, self.position_table.shape[0] - 1)]
            scores = scores + self.position_query.double() @ table[:, None].mT * self.scaling
        mask = self.mask
        if self.causal and mask is None:
            mask = causal_mask(queries, keys)
            mask = mask.triu(keys - queries - self.window + 1) if self.window else mask
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        output = (scores.softmax(dim=-1) @ value.repeat_interleave(ratio, dim=1)).transpose(1, 2)
        return output, scores.logsumexp(dim=-1)


def causal_mask(queries: int, keys: int) -> torch.Tensor:
    """True where query i, the last of which is the newest token, sees a key."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def poison(codes: torch.Tensor) -> None:
    """All bits are set: NaN in every float type."""
    codes.view(torch.uint8).fill_(255)


def stored(dtype: torch.dtype, batch: int, groups: int, keys: int, width: int, token_major: bool) -> torch.Tensor:
    """Random codes, or values, as a view of a storage with poisoned tokens behind the last."""
    shape = (batch, groups, keys + UNUSED, width)
    if dtype in (torch.int8, torch.uint8):
        shape = shape if dtype == torch.int8 else (*shape[:3], width // 2)
        storage = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, shape, dtype=dtype)
    else:
        storage = (torch.randn(shape) * (10 if dtype in CODES else 1)).to(dtype)
    if token_major:
        storage = storage.transpose(1, 2).contiguous().transpose(1, 2)
    poison(storage[:, :, keys:])
    return storage[:, :, :keys]


def call_of(
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    queries: int = 3,
    keys: int = 40,
    groups: int = 2,
    ratio: int = 3,
    width: int = 32,
    batch: int = 2,
    token_major: bool = False,
) -> Call:
    """Random codes with scales per channel."""
    key, value = (stored(dtype, batch, groups, keys, width, token_major) for dtype in (key_dtype, value_dtype))
    call = Call(torch.randn(batch, queries, groups * ratio, width).transpose(1, 2), key, value, scaling=width**-0.5)
    call.key_scale = part_of("per channel", call, key, 1)
    call.value_scale = part_of("per channel", call, value, 1)
    return call


def int8_call(
    queries: int = 3, keys: int = 40, groups: int = 2, ratio: int = 3, width: int = 32, batch: int = 2
) -> Call:
    return call_of(torch.int8, torch.int8, queries, keys, groups, ratio, width, batch)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, many_rows: bool = False) -> None:
    assert actual.shape == expected.shape
    tolerance = TOLERANCES["attention of many rows" if many_rows else "attention"]
    assert actual.numel() == 0 or relative_rmse(actual, expected) < tolerance


def assert_lse_close(actual: torch.Tensor, expected: torch.Tensor, many_rows: bool = False) -> None:
    """Both say alike who sees nothing, and how much is seen. All keys at the lowest float are as good as none."""
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    lowest = torch.finfo(torch.float32).min / 2
    sees = expected > lowest
    assert torch.equal(actual > lowest, sees)
    assert torch.equal(actual == float("-inf"), expected == float("-inf"))
    tolerance = TOLERANCES["log-sum-exp of many rows" if many_rows else "attention"]
    torch.testing.assert_close(actual[sees].double(), expected[sees].double(), rtol=1e-6, atol=tolerance)


FORMS = (
    "per channel",
    "per head",
    "per group of channels",
    "per token",
    "per group of tokens",
    "per token and group of channels",
    "per channel and group of tokens",
)


MASKS = ("none", "none", "none", "bool", "bool per head", "float", "lowest float", "sees nothing")


def part_of(
    form: str, call: Call, codes: torch.Tensor, group: int, is_zero: bool = False, half: bool = False
) -> torch.Tensor | None:
    """Random scales of codes, or zero points, of one form; float tensors have none."""
    if form == "none" or codes.dtype in FLOATS:
        return None
    batch, groups, keys = codes.shape[:3]
    width = call.query.shape[3]
    columns = {"per channel": width, "per group of channels": 2, "per token and group of channels": 4}
    columns["per channel and group of tokens"] = width
    rows = -(-keys // group) if "token" in form else 1
    shape = (groups, rows, columns.get(form, 1))
    shape = shape if rows == 1 else (batch, *shape)
    limits = {torch.int8: 20, torch.uint8: 3}
    part = torch.randn(shape) * limits.get(codes.dtype, 1) if is_zero else torch.rand(shape) + 0.5
    part = part if is_zero else part * SCALES[codes.dtype]
    return part.half() if half else part


def mask_of(kind: str, call: Call) -> torch.Tensor | None:
    """A random mask of one kind for a call."""
    batch, heads, queries, _ = call.query.shape
    keys = call.key.shape[2]
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(batch, 1, queries, keys)
    if kind == "sees nothing":
        return torch.zeros((1, 1, queries, keys), dtype=torch.bool)
    seen = torch.rand((batch, heads if kind == "bool per head" else 1, queries, keys)) < 0.7
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape).masked_fill(~seen, lowest) if kind == "lowest float" else seen


def query_scale_of(form: str, call: Call) -> torch.Tensor | None:
    """Random scales that quantize the query."""
    batch, heads, queries, _ = call.query.shape
    shapes = {"per head": (heads, 1, 1), "per token": (batch, heads, queries, 1)}
    return None if form == "none" else torch.rand(shapes[form]) * 0.02 + 0.01


def length_of(form: str, call: Call) -> torch.Tensor | None:
    """Random tokens in use; what lies behind is poisoned, scales per token too."""
    batch, _, keys = call.key.shape[:3]
    if form == "none":
        return None
    length = torch.randint(0, keys + 1, (batch if form == "per sequence" else 1,))
    for b in range(batch):
        used = int(length[b % len(length)])
        poison(call.key[b, :, used:])
        poison(call.value[b, :, used:])
        for parts, group in (
            ((call.key_scale, call.key_zero), call.key_group),
            ((call.value_scale, call.value_zero), call.value_group),
        ):
            for part in parts:
                if part is not None and part.dim() == 4:
                    part[b, :, -(-used // group) :] = float("nan")
    return length.int() if form == "one, int32" else length


def add_positions(call: Call, width: int, rows: int = 500, size: float = 1.0) -> Call:
    """The call with random scores by position, which start elsewhere in each sequence."""
    batch, heads, queries, _ = call.query.shape
    call.position_query = torch.randn(batch, queries, heads, width).transpose(1, 2) * size
    call.position_table = torch.randn(rows, width)
    call.position_start = torch.randint(-20, rows, (batch,))
    return call
