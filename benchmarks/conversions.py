"""Conversions as the scripts of `models/` make them, without what those print."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from octavo.common.architecture import Architecture
from octavo.common.convert.api import main

INTERRUPTED = 130


def convert_quietly(architecture: Architecture, source: Path, target: Path, flags: Sequence[str]) -> None:
    """Convert the checkpoint in `source` into the directory `target`.

    Raises:
        RuntimeError: the script failed; its error line.
    """
    said = io.StringIO()
    argv = ["--model_path", str(source), "--save_directory", str(target), *flags]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(architecture, argv)
        except SystemExit as refused:
            code = refused.code
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(said.getvalue().strip().splitlines()[-1])
