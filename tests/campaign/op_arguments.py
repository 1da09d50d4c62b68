"""Random arguments of the ops, and damage of them.

B batch, G KV heads, H query heads, Q queries, S stored tokens, C capacity, D head_dim, N output and K input channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from octavo.ops.shared.codes import stored_width

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (*FLOATS, *CODES, torch.float64, torch.int32, torch.int64, torch.bool)
NUMBERS = (-1, 0, 1, 2, 3, 5, 8, 31, 2**31, 2**62, 2**63 - 1, -(2**63))
CAPACITY = 24


@dataclass
class Arguments:
    """Arguments of a call by name; `written` names those that it overwrites, as views of storages `owners`."""

    values: dict[str, Any]
    written: tuple[str, ...] = ()
    owners: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def storages(self) -> list[torch.Tensor]:
        """All of what a call may write into, and what lies around it."""
        return [self.owners[name] for name in self.written if name in self.owners]

    def copy(self) -> "Arguments":
        """The same with storages of their own, and views of them."""
        values, owners = dict(self.values), {}
        for name in self.storages_by_name():
            owner, view = self.owners[name], self.values[name]
            owners[name] = owner.clone()
            values[name] = owners[name].as_strided(view.shape, view.stride(), view.storage_offset())
        return Arguments(values, self.written, owners)

    def storages_by_name(self) -> list[str]:
        """Names of what is overwritten."""
        return [name for name in self.written if isinstance(self.values.get(name), torch.Tensor)]


def _storage(arguments: Arguments, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor to write into, with as many elements before and behind it, which nobody may touch."""
    count = torch.Size(shape).numel()
    owner = torch.randint(0, 100, (3 * count,)).to(torch.uint8 if dtype.itemsize == 1 else dtype)
    owner = owner.view(dtype) if dtype.itemsize == 1 else owner
    arguments.owners[name] = owner
    arguments.values[name] = owner[count : 2 * count].view(shape)
    arguments.written = (*arguments.written, name)
    return arguments.values[name]


def _floats(rng: Random, *shape: int) -> torch.Tensor:
    """Normal numbers of some float dtype, now and then a view whose dimensions are swapped."""
    dtype = rng.choice(FLOATS)
    if len(shape) == 4 and rng.random() < 0.5:
        return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
    return torch.randn(shape).to(dtype)


