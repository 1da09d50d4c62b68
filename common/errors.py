"""The one exception that carries a message for the user."""


class OctavoError(ValueError):
    """Something the user can mend: one line that names the file or field and the way out."""


def first_line(error: BaseException) -> str:
    """What an exception says, as one line (two joined, if the first only announces); its type if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
