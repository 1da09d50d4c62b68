"""A conversion whose output is in an engine's format: into our own first, beside the output, and written from that."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from ...errors import OctavoError
from ...runtime.static_scales import Statistics
from ..job import Job
from ..output.writer import check_output
from ..report import ConversionReport
from ..request import ConvertRequest
from ..run import GIGABYTE
from ..spelling import named
from .directory import OctavoDirectory
from .form import as_engines_hold
from .planned import form_of_plan
from .rewriting import LARGEST_FILE_GB, check_form, write_as
from .table import dialect_of

Convert = Callable[[ConvertRequest, Callable[[Job], None]], tuple[ConversionReport, Statistics]]
"""Converts into our own format, whatever the request names, unless the check of a job raises."""


def own_place(output: Path) -> Path:
    """Where the conversion grows that an output in another format is written from: beside it, hidden."""
    return output.parent / f".{output.name}.octavo"


def converted_as(request: ConvertRequest, convert: Convert) -> ConversionReport:
    """Convert, and write the result in the format that is asked for.

    Raises:
        OctavoError: anything that the user can mend; what the format cannot say is found before anything is computed,
            as far as the plan tells.
    """
    dialect = dialect_of(request.format)
    check_output(request.output, named("output"))
    own = dataclasses.replace(request, output=own_place(request.output))
    report, statistics = convert(own, lambda job: check_form(dialect, form_of_plan(job, job.plan(()))))
    try:
        notes = _written(request, own.output, statistics)
    except OctavoError as error:
        raise OctavoError(f"{error} (the conversion is kept in {own.output}, for octavo.rewrite)") from None
    shutil.rmtree(own.output)
    nbytes = sum(file.stat().st_size for file in request.output.iterdir() if file.is_file())
    return dataclasses.replace(
        report, output=request.output, output_bytes=nbytes, format=dialect.name, notes=tuple(notes)
    )


def _written(request: ConvertRequest, own: Path, statistics: Statistics) -> list[str]:
    directory = OctavoDirectory(own)
    scheme = directory.form.scheme
    if scheme.is_static and (directory.form.folds or as_engines_hold(scheme) != scheme):
        directory = directory.with_cache(scheme, statistics)
    most = round((request.max_shard_gb or LARGEST_FILE_GB) * GIGABYTE)
    return write_as(dialect_of(request.format), directory, request.output, most, request.trust_remote_code)
