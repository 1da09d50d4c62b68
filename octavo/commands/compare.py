"""`octavo compare MODEL --out DIR`: many schemes and presets measured in turn, and a page of them."""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.command import OneLineParser, aligned
from ..common.convert.flag_values import limit
from ..common.convert.presets import RECIPES
from ..common.convert.source.checkpoint import check_device
from ..common.errors import OctavoError
from ..common.runtime.schemes.kv_scheme import Scheme
from ..comparing.advice import MAX_KL, Advice, advise
from ..comparing.candidates import (
    ALL,
    STEP,
    TELLING,
    Candidate,
    check_names,
    float_candidate,
    preset_candidate,
    preset_names,
    scheme_candidate,
    scheme_names,
    with_steps,
)
from ..comparing.contributions import contribution_table, contributions_of, note
from ..comparing.measuring import conditions_of_run, measure_all, write_whole
from ..comparing.options import Step, steps_of
from ..comparing.page import page
from ..comparing.rows import Row, row_of
from ..comparing.table import markdown, table_of
from ..counting import bits_note
from ..evaluation.flags import add_measurement_flags, conditions_of, plan_of
from ..generate import load_stock
from ..place import Place, find_place


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take the model, what is compared, and where it goes."""
    parser.add_place("MODEL", "any float model")
    add = parser.add_argument
    about = "to write into; the same command goes on where one was cut off, and measures nothing twice"
    add("--out", type=Path, required=True, metavar="DIR", help=about)
    about = f"schemes of its KV cache: names, JSON files, or {ALL} (default {' '.join(TELLING)})"
    add("--schemes", nargs="*", metavar="NAME", help=about)
    about = f"also convert it by presets, for the time of measuring: {', '.join(RECIPES)}, or {ALL}"
    add("--presets", nargs="+", default=[], metavar="NAME", help=about)
    about = "presets and schemes of which is told what each option adds: they are measured option by option"
    add("--options", nargs="+", default=[], metavar="NAME", help=about)
    add("--statistics", type=Path, metavar="FILE", help="what --save_statistics wrote, for schemes that need it")
    about = f"what a choice may lose: KL to the float model, in nats (default {MAX_KL})"
    add("--max_kl", type=limit, default=MAX_KL, metavar="NATS", help=about)
    add_measurement_flags(parser)


def _place(model_path: str) -> Place:
    place = find_place(model_path)
    if place.is_converted:
        raise OctavoError(f"{model_path}: is converted; compare takes the float model, evaluate --reference this one")
    return place


def _make_directory(out: Path) -> None:
    try:
        (out / "results").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OctavoError(f"--out {out}: no directory can be made there ({error.strerror}); name another") from None


def _candidates(
    flags: argparse.Namespace, place: Place, names: Sequence[str], presets: Sequence[str], options: Sequence[list[Step]]
) -> list[Candidate]:
    """The float model, and what is compared with it."""
    reference = load_stock(place.directory, "float", None, flags.device_type)
    model, directory = flags.model_path, place.directory

    def of_scheme(scheme: str | Scheme) -> Candidate:
        return scheme_candidate(scheme, model, reference, directory, flags.statistics)

    def of_preset(name: str, more: Sequence[str] = ()) -> Candidate:
        return preset_candidate(name, model, directory, flags.device_type, flags.out, more)

    found = [float_candidate(model, reference, directory), *map(of_scheme, names), *map(of_preset, presets)]
    check_names(found)
    for steps in options:
        found = with_steps(
            found, steps, lambda step: of_preset(step.of, step.away), lambda step: of_scheme(step.scheme)
        )
    check_names(found)
    return found


def _named(flags: argparse.Namespace) -> tuple[list[str], list[str], list[list[Step]]]:
    """Schemes and presets to measure, those among them whose options are, and the steps of these."""
    names, presets = scheme_names(flags.schemes, flags.statistics), preset_names(flags.presets)
    options = []
    for name in dict.fromkeys(flags.options):
        steps = steps_of(name)
        options.append(steps)
        among, asked = (presets, steps[-1].of) if steps[-1].scheme is None else (names, name)
        if asked not in among:
            among.append(asked)
    return names, presets, options


def _lines(
    flags: argparse.Namespace, shared: Mapping[str, Any], told: Sequence[str], dtype: str, context: int
) -> list[str]:
    machine = f"{platform.machine()}, {flags.device_type}, {shared['threads']} thread{'s' * (shared['threads'] > 1)}"
    text = [f"text: {flags.eval_file.name}."] if flags.eval_file is not None and shared["text"] else []
    return [
        *(f"{line}." for line in told),
        *text,
        f"{bits_note(shared['bits_at'])}.",
        f"The float model is {dtype}. Measured on {machine}, by Octavo {shared['version']}.",
        f"The choice: fewest bytes of weights and a cache of {context:,} tokens, with a KL of {flags.max_kl:g} at most "
        "and recall within float's 95 % interval.",
    ]


def _write(
    flags: argparse.Namespace, records: Sequence[dict[str, Any]], lines: Sequence[str]
) -> tuple[list[Row], Advice]:
    measured = [row_of(record) for record in records]
    rows = [row for row in measured if row.kind != STEP]
    contributions = contributions_of(rows[0], [row for row in measured if row.of])
    advice, out = advise(rows, flags.max_kl), flags.out
    name = Path(flags.model_path).name or flags.model_path
    data = {
        "model": flags.model_path,
        "max_kl": flags.max_kl,
        "advice": advice.sentences,
        "choice": advice.choice,
        "options": {of: [each.as_json() for each in found] for of, found in contributions.items()},
        "results": records,
    }
    write_whole(out / "results.json", json.dumps(data, indent=2) + "\n")
    parts = [f"# {name}: schemes compared", advice.sentences, markdown(table_of(rows))]
    for of, found in contributions.items():
        parts += [f"## What each option of {of} adds", markdown(contribution_table(found))]
    parts += [note(rows[0].context)] if contributions else []
    write_whole(out / "results.md", "\n\n".join([*parts, *lines]) + "\n")
    write_whole(out / "index.html", page(name, rows, advice, lines, contributions))
    return rows, advice


def run(flags: argparse.Namespace) -> None:
    """Measure, write the page and the tables, and print the advice.

    Raises:
        OctavoError: there is no such model, scheme or text, or something cannot be written.
    """
    plan = plan_of(flags)
    check_device(flags.device_type)
    names, presets, options = _named(flags)
    place = _place(flags.model_path)
    _make_directory(flags.out)
    candidates = _candidates(flags, place, names, presets, options)
    with candidates[0].speaker() as (reference, _):
        shared = conditions_of_run(plan, place.directory, flags.device_type)
        records = measure_all(reference, candidates, plan, shared, flags.out / "results")
        dtype = str(reference.model.dtype).removeprefix("torch.")
    lines = _lines(flags, shared, conditions_of(plan, flags.eval_file is None), dtype, row_of(records[0]).context)
    rows, advice = _write(flags, records, lines)
    table = table_of(rows)
    shown = [index for index, head in enumerate(table.heads) if head != "what it is"]
    cells = [table.heads, *([cell.text for cell in row] for row in table.rows)]
    print("\n".join(aligned([[row[index] for index in shown] for row in cells], texts=1)))
    print(bits_note(shared["bits_at"]))
    print(f"\n{advice.sentences}" + (f"\n  {advice.command}" if advice.command else ""))
    print(f"\n{flags.out / 'index.html'}")
