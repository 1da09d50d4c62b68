"""What the commands share: a parser whose errors are one line, exit codes, and tables for a terminal."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from .errors import OctavoError, did_you_mean, first_line

DEVICES = ("cpu", "cuda", "npu")
PIPE_CLOSED = 141
"""Exit code where nobody reads what is printed any more: what shells tell of a process that SIGPIPE ends."""


class DefaultsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Help that says what is taken where a flag is not given, if that is anything."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_nothing = action.default in (None, False, "", "{}") or "default" in (action.help or "")
        return action.help if is_nothing else super()._get_help_string(action)


class _AllHelp(argparse.Action):
    """Prints all flags, and ends the process."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.first = None
        parser.print_help()
        parser.exit()


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the flag or the value that was probably meant.

    Attributes:
        first: names of the values whose flags `--help` shows; None: those of all.
    """

    first: set[str] | None = None
    _place: tuple[str, str] | None = None
    _first_word: argparse.Action | None = None

    def add_place(self, name: str, about: str, flag: str = "--model_path") -> None:
        """Take one directory or model as the first word, or by the flag that the scripts have for it; one is needed.

        Args:
            name: what the first word is called in the help.
            flag: whose name, without dashes, is that of the value.
        """
        group, self._place = self.add_mutually_exclusive_group(), (name, flag)
        self._first_word = group.add_argument(flag[2:], nargs="?", default=argparse.SUPPRESS, metavar=name, help=about)
        group.add_argument(flag, metavar=name, help=argparse.SUPPRESS)

    def show_first(self, *names: str) -> None:
        """Let `--help` show the flags of these values alone, and `--help-all` all of them."""
        self.add_argument(
            "--help-all", action=_AllHelp, nargs=0, default=argparse.SUPPRESS, help="list the other flags too"
        )
        self.first = {*names, "help", "help_all"}

    def format_help(self) -> str:
        """As in `ArgumentParser`, of the flags that are to be shown."""
        hidden = [action for action in self._actions if self.first is not None and action.dest not in self.first]
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in `ArgumentParser`; a flag that there is not is told beside the one that comes nearest."""
        words = sys.argv[1:] if args is None else list(args)
        texts = [action for action in self._actions if not action.option_strings and action is not self._first_word]
        if texts and self._first_word in self._actions and gives(words, self._place[1]):
            self._actions.remove(self._first_word)  # so that the first word is the text
        flags, unknown = self.parse_known_args(words, namespace)
        if unknown:
            given = unknown[0].partition("=")[0]
            nearest = did_you_mean(given, self._option_string_actions) if given.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest}")
        if self._place is not None and getattr(flags, self._place[1].removeprefix("--"), None) is None:
            self.error("give {}, as the first word or with {}".format(*self._place))
        return flags

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = action.choices
        if choices is not None and value not in choices:
            listed = ", ".join(str(choice) or '""' for choice in choices)
            nearest = did_you_mean(value, map(str, choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {listed}){nearest}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def gives(words: Sequence[str], flag: str) -> bool:
    """Whether the words of a command line give a flag."""
    return any(word == flag or word.startswith(f"{flag}=") for word in words)


def until_pipe_closes(work: Callable[[], int]) -> int:
    """The exit code of some work, which ends quietly with `PIPE_CLOSED` once nobody reads what it prints."""
    try:
        code = work()
    except BrokenPipeError:  # stdout or stderr: no other pipes are written to
        _is_unread()
        return PIPE_CLOSED
    except SystemExit:  # behind help
        if _is_unread():
            return PIPE_CLOSED
        raise
    return PIPE_CLOSED if _is_unread() else code


def _is_unread() -> bool:
    """Whether nobody reads stdout or stderr any more; what is left for it goes nowhere then, also when Python exits."""
    found = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            found = True
    return found


def run_script(work: Any, argv: list[str] | None) -> int:
    """Run a script's `work(argv)`; an error the user can mend is one line on stderr and exit code 1."""

    def done() -> int:
        work(argv)
        return 0

    try:
        # transformers' report of a failed load fills a screen; the one line of the error names the tensor
        import_module("transformers.utils.logging").set_verbosity_error()
        return until_pipe_closes(done)
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
