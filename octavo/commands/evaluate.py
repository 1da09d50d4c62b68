"""`octavo evaluate MODEL`: what quantization costs this model, on text, in recall, in what it writes, and in time."""

import argparse
import dataclasses
import json
from pathlib import Path

from ..common.command import DEVICES, OneLineParser
from ..common.convert.calibration.texts import default_texts
from ..common.convert.flag_values import count
from ..common.convert.source.checkpoint import check_device
from ..common.errors import OctavoError, first_line
from ..evaluation.evaluating import FLOAT, Plan, Result, evaluate
from ..evaluation.recall import TASKS
from ..evaluation.report import cost_table, quality_table
from ..generate import Speaker, check_statistics_used, load_stock, with_scheme
from ..place import converted_speaker, find_place

SCHEMES = ("int8-token", "octavo-4")
_OWN_TEXT = (
    "text: the one that comes with Octavo, on which conversions calibrate unless told otherwise; --eval_file FILE "
    "gives one of your own"
)


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take the models, and what is measured."""
    parser.add_place("MODEL", "any model; or a directory that `octavo convert` wrote, with --reference")
    add = parser.add_argument
    add(
        "--schemes", nargs="+", metavar="NAME", help=f"schemes of the KV cache of a model (default {' '.join(SCHEMES)})"
    )
    add("--statistics", type=Path, metavar="FILE", help="what --save_statistics wrote, for schemes that need it")
    add("--reference", metavar="MODEL", help="the float model that a converted directory is compared with")
    add("--eval_file", type=Path, metavar="FILE", help="text to score on (default: one that comes with Octavo)")
    add("--windows", type=count, default=2, metavar="N", help="windows of the text (default 2; 0: no text)")
    add("--length", type=count, default=2048, metavar="N", help="tokens of a window (default 2048)")
    add("--last", type=count, default=0, metavar="N", help="score the last N tokens of each window alone")
    add("--tasks", nargs="*", choices=list(TASKS), default=["key-value"], help="what is recalled (default key-value)")
    add("--lengths", nargs="+", type=count, default=[1024], metavar="N", help="tokens of its prompts (default 1024)")
    add("--trials", type=count, default=20, metavar="N", help="questions of each task and length (default 20)")
    add("--written", type=count, default=64, metavar="N", help="tokens to write greedily (default 64; 0: none)")
    add("--prompts", type=count, default=4, metavar="N", help="prompts to write behind (default 4)")
    add("--json", type=Path, metavar="FILE", help="write all that was measured to a file, too")
    add("--device_type", choices=DEVICES, default="cpu", help="where to run (default cpu)")


def _speakers(flags: argparse.Namespace) -> tuple[Speaker, dict[str, Speaker]]:
    """The float model, and those to be compared with it."""
    check_device(flags.device_type)
    place = find_place(flags.model_path)
    if not place.is_converted:
        if flags.reference is not None:
            raise OctavoError(f"--reference: {flags.model_path} is not converted, and is its own; leave it out")
        reference = load_stock(place.directory, "float", None, flags.device_type)
        names = [name for name in flags.schemes or SCHEMES if name != FLOAT]  # which is there as the reference
        check_statistics_used(names, flags.statistics)
        return reference, {name: with_scheme(reference, name, flags.statistics) for name in names}
    if flags.schemes is not None or flags.statistics is not None:
        given = "--statistics" if flags.schemes is None else "--schemes"
        raise OctavoError(f"{given}: {flags.model_path} is converted and has a scheme of its own; leave it out")
    if flags.reference is None:
        raise OctavoError(f"{flags.model_path}: is converted; name the float model that it came from by --reference")
    original = find_place(flags.reference)
    if original.is_converted:
        raise OctavoError(f"--reference {flags.reference}: is converted itself; give the float model")
    return (
        load_stock(original.directory, "float", None, flags.device_type),
        {_name(flags.model_path): converted_speaker(place, flags.device_type)},
    )


def _name(model_path: str) -> str:
    """What a converted directory is called in the tables, in which `FLOAT` is the reference."""
    name = Path(model_path).resolve().name
    return f"{name} (converted)" if name == FLOAT else name


def _text(flags: argparse.Namespace) -> str | None:
    if not flags.windows:
        return None
    if flags.eval_file is None:
        return "\n".join(default_texts())
    try:
        return flags.eval_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OctavoError(f"--eval_file {flags.eval_file}: cannot be read ({first_line(error)})") from None


def _plan(flags: argparse.Namespace) -> Plan:
    for name in ("trials", "prompts"):
        if getattr(flags, name) < 1:
            raise OctavoError(f"--{name} 0: give 1 or more")
    if flags.last == 1:
        raise OctavoError("--last 1: behind the last token nothing is predicted; give 2 or more, or 0 for all")
    if flags.windows and flags.length < 2:
        raise OctavoError(f"--length {flags.length}: nothing is predicted; give 2 or more")
    fields = {field.name for field in dataclasses.fields(Plan)} - {"text", "tasks", "lengths"}
    tasks, lengths = tuple(dict.fromkeys(flags.tasks)), tuple(sorted(set(flags.lengths)))
    return Plan(_text(flags), tasks=tasks, lengths=lengths, **{name: getattr(flags, name) for name in fields})


def _conditions(plan: Plan, flags: argparse.Namespace) -> list[str]:
    lines = []
    if plan.text is not None:
        part = f", the last {plan.last:,} of each scored" if plan.last else ""
        lines.append(
            f"KL(float || model) in nats, perplexity and top-1: {plan.windows} windows of {plan.length:,} tokens{part}"
        )
        if flags.eval_file is None:
            lines.append(_OWN_TEXT)
    if plan.text is not None and plan.written:
        lines.append(f"as float for: tokens of greedy text before one differs, mean of {plan.prompts} prompts")
    if plan.tasks:
        lines.append(f"{' and '.join(plan.tasks)}: right answers of {plan.trials}, in prompts of so many tokens")
    return lines


def _save(results: dict[str, Result], plan: Plan, file: Path) -> None:
    conditions = {**dataclasses.asdict(plan), "text": None}
    found = {"conditions": conditions, "results": {name: result.as_json() for name, result in results.items()}}
    try:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OctavoError(f"--json {file}: cannot be written ({error.strerror})") from None


def run(flags: argparse.Namespace) -> None:
    """Print what was measured.

    Raises:
        OctavoError: there is no such model or text, or flags that do not go together.
    """
    plan = _plan(flags)
    if flags.json is not None and not flags.json.parent.is_dir():
        raise OctavoError(f"--json {flags.json}: cannot be written (no such directory)")
    reference, others = _speakers(flags)
    results = evaluate(reference, others, plan)
    print("\n".join(quality_table(results)))
    if costs := cost_table(results):
        print("\n" + "\n".join(costs))
    print("\n" + "\n".join(_conditions(plan, flags)))
    if flags.json is not None:
        _save(results, plan, flags.json)
