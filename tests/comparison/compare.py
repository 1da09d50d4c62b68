"""The differences of two records."""

import itertools
from collections.abc import Iterator
from typing import Any

from .record import Record

LONGEST = 100
"""Characters of a value that a line shows."""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def differences(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """A line for each value that differs or that one has alone, with the names that lead to it."""
    if isinstance(first, dict) and isinstance(second, dict):
        for name in [*first, *(name for name in second if name not in first)]:
            inner = f"{where}: {name}" if where else name
            if name not in first or name not in second:
                yield f"{inner}: only in the {'second' if name not in first else 'first'}"
            else:
                yield from differences(first[name], second[name], inner)
    elif isinstance(first, list) and isinstance(second, list):
        if len(first) != len(second):
            yield f"{where}: {len(first)} lines or values -> {len(second)}, the first that differs:"
        pairs = enumerate(zip(first, second, strict=False))
        found = (line for index, pair in pairs for line in differences(*pair, f"{where}[{index}]"))
        yield from found if len(first) == len(second) else itertools.islice(found, 1)
    elif first != second or type(first) is not type(second):
        yield f"{where}: {_short(first)} -> {_short(second)}"


def compare(first: Record, second: Record) -> list[str]:
    """The lines on two records; none if they are equal."""
    named = ({**record, **record["conversions"]} for record in (first, second))
    one, other = ({name: part for name, part in record.items() if name != "conversions"} for record in named)
    return list(differences(one, other))


def extent(first: Record, second: Record) -> str:
    """How much of two records was compared."""
    names = first["conversions"].keys() & second["conversions"].keys()
    both = [(first["conversions"][name], second["conversions"][name]) for name in names]

    def count(*parts: str) -> int:
        return sum(len(one.get(part, {}).keys() & other.get(part, {}).keys()) for one, other in both for part in parts)

    return (
        f"{len(both)} conversions, {count('tensors', 'statistics')} tensors, {count('files')} files, "
        f"{count('logits', 'logits of the stock model')} logits"
    )
