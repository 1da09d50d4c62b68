"""The flags that say what is measured, of every command that measures."""

import argparse
import dataclasses
from pathlib import Path

from ..common.command import DEVICES, OneLineParser
from ..common.convert.calibration.texts import default_texts
from ..common.convert.flag_values import count, positive
from ..common.errors import OctavoError, first_line
from .evaluating import Plan
from .recall import TASKS

_OWN_TEXT = (
    "text: the one that comes with Octavo, on which conversions calibrate unless told otherwise; --eval_file FILE "
    "gives one of your own"
)


def add_measurement_flags(parser: OneLineParser, with_harness: bool = False) -> None:
    """Let a parser take what is measured, and where.

    Args:
        with_harness: whether tasks of lm-eval can be named, too.
    """
    add = parser.add_argument
    add("--eval_file", type=Path, metavar="FILE", help="text to score on (default: one that comes with Octavo)")
    add("--windows", type=count, default=2, metavar="N", help="windows of the text (default 2; 0: no text)")
    add("--length", type=count, default=2048, metavar="N", help="tokens of a window (default 2048)")
    add(
        "--last",
        type=count,
        default=0,
        metavar="N",
        help="score the predictions of the last N tokens of each window alone",
    )
    if with_harness:
        about = f"{', '.join(TASKS)}: what is recalled (default key-value); FILE.yaml or names: tasks of lm-eval"
        add("--tasks", nargs="*", metavar="TASK", default=["key-value"], help=about)
        add("--limit", type=positive, metavar="N", help="ask the first N questions of each task of lm-eval")
    else:
        about = "what is recalled (default key-value)"
        add("--tasks", nargs="*", choices=list(TASKS), default=["key-value"], help=about)
    add("--lengths", nargs="+", type=count, default=[1024], metavar="N", help="tokens of its prompts (default 1024)")
    add("--trials", type=count, default=20, metavar="N", help="questions of each task and length (default 20)")
    add("--written", type=count, default=64, metavar="N", help="tokens to write greedily (default 64; 0: none)")
    add("--prompts", type=count, default=4, metavar="N", help="prompts to write behind (default 4)")
    add("--sampled", action="store_true", help="sample as many texts, too, with the same random numbers for all models")
    add("--device_type", choices=DEVICES, default="cpu", help="where to run (default cpu)")


def _text(flags: argparse.Namespace) -> str | None:
    if not flags.windows:
        return None
    if flags.eval_file is None:
        return "\n".join(default_texts())
    return read_text("--eval_file", flags.eval_file)


def read_text(flag: str, file: Path) -> str:
    """The text of a file that a flag names.

    Raises:
        OctavoError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OctavoError(f"{flag} {file}: cannot be read ({first_line(error)})") from None


def plan_of(flags: argparse.Namespace) -> Plan:
    """What the flags ask for.

    Raises:
        OctavoError: they ask for nothing that can be measured, or their text cannot be read.
    """
    for name in ("trials", "prompts"):
        if getattr(flags, name) < 1:
            raise OctavoError(f"--{name} 0: give 1 or more")
    if flags.windows and flags.length < 2:
        raise OctavoError(f"--length {flags.length}: nothing is predicted; give 2 or more")
    if flags.windows and flags.last >= flags.length:
        raise OctavoError(f"--last {flags.last}: of --length {flags.length} at most {flags.length - 1} are predicted")
    if not flags.windows and flags.eval_file is not None:
        raise OctavoError(f"--eval_file {flags.eval_file}: is not read with --windows 0; leave one of them out")
    fields = {field.name for field in dataclasses.fields(Plan)} - {"text", "tasks", "lengths"}
    tasks, lengths = (
        tuple(name for name in dict.fromkeys(flags.tasks) if name in TASKS),
        tuple(sorted(set(flags.lengths))),
    )
    return Plan(_text(flags), tasks=tasks, lengths=lengths, **{name: getattr(flags, name) for name in fields})


def conditions_of(plan: Plan, is_own_text: bool) -> list[str]:
    """What was measured on what, in lines.

    Args:
        is_own_text: whether the text is the one that comes with Octavo.
    """
    lines = []
    if plan.text is not None:
        part = f", the last {plan.last:,} of each scored" if plan.last else ""
        size = f"{plan.windows} window{'s' * (plan.windows > 1)} of {plan.length:,} tokens"
        lines.append(f"KL(float || model) in nats, perplexity and top-1: {size}{part}")
        if is_own_text:
            lines.append(_OWN_TEXT)
    if plan.text is not None and plan.written:
        lines.append(f"as float for: tokens of greedy text before one differs, mean of {plan.prompts} prompts")
    if plan.tasks:
        lines.append(f"{' and '.join(plan.tasks)}: right answers of {plan.trials}, in prompts of so many tokens")
    return lines
