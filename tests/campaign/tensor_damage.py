"""Damage of the tensors of a valid safetensors file: values, names, shapes, dtypes."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import torch

from .safetensors_file import Stored
from .trial import Expect

POSITIVE = ("scale", "deq_scale", ".max", ".radius", "mean_abs", "mean_square")
"""Ends of names of tensors of positive numbers."""
WITHIN_CODES = ("input_offset", "kv_cache_offset", "weight_offset")
"""Ends of names of float tensors whose values are zero points, within the range of their codes."""
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"))


@dataclass(frozen=True)
class TensorDamage:
    """What became of a file's tensors, in words, and what a load must make of it."""

    tensors: list[Stored]
    what: str
    expect: Expect = Expect.EQUAL


def _is_positive(name: str) -> bool:
    return name.endswith(POSITIVE)


def _with(tensors: list[Stored], old: Stored, *new: Stored) -> list[Stored]:
    return [part for tensor in tensors for part in (new if tensor is old else (tensor,))]


def _values(stored: Stored) -> torch.Tensor:
    """The numbers of a tensor in float64: those of `deq_scale` in int64 are float32 in their low halves."""
    if stored.dtype == "I64" and stored.name.endswith("deq_scale"):
        return torch.tensor([struct.unpack("<f", stored.data[i : i + 4])[0] for i in range(0, len(stored.data), 8)])
    return stored.tensor().double()


def _put(stored: Stored, place: int, value: float) -> Stored:
    """A tensor with another number at a place."""
    if stored.dtype == "I64" and stored.name.endswith("deq_scale"):
        half = struct.pack("<f", value)
        return replace(stored, data=stored.data[: 8 * place] + half + stored.data[8 * place + 4 :])
    tensor = stored.tensor().clone()
    if stored.dtype.startswith("F8"):
        tensor.view(torch.uint8).flatten()[place] = 0x7F  # its one NaN
    else:
        tensor.view(-1)[place] = value
    return stored.holding(tensor)


def _count(stored: Stored) -> int:
    return max(1, stored.tensor().numel())


def no_number(rng: Random, tensors: list[Stored]) -> TensorDamage:
    """NaN or Inf in any float tensor, matrices and embeddings included."""
    stored = rng.choice([t for t in tensors if t.is_float or t.name.endswith("deq_scale")])
    value, place = rng.choice(NO_NUMBERS), rng.randrange(_count(stored))
    value = float("nan") if stored.dtype.startswith("F8") else value
    return TensorDamage(
        _with(tensors, stored, _put(stored, place, value)), f"{stored.name}[{place}] is {value}", Expect.REFUSAL
    )


def no_scale(rng: Random, tensors: list[Stored]) -> TensorDamage | None:
    """A scale that is 0 or negative."""
    scales = [t for t in tensors if _is_positive(t.name)]
    if not scales:
        return None
    stored = rng.choice(scales)
    value, place = rng.choice([0.0, -0.0, -1.0]), rng.randrange(_count(stored))
    may_be_zero = value == 0 and not stored.name.endswith("scale")
    what = f"{stored.name}[{place}] is {value}"
    return TensorDamage(
        _with(tensors, stored, _put(stored, place, value)), what, Expect.ANYTHING if may_be_zero else Expect.REFUSAL
    )


def no_code(rng: Random, tensors: list[Stored]) -> TensorDamage | None:
    """A zero point or a column out of its range, levels that do not ascend, a `deq_scale` of more than 32 bits."""
    ends = (*WITHIN_CODES, "outlier_columns", "_levels", "deq_scale")
    fitting = [t for t in tensors if t.name.endswith(ends) and (t.dtype == "I64" or not t.name.endswith("deq_scale"))]
    if not fitting:
        return None
    stored = rng.choice(fitting)
    place = rng.randrange(_count(stored))
    if stored.name.endswith("deq_scale"):
        data = bytearray(stored.data)
        data[8 * place + 4 + rng.randrange(4)] ^= 1 << rng.randrange(8)
        changed, what = replace(stored, data=bytes(data)), f"{stored.name}[{place}] has more than 32 bits"
    elif stored.name.endswith("_levels"):
        place = rng.randrange(_count(stored) - 1)
        value = float(_values(stored)[place + 1]) + 1.0
        changed, what = _put(stored, place, value), f"{stored.name}[{place}] is above the next"
    else:
        value = rng.choice([1e6, -1e6, 2.0**30])
        value = int(value) if stored.dtype == "I32" else value
        changed, what = _put(stored, place, value), f"{stored.name}[{place}] is {value}"
    return TensorDamage(_with(tensors, stored, changed), what, Expect.REFUSAL)


