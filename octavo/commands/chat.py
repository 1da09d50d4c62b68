"""`octavo chat DIR`: a conversation, from a converted directory or a model with a quantized cache."""

import argparse

from ..common.command import OneLineParser
from ..generate import add_system_flag, chat
from ..place import add_model_flags, speaker_of
from ..sampling import add_sampling_flags, check_sampling


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take the model, and how it answers."""
    add_model_flags(parser)
    parser.add_argument("--prompt", help="the first message")
    add_system_flag(parser)
    add_sampling_flags(parser)


def run(flags: argparse.Namespace) -> None:
    """Answer messages from stdin until an empty line.

    Raises:
        OctavoError: there is no such model, or none that can be run so; it has no chat template, or one without
            a system prompt.
    """
    check_sampling(flags)
    chat(speaker_of(flags), flags)
