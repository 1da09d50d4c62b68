"""What the commands share: a parser whose errors are one line, exit codes, and tables for a terminal."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers.utils import logging

from .errors import OctavoError, first_line

DEVICES = ("cpu", "cuda", "npu")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def run_script(work: Any, argv: list[str] | None) -> int:
    """Run a script's `work(argv)`; an error the user can mend is one line on stderr and exit code 1."""
    # transformers' report of a failed load fills a screen; the one line of the error names the tensor
    logging.set_verbosity_error()
    try:
        work(argv)
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"error: interrupted{error}", file=sys.stderr)
        return 130
    except Exception as error:  # a damaged file can make torch or transformers raise anything
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        print(f"error: {type(error).__name__}: {first_line(error)} (OCTAVO_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return 0


def aligned(rows: Sequence[Sequence[str]], texts: int | None = None) -> list[str]:
    """Rows of a table as lines.

    Args:
        rows: of as many cells each.
        texts: so many columns are texts, which begin below each other, and the others figures, which end so; None: all.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    count = len(widths) if texts is None else texts
    pads = [str.ljust if index < count else str.rjust for index in range(len(widths))]
    return ["  ".join(pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)).rstrip() for row in rows]
