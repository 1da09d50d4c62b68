"""`octavo run DIR "some text"`: text that goes on, from a converted directory or a model with a quantized cache."""

import argparse

from ..common.command import OneLineParser
from ..common.errors import OctavoError
from ..generate import go_on
from ..place import add_model_flags, speaker_of
from ..sampling import add_sampling_flags, check_sampling


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take the model, the text, and how it goes on."""
    add_model_flags(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("prompt", nargs="?", default=argparse.SUPPRESS, metavar="PROMPT", help="text to continue")
    text.add_argument("--prompt", help=argparse.SUPPRESS)
    add_sampling_flags(parser)


def run(flags: argparse.Namespace) -> None:
    """Print how the text goes on, as it comes, and on stderr what it took.

    Raises:
        OctavoError: there is no such model, or none that can be run so; flags that do not go together.
    """
    if flags.prompt is None:
        raise OctavoError(f'give the text to continue: octavo run {flags.model_path} "Once upon"; octavo chat talks')
    check_sampling(flags)
    go_on(speaker_of(flags), flags)