def _codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random codes; those of fp8 are finite."""
    return torch.randint(0, 120, shape, dtype=torch.uint8).view(dtype)


def _maybe(rng: Random, make: Callable[[], Any]) -> Any:
    return make() if rng.random() < 0.5 else None


def _format(rng: Random) -> tuple[torch.dtype, int]:
    return rng.choice([(torch.int8, 4), *((torch.uint8, bits) for bits in (2, 3, 4)), *((d, 4) for d in CODES[2:])])


def _values_to_encode(rng: Random, arguments: Arguments) -> tuple[int, int, int, int]:
    """x, position, bits and codes of an encoding; returns B, G, S, D."""
    batch, groups, tokens, width = rng.randint(1, 2), rng.randint(1, 3), rng.randint(0, 9), 8 * rng.randint(1, 9)
    dtype, bits = _format(rng)
    has_position = rng.random() < 0.5
    rows = CAPACITY if has_position else tokens
    _storage(arguments, "codes", (batch, groups, rows, stored_width(width, dtype, bits)), dtype)
    position = torch.tensor([rng.randint(0, CAPACITY - tokens)]) if has_position else None
    arguments.values |= {"x": _floats(rng, batch, groups, tokens, width), "bits": bits, "position": position}
    return batch, groups, tokens, width


def encode(rng: Random) -> Arguments:
    """Of `encode`."""
    arguments = Arguments({})
    _, groups, _, width = _values_to_encode(rng, arguments)
    shape = rng.choice([(groups, 1, width), (groups, 1, 1), (groups, 1, width // 4), ()])
    is_packed = arguments.values["codes"].dtype == torch.uint8
    levels = torch.randn(2 ** arguments.values["bits"]).sort().values if is_packed and rng.random() < 0.3 else None
    zero = _maybe(rng, lambda: torch.randn(shape))
    arguments.values |= {"scale": torch.rand(shape) * 0.1 + 0.02, "zero": zero, "levels": levels}
    return arguments


def encode_token(rng: Random) -> Arguments:
    """Of `encode_token`."""
    arguments = Arguments({})
    batch, groups, _, width = _values_to_encode(rng, arguments)
    shape = (batch, groups, arguments.values["codes"].shape[2], rng.choice((1, width // 8, width // 4)))
    _storage(arguments, "scale", shape, rng.choice(FLOATS[:2]))
    arguments.values["zero"] = None
    if rng.random() < 0.5:
        _storage(arguments, "zero", shape, rng.choice(FLOATS[:2]))
    return arguments


def decode(rng: Random) -> Arguments:
    """Of `decode`."""
    batch, groups, tokens, width = rng.randint(1, 2), rng.randint(1, 3), rng.randint(0, 20), 8 * rng.randint(1, 9)
    (dtype, bits), group = _format(rng), rng.choice((1, 1, 4, 32))
    rows = -(-tokens // group)
    shape = rng.choice([(groups, 1, width), (batch, groups, rows, 1), (batch, groups, rows, width // 4), (1,)])
    levels = torch.randn(2**bits).sort().values if dtype == torch.uint8 and rng.random() < 0.3 else None
    return Arguments({
        "codes": _codes(dtype, batch, groups, tokens, stored_width(width, dtype, bits)),
        "scale": _maybe(rng, lambda: torch.rand(shape)), "zero": _maybe(rng, lambda: torch.randn(shape)),
        "token_group": group, "bits": bits, "levels": levels,
    })  # fmt: skip


def _stored(rng: Random, batch: int, groups: int, keys: int, width: int, name: str) -> dict[str, Any]:
    """Codes of K or V with their scale, zero and group."""
    dtype, group = rng.choice((*CODES, torch.float32)), rng.choice((1, 1, 1, 4, 16))
    if dtype == torch.float32:
        codes: torch.Tensor = torch.randn(batch, groups, keys, width)
        return {name: codes, f"{name}_scale": None, f"{name}_zero": None}
    rows = -(-keys // group)
    shape = rng.choice([(groups, 1, width), (groups, 1, 1), (batch, groups, rows, 1), (batch, groups, rows, width)])
    zero = _maybe(rng, lambda: torch.randn(shape))
    columns = stored_width(width, dtype)
    return {
        name: _codes(dtype, batch, groups, keys, columns),
        f"{name}_scale": torch.rand(shape) * 0.02,
        f"{name}_zero": zero,
        f"{name}_group": group,
    }


def attention(rng: Random) -> Arguments:
    """Of `attention` and `attention_lse`."""
    batch, groups, ratio = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 3)
    queries, keys, width = rng.choice((0, 1, 1, 2, 5, 17)), rng.choice((0, 1, 3, 16, 40, 70)), 8 * rng.randint(1, 8)
    heads = groups * ratio
    values = {
        "query": _floats(rng, batch, heads, queries, width),
        **_stored(rng, batch, groups, keys, width, "key"),
        **_stored(rng, batch, groups, keys, width, "value"),
        "query_scale": None, "mask": None, "scaling": width**-0.5, "causal": rng.random() < 0.7,
        "window": rng.choice((0, 0, 0, 1, 7)), "length": None,
    }  # fmt: skip
    if rng.random() < 0.3:
        values["query_scale"] = torch.rand(heads, 1, 1) * 0.02 + 0.01
    if rng.random() < 0.3:
        seen = torch.rand(batch, rng.choice((1, heads)), queries, keys) < 0.7
        values["mask"] = rng.choice((seen, torch.randn(seen.shape)))
    if rng.random() < 0.3:
        values["length"] = torch.tensor([rng.randint(0, keys) for _ in range(rng.choice((1, batch)))])
    if rng.random() < 0.2:
        table = torch.randn(rng.randint(1, 50), 4)
        values |= {"position_query": _floats(rng, batch, heads, queries, 4), "position_table": table,
                   "position_start": torch.tensor([rng.randint(-5, 60)])}  # fmt: skip
    return Arguments(values)


def _linear(rng: Random) -> tuple[int, int, torch.Tensor]:
    """N, K and x."""
    columns, depth = rng.choice((1, 3, 16, 33)), 32 * rng.randint(1, 5)
    return columns, depth, torch.randn(*rng.choice([(1,), (5,), (2, 3), (0,), ()]), depth).to(rng.choice(FLOATS))


def linear_w8a8(rng: Random) -> Arguments:
    """Of `linear_w8a8`."""
    columns, depth, x = _linear(rng)
    return Arguments({
        "x": x, "weight": torch.randint(-128, 128, (columns, depth), dtype=torch.int8),
        "input_scale": torch.rand(1) * 0.05 + 0.005, "input_offset": torch.randint(-50, 50, (1,)).float(),
        "quant_bias": torch.randint(-10000, 10000, (columns,), dtype=torch.int32), "deq_scale": torch.rand(columns),
    })  # fmt: skip


def _bias(rng: Random, columns: int) -> torch.Tensor | None:
    return _maybe(rng, lambda: torch.randn(columns).to(rng.choice(FLOATS)))


def linear_w8a8_dynamic(rng: Random) -> Arguments:
    """Of `linear_w8a8_dynamic`."""
    columns, depth, x = _linear(rng)
    weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)
    return Arguments({"x": x, "weight": weight, "weight_scale": torch.rand(columns), "bias": _bias(rng, columns)})


def linear_weight_only(rng: Random) -> Arguments:
    """Of `linear_weight_only`."""
    columns, depth, x = _linear(rng)
    weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)
    if rng.random() < 0.5:
        weight = torch.randint(0, 256, (columns, depth // 2), dtype=torch.uint8)
    groups, dtype = rng.choice((1, depth // 32)), rng.choice(FLOATS[:2])
    scale = (torch.rand(columns, groups) * 0.02 + 0.001).to(dtype)
    zero = _maybe(rng, lambda: torch.randn(columns, groups).to(dtype))
    return Arguments(
        {"x": x, "weight": weight, "weight_scale": scale, "weight_zero": zero, "bias": _bias(rng, columns)}
    )


def linear_grouped(rng: Random) -> Arguments:
    """Of `linear_grouped`."""
    found = linear_weight_only(rng).values
    return Arguments({**found, "group": found["x"].shape[-1] // found["weight_scale"].shape[1]})


def linear_fp8(rng: Random) -> Arguments:
    """Of `linear_fp8`."""
    columns, depth, x = _linear(rng)
    return Arguments({
        "x": x, "weight": _codes(torch.float8_e4m3fn, columns, depth),
        "weight_scale": torch.rand(rng.choice((1, columns))) * 0.01 + 0.001,
        "input_scale": _maybe(rng, lambda: torch.rand(1) * 0.05 + 0.001), "bias": _bias(rng, columns),
    })  # fmt: skip


def _special(rng: Random, tensor: torch.Tensor) -> torch.Tensor:
    """NaN, Inf, 0 or a very large or small number somewhere."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if tensor.numel() and tensor.dtype in (*FLOATS, torch.float64):
        value = rng.choice((float("nan"), float("inf"), -float("inf"), 0.0, 3e38, -1.0, 1e-45, 6e4))
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
    return tensor