def flipped_bit(rng: Random, tensors: list[Stored]) -> TensorDamage:
    """A bit of any tensor: no check can know of it where a float stays finite and a scale positive."""
    stored = rng.choice([t for t in tensors if t.data])
    place = rng.randrange(len(stored.data))
    bit = rng.choice([7, 6, rng.randrange(8)])
    data = bytearray(stored.data)
    data[place] ^= 1 << bit
    changed = replace(stored, data=bytes(data))
    values = _values(changed)
    is_wrong = not torch.isfinite(values).all() or (stored.name.endswith("scale") and not (values > 0).all())
    if stored.dtype == "I64" and place % 8 >= 4:
        is_wrong = True
    what = f"{stored.name} ({stored.dtype}): bit {bit} of byte {place} is flipped"
    return TensorDamage(_with(tensors, stored, changed), what, Expect.REFUSAL if is_wrong else Expect.ANYTHING)


def missing(rng: Random, tensors: list[Stored]) -> TensorDamage:
    """A tensor that is not there."""
    stored = rng.choice(tensors)
    return TensorDamage(_with(tensors, stored), f"{stored.name} is missing")


def renamed(rng: Random, tensors: list[Stored]) -> TensorDamage:
    """A tensor under another name, that of another layer or module among them."""
    stored = rng.choice(tensors)
    names = [f"{stored.name}_", f"x.{stored.name}", stored.name.replace(".0.", ".7."), stored.name.replace("k", "q", 1)]
    name = rng.choice([n for n in names if n != stored.name])
    fresh = replace(stored, name=name)
    return TensorDamage(_with(tensors, stored, fresh), f"{stored.name} is called {name}")


def added(rng: Random, tensors: list[Stored]) -> TensorDamage:
    """A tensor too many: a copy under a new name, or a second one of a name that there is."""
    stored = rng.choice(tensors)
    name = rng.choice([f"{stored.name}.copy", stored.name.replace(".1.", ".2."), "extra.weight", "model.extra"])
    fresh = replace(stored, name=name)
    others = [t for t in tensors if t.name != name]
    return TensorDamage([*others, fresh], f"{stored.name} is there as {name} too")


def reshaped(rng: Random, tensors: list[Stored]) -> TensorDamage | None:
    """A tensor transposed, flattened, with one dimension more, or cut."""
    stored = rng.choice(tensors)
    tensor = stored.tensor()
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "flat": lambda: tensor.flatten(),
        "with one dimension more": lambda: tensor[None],
        "a row shorter": lambda: tensor[:-1],
        "without elements": lambda: tensor[:0],
        "twice as long": lambda: torch.cat((tensor, tensor)) if tensor.element_size() > 1 else tensor.repeat(2, 1),
    }
    if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]:
        ways |= {"transposed": lambda: tensor.T}
    what = rng.choice(list(ways))
    changed = stored.holding(ways[what]())
    return None if changed == stored else TensorDamage(_with(tensors, stored, changed), f"{stored.name} is {what}")


def retyped(rng: Random, tensors: list[Stored]) -> TensorDamage:
    """A tensor with the same numbers, as far as they go, in another dtype."""
    stored = rng.choice([t for t in tensors if not t.dtype.startswith("F8")])
    dtypes = (torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8)
    dtype = rng.choice([d for d in dtypes if d != stored.tensor().dtype])
    changed = stored.holding(stored.tensor().to(dtype))
    return TensorDamage(_with(tensors, stored, changed), f"{stored.name}: {stored.dtype} becomes {changed.dtype}")


WAYS = (
    no_number,
    no_number,
    no_scale,
    no_code,
    flipped_bit,
    flipped_bit,
    missing,
    renamed,
    added,
    reshaped,
    reshaped,
    retyped,
)


def damage_tensors(rng: Random, tensors: list[Stored]) -> TensorDamage:
    """Damage tensors in one of many ways."""
    while True:
        damaged = rng.choice(WAYS)(rng, tensors)
        if damaged is not None:
            return damaged
