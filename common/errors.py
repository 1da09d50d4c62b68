"""The one exception that carries a message for the user."""


class OctavoError(ValueError):
    """Something the user can mend: one line that names the file or field and the way out."""
