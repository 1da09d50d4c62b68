"""The command `octavo`, which is `python -m octavo` too."""

import argparse
import sys
from importlib import import_module

from .commands import COMMANDS
from .common.command import OneLineParser, aligned, gives, run_script, until_pipe_closes
from .common.errors import OctavoError, did_you_mean

_PLACE = "--model_path"


def overview() -> str:
    """What `octavo --help` prints."""
    rows = [(f"  {name}", about) for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: octavo COMMAND ...",
            "",
            "Quantized KV caches, attention and linears for models of transformers.",
            "",
            *aligned(rows),
            "",
            "octavo COMMAND --help lists the flags of one.",
        ]
    )


def _run(name: str, words: list[str]) -> None:
    """Let a subcommand parse its words, and run."""
    command = import_module(f".commands.{name}", __package__)
    parser = OneLineParser(prog=f"octavo {name}", description=_sentence(COMMANDS[name]), allow_abbrev=False)
    command.add_flags(parser)
    flags = parser.parse_args(words)
    try:
        command.run(argparse.Namespace(**vars(flags), words=words))
    except OctavoError as error:
        if gives(words, _PLACE):
            raise
        raise OctavoError(str(error).removeprefix(f"{_PLACE} ")) from None  # it was given as the first word


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return until_pipe_closes(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"octavo {import_module('.common.runtime.version', __package__).VERSION}")
        return 0
    if name not in COMMANDS:
        nearest = did_you_mean(name, COMMANDS)
        print(f"octavo: error: {name}: no such command{nearest} (--help lists them)", file=sys.stderr)
        return 2
    return run_script(lambda rest: _run(name, rest), words)


if __name__ == "__main__":
    sys.exit(main())
