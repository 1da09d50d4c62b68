"""The one exception that carries a message for the user."""


class OctavoError(ValueError):
    """Something the user can mend: one line that names the file or field and the way out."""


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