def _resized(rng: Random, tensor: torch.Tensor) -> torch.Tensor:
    """A dimension longer, shorter, empty, missing or more."""
    if not tensor.dim():
        return tensor[None].repeat(3)
    dim = rng.randrange(tensor.dim())
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: torch.cat((tensor.view(torch.uint8), tensor.view(torch.uint8)), dim).view(tensor.dtype),
        lambda: tensor.narrow(dim, 0, max(0, tensor.shape[dim] - 1)),
        lambda: tensor.narrow(dim, 0, 0),
        lambda: tensor.narrow(dim, 0, min(1, tensor.shape[dim])),
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: tensor.transpose(0, -1),
        lambda: tensor.select(dim, 0) if tensor.shape[dim] else tensor,
    ]
    return rng.choice(ways)()


def _strided(rng: Random, tensor: torch.Tensor) -> torch.Tensor:
    """The same values, which lie elsewhere: with gaps, or the other way round."""
    if not tensor.dim():
        return tensor
    wide = tensor[..., None].expand(*tensor.shape, 2).clone()[..., 0]
    return rng.choice((wide, tensor.transpose(0, -1).contiguous().transpose(0, -1)))


def damage_arguments(rng: Random, arguments: Arguments) -> str:
    """Change one argument; in words, what was done."""
    values = arguments.values
    name = rng.choice([name for name, value in values.items() if value is not None])
    value = values[name]
    if not isinstance(value, torch.Tensor):
        values[name] = rng.choice((float("nan"), float("inf"), 0.0, -1.0)) if isinstance(value, float) else (
            rng.choice(NUMBERS) if not isinstance(value, bool) else not value
        )  # fmt: skip
        return f"{name} {value} -> {values[name]}"
    is_number = name in ("position", "length", "position_start")
    way = rng.choice(("number", "number", "shape", "dtype")) if is_number else rng.choice(
        ("shape", "shape", "dtype", "special", "strided", "missing")
    )  # fmt: skip
    if way == "special" and name == "levels":  # which are to ascend, and no op looks whether they do
        way = "strided"
    if way == "number":
        values[name] = torch.full_like(value, rng.choice(NUMBERS))
        return f"{name} {value.tolist()} -> {values[name].tolist()}"
    if way == "missing":
        values[name] = None if _may_be_missing(name, values) else value[:0] if value.dim() else value
        return f"{name} is missing"
    if way == "dtype":
        dtype = rng.choice([dtype for dtype in DTYPES if dtype != value.dtype])
        changed = value.to(dtype)
    else:
        changed = {"shape": _resized, "special": _special, "strided": _strided}[way](rng, value)
    values[name] = changed
    if name in arguments.owners and changed.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
        arguments.owners[name] = changed.as_strided(
            (changed.untyped_storage().nbytes() // changed.element_size(),), (1,), 0
        )
    return f"{name}: {way}"


def _may_be_missing(name: str, values: dict[str, Any]) -> bool:
    """Whether an op takes None for an argument."""
    if name == "input_scale":
        return "input_offset" not in values
    optional = ("zero", "cos", "sin", "position", "levels", "bias", "weight_zero", "length", "mask")
    return name in optional or name.startswith(("key_", "value_", "position_", "query_"))


def shown(arguments: Arguments) -> str:
    """Arguments in words: dtypes and shapes."""
    parts = [
        f"{name} {str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, torch.Tensor) else f"{name} {value}"
        for name, value in arguments.values.items()
        if value is not None
    ]
    return ", ".join(parts)
