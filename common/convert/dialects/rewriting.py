"""A converted directory in the format of an engine, written whole or not at all, without calibrating again."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ...command import OneLineParser, run_script
from ...errors import OctavoError
from ...runtime.schemes.kv_scheme import Scheme, load_scheme
from ...runtime.schemes.linear_scheme import HELD_LABELS
from ...runtime.static_scales import load_statistics
from ..output.naming import beside
from ..output.writer import whole_directory
from ..run import GIGABYTE
from ..spelling import named
from .caches import static_scheme
from .dialect import Dialect, Target
from .directory import OctavoDirectory
from .form import Form, as_engines_hold
from .table import DIALECTS, dialect_of, format_named

OTHER_CACHES = ("llamacpp-q8_0", "ascend-c8", "vllm-fp8", "float")
"""Schemes of which each format takes one, the one that it is best served by first."""
LARGEST_FILE_GB = 5.0
"""What refusals give with a scheme of static scales, for a rewriting."""


@dataclass(frozen=True)
class RewriteRequest:
    """One rewriting.

    Attributes:
        model: directory that a conversion wrote, which is left as it is. `--model_path`
        output: directory to write; must not exist, or be empty. `--save_directory`
        format: name of a dialect. `--format`
        scheme: of KV cache and attention in the place of the directory's own; None keeps that. `--scheme`
        statistics: file of the model's calibration, to derive static scales from; None keeps those of the directory,
            or goes without. `--statistics`
        max_shard_gb: split the weights into files of at most so many GB. `--part_file_size`
        trust_remote_code: run code that comes with the tokenizer. `--trust_remote_code`
    """

    model: Path
    output: Path
    format: str
    scheme: Scheme | str | None = None
    statistics: Path | None = None
    max_shard_gb: float = LARGEST_FILE_GB
    trust_remote_code: bool = False


def _source(request: RewriteRequest) -> OctavoDirectory:
    """What is written: the directory, with another cache if one is asked for."""
    directory = OctavoDirectory(request.model)
    if request.scheme is None and request.statistics is None:
        return directory
    scheme = directory.form.scheme if request.scheme is None else load_scheme(request.scheme)
    statistics = None if request.statistics is None else load_statistics(request.statistics)
    if statistics is not None and not scheme.is_static:
        raise OctavoError(
            f"--statistics {request.statistics}: scheme {scheme.name} has no static scales; leave it out, or give "
            "--scheme vllm-fp8"
        )
    return directory.with_cache(scheme, statistics)


def rewrite(request: RewriteRequest) -> list[str]:
    """Write a converted directory in another format.

    Returns:
        what the user has to know of it, and the commands that serve it, in lines.

    Raises:
        OctavoError: the directory is none of a conversion, or the format cannot say what it holds; the message has the
            reason and the nearest thing that works.
    """
    lines = write_as(
        dialect_of(request.format),
        _source(request),
        request.output,
        round(request.max_shard_gb * GIGABYTE),
        request.trust_remote_code,
    )
    return [f"wrote {request.output} from {request.model}: {request.format}", *lines]


def check_form(dialect: Dialect, form: Form) -> None:
    """Raise an `OctavoError` with the first reason why a form cannot be written, and the nearest that can."""
    found = refusal(dialect, form)
    if found is not None:
        raise OctavoError(f"{named('format')} {dialect.name}: {found}")


def refusal(dialect: Dialect, form: Form) -> str | None:
    """The first reason why a form cannot be written, and the nearest that can; None if it can."""
    for name, linear in form.linears.items():
        if linear.label in HELD_LABELS:
            return (
                f"{name} is in {linear.label}, codes of the source that Octavo alone reads in its own form; convert "
                "with --requantize, or serve the directory itself"
            )
    return next(iter(dialect.check(form)), None)


def refusals(form: Form) -> dict[str, str | None]:
    """Of each format, why a form cannot be written in it; None if it can."""
    return {name: refusal(dialect, form) for name, dialect in DIALECTS.items()}


def fitting_caches(form: Form, refused: Iterable[str]) -> dict[str, str]:
    """Of formats that refuse a form for its cache alone: arguments that give another cache, which they take."""
    found: dict[str, str] = {}
    for name in refused:
        for preset in OTHER_CACHES:
            scheme = load_scheme(preset)
            other = replace(form, scheme=as_engines_hold(scheme.of_model(form.layers)), folds=False)
            if refusal(DIALECTS[name], other) is None:
                found[name] = static_scheme(form, preset) if scheme.is_static else f"--scheme {preset}"
                break
    return found


def write_as(
    dialect: Dialect, directory: OctavoDirectory, output: Path, most_bytes: int | None, trust_remote_code: bool
) -> list[str]:
    """Write a directory in a dialect: the one way of both commands; returns notes and commands, in lines.

    Raises:
        OctavoError: the dialect cannot say what the directory holds, or the output cannot be written.
    """
    check_form(dialect, directory.form)
    job = {"rewriting of": str(directory.path.absolute()), "format": dialect.name}
    with whole_directory(output, named("output"), job) as stage:
        notes = dialect.write(directory, Target(stage.path, output, most_bytes, trust_remote_code))
    return [*notes, *dialect.serve(directory.form, output)]


def _size(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no size in GB")
    return value


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take what is rewritten, and how."""
    parser.add_place("DIR", "directory that a conversion wrote")
    add = parser.add_argument
    add(
        "--format",
        required=True,
        type=format_named,
        choices=tuple(DIALECTS),
        metavar="FORMAT",
        help="; ".join(f"{d.name}: {d.about}" for d in DIALECTS.values()),
    )
    about = "directory to write; must not exist, or be empty; DIR-FORMAT unless given"
    add("--save_directory", type=Path, help=about)
    add("--statistics", type=Path, help="file of --save_statistics of the model as it was converted: static scales "
        "are derived from it anew")  # fmt: skip
    add("--scheme", help="scheme of the KV cache in the place of the directory's: a preset, or a JSON file")
    add("--part_file_size", type=_size, default=LARGEST_FILE_GB, help="GB of the largest file (default 5)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")


def run(flags: argparse.Namespace) -> None:
    """Rewrite as the flags say, and print what the user has to know of the output.

    Raises:
        OctavoError: see `rewrite`.
    """
    model = Path(flags.model_path)
    request = RewriteRequest(
        model, flags.save_directory or beside(model, f"-{flags.format}"), flags.format, flags.scheme, flags.statistics,
        flags.part_file_size, flags.trust_remote_code,
    )  # fmt: skip
    print("\n".join(rewrite(request)))


def _work(argv: list[str] | None) -> None:
    parser = OneLineParser(
        prog="octavo.rewrite",
        description="Write a converted directory in the format of an engine, without calibrating again.",
        allow_abbrev=False,
    )
    add_flags(parser)
    run(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m octavo.rewrite`; returns the exit code."""
    return run_script(_work, argv)
