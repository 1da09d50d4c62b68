"""The conversion that every `models/*/convert_quant_weights.py` runs: float checkpoint in, quantized directory out."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..architecture import Architecture
from ..command import run_script
from ..errors import OctavoError
from ..runtime.cache.sizes import kv_bits_per_element, kv_bytes_per_token
from ..runtime.checkpoint.ascend import DESCRIPTION_FILE, build_description, weight_file_names
from ..runtime.checkpoint.loading import CONFIG_KEY, NATIVE_LOAD_HINT
from ..runtime.schemes.kv_scheme import CROP_ROOM, load_scheme
from ..runtime.static_scales import Statistics
from .flags import parse_flags
from .job import Job, say
from .measure.fidelity import Fidelity
from .measure.sensitivity import cost_table, costliest, worst_outliers
from .output.bundle import bundle
from .output.shards import PlannedFiles, digest_of
from .output.writer import Stage, whole_directory, write_json
from .pipeline import Cost
from .plan import Plan
from .source.checkpoint import FLOAT_DTYPES, source_files
from .source.config import GENERATION_FILE, bearable, carried_generation_config
from .source.tokenizer import carry_tokenizer

GIGABYTE = 10**9
BLAMED = 5
"""How many linears and attentions `--max_kl` names."""
COMPARED_TEXTS = 32
"""Calibration texts of which the output's tokenizer must make the ids that the source's makes."""
FEW_TOKENS = 100
"""Below this the summary says that its figures mean little."""


def output_config(
    source: dict[str, Any], architecture: Architecture, plan: Plan, ties_head: bool = True
) -> dict[str, Any]:
    """The config.json to write: the source's, with what loads the modeling file and says the scheme.

    Args:
        ties_head: whether the source's last linear is its embedding, if its config says so.
    """
    config = {
        **bearable(source),
        "architectures": [architecture.model_class.__name__],
        "auto_map": architecture.auto_map,
        CONFIG_KEY: {"scheme": plan.scheme.to_dict()},
        "transformers_weights": NATIVE_LOAD_HINT,
    }
    if architecture.decoder.head in plan.linears or not ties_head:
        config["tie_word_embeddings"] = False
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    if "rope_theta" in (config.get("rope_parameters") or {}):
        # Readers built on transformers 4, MindIE among them, look for it here and else take 10000 in silence.
        config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
    return config


def _survey(job: Job) -> tuple[list[str], list[Cost]]:
    """What `--disable_level` and `--fa_amp` leave in float, and what each linear and attention costs, if measured."""
    floats = worst_outliers(job.source, job.linears, job.samples, job.flags.disable_level)
    if not job.flags.fa_amp:
        return floats, []
    trial = job.conversion(job.plan(floats), job.codebooks, measures=True)
    for index in tqdm(range(len(job.source)), desc="measuring", unit="layer"):
        trial.layer(index)
    worst = costliest(trial.costs)[: job.flags.fa_amp]
    return [*floats, *(cost.name for cost in worst)], trial.costs


def _write_texts(stage: Path, job: Job) -> None:
    """The tokenizer and the config of generation, before anything is computed, since they may be refused."""
    write_json(stage / "config.json", bearable(job.config))
    carry_tokenizer(job.directory, stage, job.flags.trust_remote_code, job.texts[:COMPARED_TEXTS])
    generation = carried_generation_config(job.directory)
    if generation is not None:
        write_json(stage / GENERATION_FILE, generation)


def _write_rest(stage: Path, job: Job, plan: Plan, description: dict[str, Any]) -> None:
    """What says how the tensors are to be read."""
    write_json(stage / DESCRIPTION_FILE, description)
    write_json(stage / "config.json", output_config(job.config, job.architecture, plan, bool(job.source.tied)))
    for name, text in bundle(job.architecture).items():
        (stage / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Made:
    """What a conversion made, how close that is to the float model, its size in bytes, and its statistics."""

    plan: Plan
    fidelity: Fidelity | None
    size: int
    statistics: Statistics


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
    conversion = job.conversion(plan, job.codebooks)
    for index in tqdm(range(damaged[-1] + 1), desc="mending", unit="layer"):
        tensors = conversion.layer(index)
        if index in damaged:
            digests[index] = _written(tensors, files)
    files.sync()
    stage.amend(stage.notes | {"layers": digests})


def _run(job: Job, stage: Stage) -> Made:
    """Fill a stage, from where it stands."""
    flags = job.flags
    _write_texts(stage.path, job)
    if flags.resume and not stage.step:
        say(f"{stage.damage or f'nothing to resume in {stage.path}'}: starting with the first layer")
    if not stage.step:
        floats, costs = _survey(job)
        stage.notes = {"floats": floats}
        if costs:
            say(cost_table(costs, floats))
    plan = job.plan(stage.notes["floats"])
    known = job.codebooks if not stage.step else None
    conversion = job.conversion(plan, known, measures=flags.max_kl is not None)
    planned = conversion.planned()
    description = build_description(
        planned, conversion.tied(), conversion.labels(), plan.scheme, plan.linear.group_size
    )
    most_bytes = None if flags.part_file_size is None else flags.part_file_size * GIGABYTE
    files = PlannedFiles(stage.path, weight_file_names(description)[0], planned, most_bytes)
    files.create()
    if stage.step:
        _mend(job, plan, stage, files)
        conversion.restore(stage.state)
        conversion.costs = [Cost(*cost) for cost in stage.notes["measured"]]
        say(f"going on behind layer {stage.step} of {len(job.source)}")
    digests = stage.notes.get("layers", [])
    layers = range(stage.step, len(job.source))
    for index in tqdm(layers, desc="converting", unit="layer", initial=stage.step, total=len(job.source)):
        digests = [*digests, _written(conversion.layer(index), files)]
        files.sync()
        measured = [dataclasses.astuple(cost) for cost in conversion.costs]
        notes = stage.notes | {"measured": measured, "layers": digests}
        stage.finish_step(index + 1, conversion.state(), notes)
    for name, rows, first in conversion.others():
        files.write(name, rows, first)
    tensors, fidelity = conversion.head()
    for name, tensor in tensors.items():
        files.write(name, tensor)
    if flags.max_kl is not None and not fidelity.kl <= flags.max_kl:
        say(cost_table(conversion.costs, []))
        blamed = ", ".join(cost.name for cost in costliest(conversion.costs)[:BLAMED])
        raise OctavoError(
            f"--max_kl {flags.max_kl}: KL is {fidelity.kl:.5f} over {fidelity.tokens} held-back tokens, nothing was "
            f"written; most is lost in {blamed}: leave "
            "some in float (--fa_amp, --disable_names), or try another --anti_method"
        )
    _write_rest(stage.path, job, plan, description)
    size = sum(file.stat().st_size for file in stage.path.iterdir() if file.is_file())
    return Made(plan, fidelity, size, conversion.found())


def _summary(job: Job, made: Made) -> None:
    config, plan, fidelity = job.source.config, made.plan, made.fidelity
    float_bytes = max(FLOAT_DTYPES[header.dtype].itemsize for header in job.headers.values())
    before = sum(file.stat().st_size for file in source_files(job.directory))
    rows = [
        ("", "float", "quantized"),
        ("checkpoint, MB", f"{before / 1e6:.1f}", f"{made.size / 1e6:.1f}"),
        ("KV cache, bytes per token", str(kv_bytes_per_token(config, load_scheme("float"), float_bytes)),
         str(kv_bytes_per_token(config, plan.scheme, float_bytes))),
        ("KV cache, bits per element, all counted", str(8 * float_bytes),
         f"{kv_bits_per_element(config, plan.scheme, crop_room=CROP_ROOM):.2f}"),
    ]  # fmt: skip
    if fidelity is not None:
        rows.append(("perplexity", f"{fidelity.float_perplexity:.3f}", f"{fidelity.perplexity:.3f}"))
        rows.append(("KL(float || quantized), nats per token", "", f"{fidelity.kl:.5f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print("\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows))
    if fidelity is not None:
        count = len(job.held_back)
        where = f"{count} text(s) held back from calibration" if len(job.texts) > 1 else "the one calibration text"
        print(f"perplexity and KL over {fidelity.tokens} tokens of {where}")
        if fidelity.tokens < FEW_TOKENS:
            print(f"fewer than {FEW_TOKENS} tokens: give more calibration texts for figures that mean something")
    linears = f"{len(plan.linears)} linears in {plan.linear.label}" if plan.linears else "linears in float"
    floats = ", ".join(map(str, plan.scheme.float_layers))
    attention = f"attention {plan.scheme.name}" + (f" but for layers {floats}" if floats else "")
    print(f"wrote {job.flags.save_directory}: {linears}, {attention}")
    for depth, group in sorted(set(job.odd_groups(plan))):
        print(f"linears of {depth} input channels have groups of {group}: {plan.linear.group_size} do not divide them")


def convert(architecture: Architecture, flags: argparse.Namespace) -> None:
    """Convert as the flags say, and print a summary.

    Raises:
        OctavoError: anything that the user can mend.
    """
    job = Job(architecture, flags)
    with whole_directory(flags.save_directory, "--save_directory", job.identity(), flags.resume) as stage:
        made = _run(job, stage)
    if flags.save_statistics is not None:
        made.statistics.save(flags.save_statistics)
    _summary(job, made)


def main(architecture: Architecture, argv: list[str] | None = None) -> int:
    """Entry point of a conversion script; returns the exit code."""
    return run_script(lambda arguments: convert(architecture, parse_flags(architecture.name, arguments)), argv)
