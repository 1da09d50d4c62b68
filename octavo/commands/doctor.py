"""`octavo doctor MODEL`: which layers break which schemes, and why; with `--measure` also what schemes lose."""

import argparse
import json
import textwrap
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..common.command import DEVICES, OneLineParser, gives
from ..common.convert.flag_values import count, limit, positive
from ..common.convert.source.checkpoint import check_device
from ..common.doctor.report import add_flags as add_weights_flags
from ..common.doctor.report import report_of
from ..common.doctor.text import render
from ..common.errors import OctavoError
from ..common.runtime.schemes.kv_scheme import PRESETS
from ..comparing.advice import MAX_KL
from ..comparing.candidates import ALL
from ..counting import bits_note
from ..evaluation.evaluating import Plan
from ..evaluation.flags import conditions_of, plan_of
from ..generate import load_stock
from ..place import find_place
from ..recommending.calibrating import calibrated
from ..recommending.measuring import CALIBRATED, OWN, Limits, Measured, Measurement
from ..recommending.report import advice, notes, table

CONTEXT = 8192
WIDTH = 120
"""Of the lines below the table."""
OF_RECALL = ("lengths", "trials")
OF_MEASURING = (
    *("kl", "schemes", "calibrate", "calib_file", "context", "eval_file", "windows", "length", "recall", *OF_RECALL),
    "device_type",
)


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take what the doctor is asked."""
    add_weights_flags(parser)
    add = parser.add_argument
    about = "also read a text with the model, and recommend the scheme of the fewest bits that keeps --kl"
    add("--measure", action="store_true", help=about)
    about = f"most KL to the float model, in nats (default {MAX_KL})"
    add("--kl", type=limit, default=MAX_KL, metavar="NATS", help=about)
    about = (
        f"to measure, all of those named, or {ALL} (default {' '.join(OWN)}: the fewest bits first, until one passes)"
    )
    add("--schemes", nargs="+", metavar="NAME", help=about)
    about = f"also measure {' '.join(CALIBRATED)}, by a calibration, as of a conversion"
    add("--calibrate", action="store_true", help=about)
    add("--calib_file", type=Path, metavar="FILE", help="texts of --calibrate (default: those that come with Octavo)")
    about = f"tokens of the sequences in which bits are counted (default {CONTEXT})"
    add("--context", type=positive, default=CONTEXT, metavar="N", help=about)
    add("--eval_file", type=Path, metavar="FILE", help="text to read (default: one that comes with Octavo)")
    add("--windows", type=positive, default=1, metavar="N", help="windows of the text (default 1)")
    add("--length", type=positive, default=512, metavar="N", help="tokens of a window (default 512)")
    about = (
        "also let values be found by their keys, and take no scheme that finds fewer than float by more points of 100"
    )
    add("--recall", type=limit, metavar="POINTS", help=about)
    about = "tokens of the prompts of --recall (default 1024)"
    add("--lengths", type=count, default=1024, metavar="N", help=about)
    add("--trials", type=count, default=20, metavar="N", help="questions of --recall (default 20)")
    add("--device_type", choices=DEVICES, default="cpu", help="where to measure (default cpu)")


def _plan(flags: argparse.Namespace) -> Plan:
    """What is measured.

    Raises:
        OctavoError: flags that say nothing here, or a text that cannot be read.
    """
    for name in OF_MEASURING:
        if not flags.measure and gives(flags.words, f"--{name}"):
            raise OctavoError(f"--{name}: is of --measure; give that too, or leave it out")
        if flags.recall is None and name in OF_RECALL and gives(flags.words, f"--{name}"):
            raise OctavoError(f"--{name}: is of --recall POINTS; give that too, or leave it out")
    if flags.calib_file is not None and not flags.calibrate:
        raise OctavoError("--calib_file: is of --calibrate; give that too, or leave it out")
    if flags.calibrate and flags.statistics is not None:
        raise OctavoError("--calibrate: finds what --statistics has; give one of them")
    tasks = [] if flags.recall is None else ["key-value"]
    usual = {"last": 0, "written": 0, "prompts": 1, "sampled": False, "tasks": tasks, "lengths": [flags.lengths]}
    return plan_of(argparse.Namespace(**{**vars(flags), **usual}))


def _statistics(flags: argparse.Namespace, directory: Path) -> AbstractContextManager[Path | None]:
    """What calibrated schemes rest on, if anything."""
    if not flags.calibrate:
        return nullcontext(flags.statistics)
    named = CALIBRATED if flags.schemes is None else PRESETS if flags.schemes == [ALL] else flags.schemes
    return calibrated(directory, flags.calib_file, named, flags.device_type)


def _measured(flags: argparse.Namespace, plan: Plan) -> list[Measured]:
    check_device(flags.device_type)
    directory = find_place(flags.model_path).directory
    with _statistics(flags, directory) as statistics:
        reference = load_stock(directory, "float", None, flags.device_type)
        measurement = Measurement(reference, plan, Limits(flags.kl, flags.recall), flags.context)
        return measurement.run(flags.schemes, statistics)


def _data(flags: argparse.Namespace, plan: Plan, found: list[Measured], said: str) -> dict[str, Any]:
    conditions = {name: value for name, value in vars(flags).items() if name in OF_MEASURING}
    for name in ("eval_file", "calib_file"):
        conditions[name] = None if conditions[name] is None else str(conditions[name])
    return {"conditions": conditions, "results": [each.as_json() for each in found], "advice": said}


def run(flags: argparse.Namespace) -> None:
    """Print what the doctor has to say of a checkpoint.

    Raises:
        OctavoError: see `diagnose`; or something cannot be measured.
    """
    plan = _plan(flags)
    report = report_of(flags)
    if not flags.json:
        print(render(report), flush=True)  # which takes no time, and stands whatever comes
    if not flags.measure:
        if flags.json:
            print(json.dumps(report, indent=2))
        return
    found = _measured(flags, plan)
    said = advice(found, Limits(flags.kl, flags.recall), flags.model_path, flags.calib_file)
    if flags.json:
        print(json.dumps({**report, "measured": _data(flags, plan, found, said)}, indent=2))
        return
    print("\n".join(["", *table(found, plan.lengths), ""]))
    conditions = conditions_of(plan, flags.eval_file is None)
    if flags.calibrate and flags.calib_file is None and flags.eval_file is None:
        conditions.append(
            "--calibrate: on the end of that text, of which the windows are the start unless there are many"
        )
    for note in (bits_note(flags.context), *conditions, *notes(found)):
        print(textwrap.fill(note, WIDTH, subsequent_indent="  "))
    print(f"\n{said}")
