"""The report of a plan: flags, tables for a terminal, and data."""

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.command import DEVICES, OneLineParser, aligned
from ..common.convert.flag_groups import preset_name
from ..common.convert.flag_values import positive
from ..common.convert.flags import recipe_fields
from ..common.convert.presets import RECIPES
from ..common.convert.request import LINEAR_NAMES, linear_scheme_of
from ..common.errors import OctavoError
from ..common.runtime.schemes.kv_scheme import PRESETS
from ..counting import STORED_NOTE, bits_note
from .advice import advise
from .model import PlannedModel, read_model
from .peak import process_bytes
from .plot import draw
from .sizes import UNITS, Unit, memory_of, size_of
from .table import TRANSFORMERS, Planner, Row

TELLING = (TRANSFORMERS, "float", "int8-token", "ascend-c8", "vllm-fp8", "octavo-4", "octavo-3", "octavo-2")
"""Schemes that are planned unless others are named."""
DEFAULT_CONTEXT = 8192
DEFAULT_UNIT = "GB"
WIDTH = 120
"""Of the lines below the tables."""


def _number(text: str) -> int:
    """A positive integer, whose digits may be in groups: 131,072."""
    return positive(text.replace(",", "").replace("_", ""))


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take what is planned."""
    parser.add_place("MODEL", "directory, config.json or hub id of a float model; no weight is read or fetched")
    add = parser.add_argument
    parser.usage = f"{parser.prog} MODEL [--context TOKENS ...] [--memory SIZE] [other flags]"
    about = f"tokens of each sequence, one or several (default {DEFAULT_CONTEXT})"
    add("--context", type=_number, nargs="+", default=[DEFAULT_CONTEXT], metavar="TOKENS", help=about)
    add("--batch", type=_number, default=1, metavar="SEQUENCES", help="sequences at once (default 1)")
    add(
        "--memory",
        metavar="SIZE",
        help="what there is, as 24GB (10^9 bytes each) or 24GiB (2^30); default: all of this machine's",
    )
    about = "of the KV cache: names, JSON files, or all; default: a short list"
    add("--schemes", nargs="+", metavar="NAME", help=about)
    about = f"how `octavo convert` makes the weights, which else are floats: {', '.join(RECIPES)}"
    add("--preset", type=preset_name, metavar="NAME", help=about)
    about = f"the same by the kind of the linears: {', '.join(LINEAR_NAMES)}"
    add("--quantization", choices=tuple(LINEAR_NAMES), metavar="NAME", help=about)
    about = f"where it is to run: {', '.join(DEVICES)} (default {DEVICES[0]})"
    add("--device_type", choices=DEVICES, default=DEVICES[0], metavar="NAME", help=about)
    about = f"of the sizes printed: {', '.join(UNITS)} (default {DEFAULT_UNIT})"
    add("--unit", choices=tuple(UNITS), default=DEFAULT_UNIT, metavar="NAME", help=about)
    add("--json", action="store_true", help="print data, in bytes, instead of tables")
    add("--plot", type=Path, metavar="FILE", help="also draw memory against batch and context (svg, png, pdf)")


def _names(flags: argparse.Namespace, fields: dict[str, Any]) -> list[str]:
    """The schemes to plan, each once: those that are asked for, or a short list with that of the preset."""
    if flags.schemes is not None:
        return list(dict.fromkeys([TRANSFORMERS, *PRESETS] if flags.schemes == ["all"] else flags.schemes))
    of_preset = [fields["scheme"]] if "scheme" in fields else []
    return list(dict.fromkeys([TRANSFORMERS, "float", *of_preset, *TELLING]))


def _fields(flags: argparse.Namespace) -> dict[str, Any]:
    """Fields of the request that makes the weights; none where they stay in float.

    Raises:
        OctavoError: they are asked for in two ways.
    """
    if flags.preset and flags.quantization:
        raise OctavoError("--preset and --quantization: both say how weights are made; give one of the two")
    if flags.preset:
        return recipe_fields(flags.preset)
    linear = linear_scheme_of(flags.quantization or "float")
    return {} if linear is None else {"linear": linear}


def _weights_line(planner: Planner, rows: Sequence[Row], flags: argparse.Namespace, unit: Unit) -> str:
    model, kind = planner.model, flags.preset or flags.quantization or "float"
    dtype = str(model.dtype).removeprefix("torch.")
    if not model.is_known:
        return (
            f"weights: transformers knows no model_type {model.settings.get('model_type')!r}; the peak is without them"
        )
    plain = f"{dtype}, {unit.text(planner.weights(TRANSFORMERS).nbytes)}"
    if not planner.fields:
        return f"weights: {plain}"
    coded = next((row.weights for row in reversed(rows) if row.scheme != TRANSFORMERS), None)
    return f"weights: {kind}, {unit.text(planner.weights('float').nbytes if coded is None else coded)}; {plain}"


def made_for(model: PlannedModel) -> int | None:
    """Tokens that a model is made for; None if its config does not say."""
    return getattr(model.decoder_config, "max_position_embeddings", None)


def _notes(model: PlannedModel, device: str, memory: int | None) -> list[str]:
    most = made_for(model)
    notes = [
        bits_note(None),
        STORED_NOTE,
        "kept: what is in use; allocated: the storage, which grows in steps of at most a quarter",
    ]
    if device == "cpu":
        notes.append("peak: the process, weights, allocated cache, and one chunk of a prompt in the layers")
    else:
        notes.append(f"peak: of what PyTorch allocates on {device}; the context of its driver comes on top")
    notes.append(f"{TRANSFORMERS}: the float model with its own cache, which takes a prompt in one pass")
    if memory is None:
        notes.append(f"nothing here says how much memory {device} has: give --memory for what fits")
    elif most:
        notes.append(f"the model is made for {most:,} tokens; the longest context is what fits, not what it bears")
    if "quantization_config" in model.settings:
        notes.append("weights count as if they were floats: quantization_config is not planned for")
    return notes


def _cells(row: Row, unit: Unit, has_memory: bool) -> tuple[str, ...]:
    sizes = (row.cache.kept, row.cache.allocated, row.peak.total)
    fits = (f"{row.longest:,}", f"{row.largest:,}") if has_memory else ()
    return (row.scheme, f"{row.bits:.2f}", f"{row.stored:.2f}", f"{row.token_bytes:,}", *map(unit.number, sizes), *fits)


def table(rows: Sequence[Row], unit: Unit, memory: int | None) -> list[str]:
    """The lines of a table of the schemes at one context."""
    context, batch = rows[0].context, rows[0].batch
    head = ["scheme", "bits", "stored", "bytes/token", "kept", "allocated", "peak"]
    head += [] if memory is None else ["longest context", "largest batch"]
    cells = [_cells(row, unit, memory is not None) for row in rows]
    fits = "" if memory is None else f"; longest and largest in {unit.text(memory)}"
    title = f"KV cache of {batch} x {context:,} tokens, in {unit.name} of {unit.bytes:,} bytes{fits}"
    return [title, "", *aligned([tuple(head), *cells], texts=1)]


def run(flags: argparse.Namespace) -> None:
    """Print a plan.

    Raises:
        OctavoError: there is no such model or scheme, or a flag says nothing that can be planned.
    """
    unit, fields = Unit(flags.unit), _fields(flags)
    memory = memory_of(flags.device_type) if flags.memory is None else size_of(flags.memory)
    model = read_model(flags.model_path)
    process = process_bytes(model.config) if flags.device_type == "cpu" else 0
    planner, names = Planner(model, fields, flags.device_type, process), _names(flags, fields)
    plans = [planner.rows(names, context, flags.batch, memory) for context in flags.context]
    if flags.plot is not None:
        draw(flags.plot, planner, names, flags.context[0], flags.batch, memory, unit)
    if flags.json:
        print(
            json.dumps(
                {"model": model.name, "memory": memory, "rows": [r.to_dict() for p in plans for r in p]}, indent=2
            )
        )
        return
    print("\n".join([model.name, _weights_line(planner, plans[0], flags, unit), ""]))
    for rows in plans:
        print("\n".join([*table(rows, unit, memory), ""]))
    for note in _notes(model, flags.device_type, memory):
        print(textwrap.fill(note, WIDTH, subsequent_indent="  "))
    if memory is not None:
        weights = flags.preset or flags.quantization or "float"
        measured = None if model.architecture is None or Path(model.name).is_file() else model.name
        print(f"\n{advise(plans, weights, measured, memory, unit, made_for(model))}")
