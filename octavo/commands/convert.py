"""`octavo convert MODEL`: a quantized directory from a float checkpoint, or from one that others quantized."""

import argparse
import shlex
import sys
from pathlib import Path

from ..common.command import DefaultsHelp, OneLineParser, aligned
from ..common.convert.api import converted
from ..common.convert.flag_groups import MOST_USED, add_conversion_flags
from ..common.convert.flag_linears import LINEAR_FLAGS
from ..common.convert.flags import SCHEME_FLAGS, complete_flags, given_flags, request_of
from ..common.convert.presets import USUAL, load_recipe
from ..common.convert.report import ConversionReport
from ..common.convert.request import OWN_FORMAT
from ..common.convert.source.checkpoint import load_tokenizer
from ..common.convert.source.config import chosen_architecture
from ..common.errors import OctavoError
from ..place import Place, find_place, usual_output

SUFFIX = "-octavo"
DECIDING = LINEAR_FLAGS | {"preset", "format", "target", "anti_method", "use_kvcache_quant", "use_fa_quant"}
"""Flags that say themselves what is made, so that no preset is taken unless it is asked for."""
USUAL_SCHEME = "int8-token"


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take the source and what becomes of it."""
    parser.add_place("MODEL", "directory of a checkpoint (safetensors), or hub id")
    about = f"to write; must not exist, or be empty; MODEL{SUFFIX} unless given"
    parser.add_argument("--save_directory", type=Path, metavar="DIR", help=about)
    add_conversion_flags(parser)
    parser.usage = f"{parser.prog} MODEL [--preset NAME] [--save_directory DIR] [other flags]"
    parser.description = f"{parser.description or ''} Unless flags say how: --preset {USUAL}.".strip()
    parser.formatter_class = DefaultsHelp
    parser.show_first(*MOST_USED)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="octavo convert", allow_abbrev=False)
    add_flags(parser)
    return parser


def _check_new(output: Path, model: str) -> None:
    """Raise an `OctavoError` if there is something already where a conversion would go by itself."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        quoted = shlex.quote(str(output))
        raise OctavoError(
            f"{output}: exists already; octavo run {quoted} runs it, and octavo convert {shlex.quote(model)} "
            "--save_directory DIR writes elsewhere"
        )


def _usual(place: Place, given: set[str]) -> tuple[list[str], str]:
    """What is asked for where nobody asks for anything, as words of the command, and the reason in a line."""
    if given & DECIDING:
        return [], ""
    method = None if "requantize" in given else place.coded_by
    has_scheme = bool(given & set(SCHEME_FLAGS))
    if method is None:
        rest = ", with the KV cache that is asked for" if has_scheme else ""
        return ["--preset", USUAL], f"--preset {USUAL}{rest}: {load_recipe(USUAL)['about']} (octavo presets lists them)"
    if has_scheme:
        return [], ""
    why = f"the linears stay in the codes of the source ({method}), and the KV cache is as good as float"
    return ["--scheme", USUAL_SCHEME], f"--scheme {USUAL_SCHEME}: {why} (octavo schemes lists others)"


def _next_commands(report: ConversionReport, model: str, with_code: bool) -> list[str]:
    """What to do with an output first, as commands to copy: try it, measure it, offer it to others."""
    output, source = shlex.quote(str(report.output)), shlex.quote(model)
    talks = load_tokenizer(report.output, {}, with_code).chat_template is not None
    measure = f"octavo evaluate {output} --reference {source}"
    rows = [
        (f"octavo chat {output}", "talk with it") if talks else (f'octavo run {output} "Once upon a time"', "try it"),
        (measure, "what it costs") if report.source_codes is None else (f"octavo info {output}", "what it holds"),
        (f"octavo serve {output}", "for clients of OpenAI's API"),
    ]
    return aligned([(command, f"# {why}") for command, why in rows])


def run(flags: argparse.Namespace) -> None:
    """Convert, and print sizes, fidelity and what to do next.

    Raises:
        OctavoError: anything that the user can mend.
    """
    given = given_flags(_parser(), flags.words)
    words, output = list(flags.words), flags.save_directory
    if output is None:
        output = usual_output(flags.model_path, SUFFIX)
        _check_new(output, flags.model_path)
        words += ["--save_directory", str(output)]
    place = find_place(flags.model_path, flags.trust_remote_code)
    architecture = chosen_architecture(place.directory, None)
    usual, why = _usual(place, given)
    asked = complete_flags(_parser, [*words, *usual], architecture.decoder.head)
    if why:
        print(why, file=sys.stderr)
    report = converted(request_of(asked, architecture))
    print(report.summary())
    if report.format == OWN_FORMAT:
        commands = _next_commands(report, flags.model_path, flags.trust_remote_code)
        print("\n".join(["", "to go on:", *(f"  {command}" for command in commands)]))
