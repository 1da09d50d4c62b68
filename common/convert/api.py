"""From a float checkpoint to a quantized one: for programs by `convert`, for the scripts of `models/` by `main`."""

import time
from collections.abc import Callable

from ..architecture import Architecture
from ..command import run_script
from ..runtime.cache.sizes import COUNTED_LENGTH, kv_bits_per_element, kv_bytes_per_token
from ..runtime.schemes.kv_scheme import load_scheme
from ..runtime.static_scales import Statistics
from .dialects.converting import converted_as
from .flags import parse_request
from .job import Job
from .output.writer import whole_directory
from .report import ConversionReport
from .request import OWN_FORMAT, ConvertRequest
from .run import Made, run
from .source.checkpoint import FLOAT_DTYPES, source_files
from .spelling import named, naming_fields
from .targets import serving


def _report(job: Job, made: Made, seconds: float) -> ConversionReport:
    """What a conversion made, with the sizes of the float checkpoint beside its own."""
    config, plan = job.source.config, made.plan
    itemsize = max(FLOAT_DTYPES[header.dtype].itemsize for header in job.headers.values())
    return ConversionReport(
        model=job.directory,
        output=job.request.output,
        architecture=job.architecture.name,
        scheme=plan.scheme,
        linear=plan.linear if plan.linears else None,
        linears={name: plan.label_of(name) for name in plan.linears},
        source_codes=job.source.files.method if plan.coded else None,
        chosen_floats=made.floats,
        odd_groups=tuple(sorted(set(job.odd_groups(plan)))),
        float_bytes=sum(file.stat().st_size for file in source_files(job.directory)),
        output_bytes=made.nbytes,
        bits_per_weight=made.bits_per_weight,
        float_kv_bytes_per_token=kv_bytes_per_token(config, load_scheme("float"), itemsize),
        kv_bytes_per_token=kv_bytes_per_token(config, plan.scheme, itemsize),
        float_kv_bits=8 * itemsize,
        kv_bits=kv_bits_per_element(config, plan.scheme, COUNTED_LENGTH),
        texts=len(job.texts),
        held_back_texts=len(job.held_back),
        embeddings="int8" if plan.quantizes_embeddings else "float",
        cpu_activations=plan.cpu_activations if plan.has_weight_only else None,
        fidelity=made.fidelity,
        other_fidelity=made.other_fidelity,
        costs=made.costs,
        unreached=made.unreached,
        seconds=seconds,
        notes=tuple(serving(job.request.target, job.request.output)),
    )


def converted(request: ConvertRequest) -> ConversionReport:
    """As `convert`, for commands: messages name flags."""
    if request.format != OWN_FORMAT:
        return converted_as(request, _made)
    return _made(request)[0]


def _made(request: ConvertRequest, check: Callable[[Job], None] | None = None) -> tuple[ConversionReport, Statistics]:
    """Convert into our own format, unless `check` raises of what is planned; the statistics go with the report."""
    began = time.perf_counter()
    job = Job(request)
    if check is not None:
        check(job)
    with whole_directory(request.output, named("output"), job.identity(), request.resume) as stage:
        job.announce()
        made = run(job, stage)
    if request.save_statistics is not None:
        made.statistics.save(request.save_statistics)
    return _report(job, made, time.perf_counter() - began), made.statistics


def convert(request: ConvertRequest) -> ConversionReport:
    """Convert a float checkpoint into a quantized directory, which is written whole, or not at all.

    Bars and notes go to stderr; nothing is printed on stdout.

    Example:
        report = convert(ConvertRequest("meta-llama/Llama-3.2-1B", "out", scheme="int8-token", linear="w4a16"))
        print(report.summary())

    Raises:
        OctavoError: anything that the user can mend; the message names the field of the request.
    """
    with naming_fields():
        return converted(request)


def main(architecture: Architecture, argv: list[str] | None = None) -> int:
    """Entry point of a conversion script; returns the exit code."""
    return run_script(lambda arguments: print(converted(parse_request(architecture, arguments)).summary()), argv)
