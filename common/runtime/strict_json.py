"""JSON that may have come to harm on its way: what is wrong with it is said in one line."""

import json
from typing import Any

MOST_NESTED = 32
"""Objects and lists in one another, at most, in the files of a checkpoint."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} stands there twice")
    return data


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def check_nesting(data: Any) -> None:
    """Raise a `ValueError` if plain data is nested deeper than any that a checkpoint needs."""
    level = [data]
    for _ in range(MOST_NESTED):
        level = [
            part
            for value in level
            if isinstance(value, (dict, list))
            for part in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def parse_json(text: str, is_strict: bool = True) -> Any:
    """Plain data out of JSON.

    Args:
        text: JSON.
        is_strict: whether names that stand twice in an object, NaN and Infinity are refused.

    Raises:
        ValueError: it is no JSON, or nested too deeply; the message is one line.
    """
    hooks = {"object_pairs_hook": _without_duplicates, "parse_constant": _refuse_constant} if is_strict else {}
    try:
        data = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_nesting(data)
    return data
