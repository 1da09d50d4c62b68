"""Damage of JSON files: values, keys, and the text itself."""

import json
from dataclasses import dataclass
from random import Random
from typing import Any

DEEP, LONG_NUMBER = "@deep@", "@long number@"
"""Stand for text that `json.dumps` does not write."""
_TEXTS = {f'"{DEEP}"': "[" * 20_000 + "]" * 20_000, f'"{LONG_NUMBER}"': "9" * 5_000}
MISSING = object()
"""The value of a key that was removed."""


@dataclass(frozen=True)
class JsonDamage:
    """A damaged JSON file.

    Attributes:
        text: what to write.
        what: in words.
        path: of what was changed, keys and numbers of items; empty if that is the text as a whole.
        value: what stands there now.
    """

    text: bytes
    what: str
    path: tuple[Any, ...] = ()
    value: Any = MISSING


def paths_of(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values within JSON data, containers included."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in items for path in ((*prefix, key), *paths_of(value, (*prefix, key)))]


def value_at(data: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        data = data[key]
    return data


def wrong_value(rng: Random, old: Any) -> Any:
    """Another value for a key: of another type, huge, negative, zero, null, nested, NaN, or a little off."""
    choices = [None, True, False, 0, -1, 1, 2, 3, 7, 64, 2**31, 2**63, -(2**63), 10**9, 10**6, 1e300, -0.5, 0.5]
    choices += [float("nan"), float("inf"), "", "0", "none", "é\u2028", "x" * 300, [], {}, [None], [[]], {"": 0}]
    choices += [DEEP, LONG_NUMBER, [old], {"value": old}, str(old)]
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        choices += [-old, old + 1, old - 1, old * 2, old // 2, float(old), 10**400]
    if isinstance(old, str):
        choices += [old.upper(), old[:-1], old + " ", "../" + old]
    if isinstance(old, list):
        choices += [old[:-1], old + old, old[::-1], list(map(str, old))]
    return rng.choice(choices)


def to_text(data: Any) -> bytes:
    """JSON as Python writes it (NaN and Infinity included), with the texts that stand-ins stand for."""
    text = json.dumps(data, indent=2)
    for stand_in, replacement in _TEXTS.items():
        text = text.replace(stand_in, replacement)
    return text.encode()


def _changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of data with another value at a path, or without it."""
    copy = json.loads(json.dumps(data))
    parent = value_at(copy, path[:-1])
    if value is MISSING:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return copy


def _damaged_text(rng: Random, text: bytes) -> JsonDamage:
    place = rng.randrange(len(text))
    ways = {
        "is empty": b"",
        f"ends at byte {place}": text[:place],
        "begins with a byte order mark": b"\xef\xbb\xbf" + text,
        "is UTF-16": text.decode().encode("utf-16"),
        f"has a byte that is no UTF-8 at {place}": text[:place] + b"\xff" + text[place:],
        f"has a zero byte at {place}": text[:place] + b"\0" + text[place:],
        "has garbage behind it": text + b"}{",
        "is twice in the file": text + text,
        "is a list of itself": b"[" + text + b"]",
        "is null": b"null",
        "is a number": b"17",
        "is binary": rng.randbytes(200),
        f"has bit {place % 8} of byte {place} flipped": _flipped(text, place, place % 8),
    }
    what = rng.choice(list(ways))
    return JsonDamage(ways[what], f"the text {what}")


def _flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def shown(value: Any) -> str:
    """A value, short."""
    text = "missing" if value is MISSING else repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def damage_json(rng: Random, text: bytes, root: tuple[Any, ...] = ()) -> JsonDamage:
    """Damage a JSON file somewhere below `root`."""
    data = json.loads(text)
    way = rng.choices(("value", "missing", "unknown", "renamed", "text"), (60, 14, 8, 6, 12 if not root else 0))[0]
    if way == "text":
        return _damaged_text(rng, text)
    paths = [(*root, *path) for path in paths_of(value_at(data, root))]
    path = rng.choice([*paths, root] if root and way != "unknown" else paths)
    old = value_at(data, path)
    name = ".".join(map(str, path))
    if way == "value":
        value = wrong_value(rng, old)
        return JsonDamage(to_text(_changed(data, path, value)), f"{name}: {shown(old)} -> {shown(value)}", path, value)
    if way == "missing":
        return JsonDamage(to_text(_changed(data, path, MISSING)), f"{name} is missing", path)
    parent = value_at(data, path[:-1])
    key = f"{path[-1]}_" if way == "renamed" else rng.choice(["unknown", "", "__class__", "self", "name_or_path"])
    if isinstance(parent, list):
        return JsonDamage(to_text(_changed(data, path[:-1], [*parent, key])), f"{name}: one more item", path[:-1], key)
    fresh = {key if k == path[-1] and way == "renamed" else k: v for k, v in parent.items()}
    if way == "renamed":
        what = f"{name} is renamed to {key!r}"
    else:
        what, fresh = f"beside {name} is {key!r}", {**fresh, key: wrong_value(rng, 1)}
        path = (*path[:-1], key)
    return JsonDamage(to_text(_changed(data, path[:-1], fresh) if len(path) > 1 else fresh), what, path)
