"""The one exception that carries a message for the user."""

from collections.abc import Iterable
from difflib import get_close_matches

MOST_CHARACTERS = 900
"""Longest message: what it quotes may come out of a damaged file."""


def _one_line(message: str) -> str:
    lines = message.splitlines()
    if len(lines) > 1:
        message = " ".join(part.strip() for part in lines if part.strip())
    if len(message) <= MOST_CHARACTERS:
        return message
    return f"{message[: MOST_CHARACTERS // 2]} ... {message[-MOST_CHARACTERS // 2 :]}"


class OctavoError(ValueError):
    """Something the user can mend: one line that names the file or field and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def first_line(error: BaseException) -> str:
    """What an exception says, as one line (two joined, if the first only announces); its type if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that comes nearest to a mistyped or cut-off one, as the end of a message, or nothing."""
    names = list(known)
    found = get_close_matches(str(name), names, n=1)
    if not found and len(str(name)) > 2:
        found = [each for each in names if each.startswith(str(name))]
    return f"; did you mean {found[0]}?" if found else ""
