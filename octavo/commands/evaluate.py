"""`octavo evaluate MODEL`: what quantization costs this model, on text, in recall, in what it writes, and in time."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..adapters import find_adapter, put_adapter
from ..common.command import OneLineParser
from ..common.convert.output.bundle import put_file
from ..common.convert.source.checkpoint import check_device
from ..common.errors import OctavoError
from ..counting import bits_note
from ..evaluation.evaluating import FLOAT, Plan, Result, evaluate
from ..evaluation.flags import add_measurement_flags, conditions_of, plan_of
from ..evaluation.harness import run_tasks, split_tasks, tasks_json, tasks_table
from ..evaluation.report import cost_table, found_line, quality_table, writing_table
from ..generate import Speaker, check_statistics_used, load_stock, with_scheme
from ..place import converted_speaker, find_place

SCHEMES = ("int8-token", "octavo-4")


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take the models, and what is measured."""
    parser.add_place("MODEL", "any model; or a directory that `octavo convert` wrote, with --reference")
    add = parser.add_argument
    add(
        "--schemes", nargs="+", metavar="NAME", help=f"schemes of the KV cache of a model (default {' '.join(SCHEMES)})"
    )
    add("--statistics", type=Path, metavar="FILE", help="what --save_statistics wrote, for schemes that need it")
    add("--reference", metavar="MODEL", help="the float model that a converted directory is compared with")
    add("--adapter", metavar="DIR", help="LoRA adapter on all that is compared: a directory that PEFT wrote, or hub id")
    add_measurement_flags(parser, with_harness=True)
    add("--json", type=Path, metavar="FILE", help="write all that was measured to a file, too")


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


def _save(results: dict[str, Result], plan: Plan, tasks: list[dict[str, Any]], file: Path) -> None:
    conditions = {**dataclasses.asdict(plan), "text": None}
    found = {
        "conditions": conditions,
        "results": {name: result.as_json() for name, result in results.items()},
        "tasks": tasks,
    }
    try:
        put_file(file, json.dumps(found, indent=2) + "\n")
    except OSError as error:
        raise OctavoError(f"--json {file}: cannot be written ({error.strerror})") from None


def _notes(results: dict[str, Result], plan: Plan, scores: Mapping[str, Any]) -> list[str]:
    lines = [bits_note(plan.longest)]
    if any(result.divergence is not None for result in results.values()):
        lines.append("greedy, sampled: median of the tokens that are as float's before one differs; whole: all are")
    if any(result.peak_bytes for result in results.values()):
        lines.append("peak: memory of the process while recall runs; all models here share it and the float weights")
    if scores:
        lines.append("tasks: with 95 % intervals; those of a difference are of pairs, as all see the same questions")
    return lines


def _say(line: str) -> None:
    """What is known before the tables are: above the bars of what goes on."""
    tqdm.write(line, file=sys.stderr)


def run(flags: argparse.Namespace) -> None:
    """Print what was measured.

    Raises:
        OctavoError: there is no such model or text, or flags that do not go together.
    """
    plan = plan_of(flags)
    if flags.json is not None and not flags.json.parent.is_dir():
        raise OctavoError(f"--json {flags.json}: cannot be written (no such directory)")
    _, tasks = split_tasks(flags.tasks)
    if flags.limit is not None and not tasks:
        raise OctavoError("--limit: is of tasks of lm-eval; name one with --tasks, or leave it out")
    adapter = None if flags.adapter is None else find_adapter(flags.adapter)
    reference, others = _speakers(flags)
    if adapter is not None:
        models = {id(each.model): each.model for each in (reference, *others.values())}  # schemes share one
        for model in models.values():
            put_adapter(model, flags.adapter, adapter)
    scores = run_tasks({FLOAT: reference, **others}, tasks, flags.limit, _say) if tasks else {}
    results = evaluate(reference, others, plan, found=lambda *found: _say(found_line(*found)))
    print("\n".join(quality_table(results)))
    tables = [writing_table(results), cost_table(results), tasks_table(scores) if scores else []]
    for table in tables:
        if table:
            print("\n" + "\n".join(table))
    print("\n" + "\n".join([*conditions_of(plan, flags.eval_file is None), *_notes(results, plan, scores)]))
    if flags.json is not None:
        _save(results, plan, tasks_json(scores) if scores else [], flags.json)
