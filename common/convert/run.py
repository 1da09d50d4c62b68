"""A conversion from its job to a whole directory: what is surveyed, computed, written, mended and gone on with."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import OctavoError
from ..runtime.checkpoint.ascend import DESCRIPTION_FILE, build_description, weight_file_names
from ..runtime.static_scales import Statistics
from .job import Job, say
from .measure.costs import Cost, cost_table, costliest, costliest_units
from .measure.fidelity import Fidelity
from .measure.outliers import worst_outliers
from .output.bundle import bundle
from .output.config import output_config
from .output.shards import PlannedFiles, digest_of
from .output.sizes import bits_per_weight
from .output.stage import Stage
from .output.writer import write_json
from .pipeline import Conversion
from .plan import Plan
from .request import OWN_FORMAT
from .source.config import GENERATION_FILE, bearable, carried_generation_config
from .source.tokenizer import carry_tokenizer
from .spelling import named
from .targets import notes
from .units import grouped, units_of
from .widening import layer_weights, widened

GIGABYTE = 10**9
BLAMED = 5
"""How many linears and attentions `max_kl` names."""
COMPARED_TEXTS = 32
"""Calibration texts of which the output's tokenizer must make the ids that the source's makes."""


@dataclass(frozen=True)
class Made:
    """What a conversion made.

    Attributes:
        plan: what was to be made.
        floats: linears and attentions that were chosen to stay in float.
        fidelity: to the float model; None if no token could be predicted.
        other_fidelity: the same with the other of `cpu_activations`; None where that is the same.
        costs: of linears and attentions, if measured.
        unreached: experts that no calibration token chose, where that matters.
        nbytes: of the output.
        bits_per_weight: of the linears of layers that are in codes, scales and zero points counted; None of none.
        statistics: of calibration.
    """

    plan: Plan
    floats: tuple[str, ...]
    fidelity: Fidelity | None
    other_fidelity: Fidelity | None
    costs: tuple[Cost, ...]
    unreached: tuple[str, ...]
    nbytes: int
    bits_per_weight: float | None
    statistics: Statistics


def _survey(job: Job) -> tuple[list[str], list[str], list[Cost]]:
    """What is chosen to stay in float, or to be in int8, and what each linear and attention costs, if measured."""
    request = job.request
    units = units_of(job.source)
    floats = worst_outliers(job.source, grouped(job.linears, units), job.samples, request.float_outliers)
    if not (request.float_costliest or request.mean_bits):
        return floats, [], []
    trial = job.conversion(job.plan(floats), job.of_whole, measures=True)
    for index in tqdm(range(len(job.source)), desc="measuring", unit="layer"):
        trial.layer(index)
    costs = [cost for cost in trial.state.costs if cost.name not in job.coded]
    worst = costliest_units(costs, units)[: request.float_costliest]
    floats += itertools.chain(*worst)
    return floats, widened(job, floats, costs), trial.state.costs


def _begin(job: Job, stage: Stage) -> None:
    """Decide what stays in float, and keep that with a stage in which nothing is finished."""
    if job.request.resume:
        say(f"{stage.damage or f'nothing to resume in {stage.path}'}: starting with the first layer")
    sharp = job.settle()
    floats, wide, costs = _survey(job)
    stage.notes = {"floats": floats, "wide": wide, "surveyed": _plain(costs), "sharp": sharp}
    if costs:
        say(cost_table(costs, floats, units_of(job.source)))


def _plain(costs: list[Cost]) -> list[tuple]:
    return [dataclasses.astuple(cost) for cost in costs]


def _costs(plain: list[Any]) -> list[Cost]:
    return [Cost(*cost) for cost in plain]


def _write_texts(stage: Path, job: Job) -> None:
    """The tokenizer and the config of generation, before anything is computed, since they may be refused."""
    write_json(stage / "config.json", bearable(job.config))
    carry_tokenizer(job.directory, stage, job.request.trust_remote_code, job.texts[:COMPARED_TEXTS])
    generation = carried_generation_config(job.directory)
    if generation is not None:
        write_json(stage / GENERATION_FILE, generation)


def _write_rest(stage: Path, job: Job, plan: Plan, description: dict[str, Any]) -> None:
    """What says how the tensors are to be read."""
    write_json(stage / DESCRIPTION_FILE, description)
    write_json(stage / "config.json", output_config(job.config, job.architecture, plan, bool(job.source.tied)))
    for name, text in bundle(job.architecture).items():
        (stage / name).write_text(text, encoding="utf-8")


def _written(tensors: dict[str, torch.Tensor], files: PlannedFiles) -> str:
    """Write the tensors of a layer; returns their digest."""
    for name, tensor in tensors.items():
        files.write(name, tensor)
    return digest_of(tensors)


def _mend(job: Job, plan: Plan, stage: Stage, files: PlannedFiles) -> None:
    """Do finished layers again whose bytes are not those that were written.

    What they need of the layers before them is not kept, so those are gone through again, too.
    """
    digests = list(stage.notes["layers"])
    prefixes = [f"{job.source.layer_name(index)}." for index in range(len(digests))]
    names = [[name for name in files.placed if name.startswith(prefix)] for prefix in prefixes]
    damaged = [index for index, digest in enumerate(digests) if files.digest(names[index]) != digest]
    if not damaged:
        return
    say(f"{stage.path}: damaged in layers {', '.join(map(str, damaged))}: doing them again")
    conversion = job.conversion(plan, job.of_whole)
    for index in tqdm(range(damaged[-1] + 1), desc="mending", unit="layer"):
        tensors = conversion.layer(index)
        if index in damaged:
            digests[index] = _written(tensors, files)
    files.sync()
    stage.amend(stage.notes | {"layers": digests})


def _go_on(job: Job, plan: Plan, stage: Stage, files: PlannedFiles, conversion: Conversion) -> None:
    """Bring a conversion to where a stage was left."""
    _mend(job, plan, stage, files)
    conversion.state.restore(stage.state, job.source.device)
    conversion.state.costs = _costs(stage.notes["measured"])
    conversion.state.unreached = list(stage.notes["unreached"])
    say(f"going on behind layer {stage.step} of {len(job.source)}")


def _convert_layers(job: Job, stage: Stage, files: PlannedFiles, conversion: Conversion) -> None:
    """Convert and write the layers that are left, and keep after each what the next one needs."""
    digests = stage.notes.get("layers", [])
    layers = range(stage.step, len(job.source))
    for index in tqdm(layers, desc="converting", unit="layer", initial=stage.step, total=len(job.source)):
        digests = [*digests, _written(conversion.layer(index), files)]
        files.sync()
        state = conversion.state
        notes = {"measured": _plain(state.costs), "unreached": state.unreached, "layers": digests}
        stage.finish_step(index + 1, state.tensors(), stage.notes | notes)


def _convert_rest(files: PlannedFiles, conversion: Conversion) -> tuple[Fidelity | None, Fidelity | None]:
    """Write what is outside of the layers; returns how far the model is from the float one, both as in `Made`."""
    output = conversion.output
    for name, rows, first in itertools.chain(output.unchanged(), output.embedding()):
        files.write(name, rows, first)
    tensors, fidelity, otherwise = conversion.head()
    for name, tensor in tensors.items():
        files.write(name, tensor)
    return fidelity, otherwise


def _check_kl(most: float | None, fidelity: Fidelity | None, costs: list[Cost]) -> None:
    """Raise an `OctavoError` that names the parts that cost most, if the model is too far from the float one."""
    if most is None or fidelity.kl <= most:
        return
    say(cost_table(costs, []))
    blamed = ", ".join(cost.name for cost in costliest(costs)[:BLAMED])
    raise OctavoError(
        f"{named('max_kl')} {most}: KL is {fidelity.kl:.5f} over {fidelity.tokens} held-back tokens, nothing was "
        f"written; most is lost in {blamed}: leave some in float ({named('float_costliest')}, "
        f"{named('float_linears')}), or try another {named('anti_method')}"
    )


def run(job: Job, stage: Stage) -> Made:
    """Fill a stage, from where it stands.

    Raises:
        OctavoError: anything that the user can mend.
    """
    request = job.request
    _write_texts(stage.path, job)
    if stage.step:
        job.settle(stage.notes["sharp"])
    else:
        _begin(job, stage)
    floats, surveyed = stage.notes["floats"], _costs(stage.notes["surveyed"])
    plan = job.plan(floats, stage.notes["wide"])
    if request.format == OWN_FORMAT:  # what else is written is not for the engines that are warned of
        for note in notes(request.target, plan, job.source):
            say(f"note: {note}")
    known = job.of_whole if not stage.step else None
    conversion = job.conversion(plan, known, measures=request.max_kl is not None)
    output, planned = conversion.output, conversion.output.planned()
    labels = {name: plan.described(label) for name, label in output.labels().items()}
    description = build_description(planned, output.tied_labels(), labels, plan.scheme, plan.linear.group_size)
    most_bytes = None if request.max_shard_gb is None else round(request.max_shard_gb * GIGABYTE)
    files = PlannedFiles(stage.path, weight_file_names(description)[0], planned, most_bytes)
    files.create()
    if stage.step:
        _go_on(job, plan, stage, files, conversion)
    _convert_layers(job, stage, files, conversion)
    fidelity, otherwise = _convert_rest(files, conversion)
    _check_kl(request.max_kl, fidelity, conversion.state.costs)
    _write_rest(stage.path, job, plan, description)
    nbytes = sum(file.stat().st_size for file in stage.path.iterdir() if file.is_file())
    bits = bits_per_weight(planned, layer_weights(job, plan))
    costs, unreached = tuple(conversion.state.costs or surveyed), tuple(conversion.state.unreached)
    return Made(plan, tuple(floats), fidelity, otherwise, costs, unreached, nbytes, bits, conversion.found())
