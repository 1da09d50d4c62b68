"""Which engine a directory in Ascend's dialect is for, and what each of them cannot read of what Octavo writes in it.

Read in MindIE-LLM of 2026-04, in vllm-ascend 0.23.0 and 0.25.1rc1 beside vLLM of the same number, and in what these do
with directories of Octavo (`tests/engines/test_vllm_ascend.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from ..errors import OctavoError
from ..runtime.checkpoint.ascend import W8A8_MIX, W8A8FP8_DYNAMIC, is_c8, is_fa
from ..runtime.schemes.linear_scheme import FP8_DYNAMIC, FP8_LABELS, W4A16, W8A8, W8A8_DYNAMIC, W8A16, WEIGHT_ONLY
from .outliers.subgraphs import shifted_subgraphs
from .plan import OFFSETS, Plan
from .request import TARGETS
from .source.layerwise import LayerwiseModel
from .spelling import named
from .units import units_of


@dataclass(frozen=True)
class Reader:
    """What an engine reads of the dialect.

    Attributes:
        name: as users know it.
        labels: of linears.
        expert_labels: of linears of experts.
        groups: numbers of input channels that may share a scale of a weight, 0 for all.
        reads_fa: whether it runs FAQuant.
        subtracts_offset: whether the zero point of a weight counts as it is stored, `(code - offset) * scale`.
        called: its labels of linears that are ours by another name, by ours.
        laid_out: labels of linears that it reads from codes in another layout than ours.
        serve: the command that runs a directory, whose place `{}` takes.
    """

    name: str
    labels: tuple[str, ...]
    expert_labels: tuple[str, ...]
    groups: tuple[int, ...]
    reads_fa: bool
    subtracts_offset: bool
    called: Mapping[str, str]
    laid_out: tuple[str, ...]
    serve: str


_OF_MINDIE = (W8A8, W8A8_DYNAMIC, W8A16)
_OF_VLLM = (W8A8, W8A8_DYNAMIC, W8A16, W8A8_MIX, W8A8FP8_DYNAMIC)
_RUN = "cd ${ATB_SPEED_HOME_PATH} && torchrun --nproc_per_node 1 --master_port 20030 -m examples.run_pa --model_path {}"
_SERVE = "vllm serve {} --quantization ascend"
# MindIE casts weights in uint8, as ours in int4 are, to the model's dtype, and takes those for float; msmodelslim's are
# pairs of codes in int8, in groups along the other axis.
_MINDIE = Reader("MindIE", (*_OF_MINDIE, W8A8_MIX), _OF_MINDIE, (0, 64, 128, 256), True, True, {}, (W4A16,), _RUN)
_VLLM_ASCEND = Reader(
    "vllm-ascend", _OF_VLLM, (W8A8_DYNAMIC,), (0,), False, False, {FP8_DYNAMIC: W8A8FP8_DYNAMIC}, (), _SERVE
)
READERS = dict(zip(TARGETS, (_MINDIE, _VLLM_ASCEND, _VLLM_ASCEND), strict=True))
W4A8_FORMAT = "vllm-ascend-w4a8"
"""The dialect of int4 for vllm-ascend."""
TRIED = dict(zip(TARGETS, ("MindIE-LLM of 2026-04", "0.23.0", "0.25.1rc1"), strict=True))
"""Versions that a target was tried with."""


def called_by(target: str | None, is_mix: bool) -> dict[str, str]:
    """What a description calls labels of ours otherwise, for a target, and where static W8A8 is to be W8A8_MIX."""
    called = {} if target is None else dict(READERS[target].called)
    return {**called, W8A8: W8A8_MIX} if is_mix else called


def serving(target: str | None, place: Path) -> list[str]:
    """What a directory is for and the command that serves it, in lines; none without a target."""
    if target is None:
        return []
    reader, version = READERS[target], TRIED[target].removeprefix("MindIE-LLM ")
    return [f"{reader.serve.replace('{}', quote(str(place)))}  # {reader.name} {version}"]


def engine_dtype(config: Mapping[str, Any], stored: str) -> torch.dtype:
    """The dtype in which engines on Ascend run a model: float16, or else bfloat16, which they make of float32, too.

    Args:
        config: what config.json holds, whose dtype counts.
        stored: dtype of the tensors, as safetensors spells it, for a config that says nothing.
    """
    stated = config.get("dtype") or config.get("torch_dtype") or {"F16": "float16"}.get(stored)
    return torch.float16 if str(stated).removeprefix("torch.") in ("float16", "half") else torch.bfloat16


def _of_cache(reader: Reader, plan: Plan) -> Iterator[str]:
    scheme = plan.scheme
    if is_fa(scheme) and not reader.reads_fa:
        yield (
            f"{reader.name} has no FAQuant for such models (it registers FAKQuant and INT8_DYNAMIC alone), which is "
            f"MindIE's; give {named('scheme')} ascend-c8, or {named('target')} mindie"
        )
    elif scheme.is_quantized and not (is_c8(scheme) or is_fa(scheme)):
        known = "ascend-c8 or ascend-fa" if reader.reads_fa else "ascend-c8"
        yield f"{reader.name} has no name for scheme {scheme.name}; give {named('scheme')} {known}"


def _known(reader: Reader) -> str:
    """Labels that an engine reads, with the flag that gives those which are ours by another name."""
    given = {W8A8_MIX: f"{named('pdmix')} True", W8A8FP8_DYNAMIC: f"{named('label')} fp8"}
    return ", ".join(f"{label} ({given[label]})" if label in given else label for label in reader.labels)


def _of_linears(reader: Reader, plan: Plan) -> Iterator[str]:
    if plan.quantizes_embeddings:
        yield f"{reader.name} reads embeddings in float alone; leave out {named('embeddings')}"
    decoded = f"; {named('requantize')} makes others of those of the source" if plan.coded else ""
    for ours, group, _ in plan.kinds:
        label = plan.described(ours)
        if label not in reader.labels:
            other = f"; {W4A16} without biases is written by {named('format')} {W4A8_FORMAT}" * (ours == W4A16)
            lacks = f"has no linears of {label}"
            if label in reader.laid_out:
                lacks = f"reads {label} in another layout of codes"
            yield f"{reader.name} {lacks}; give one of {_known(reader)}{decoded}{other}"
        elif label in WEIGHT_ONLY and group not in reader.groups:
            known = ", ".join(map(str, reader.groups))
            yield f"{reader.name} reads {label} by {named('group_size')} {known}, not {group}{decoded}"
    for name in plan.linears:
        if plan.label_of(name) in FP8_LABELS and plan.has_one_scale(name):
            yield f"{reader.name} reads a scale for each output channel, and {name} has one for all{decoded}"
            return


def _of_experts(reader: Reader, plan: Plan, source: LayerwiseModel) -> Iterator[str]:
    """Linears of experts, of which engines read other kinds than of the rest."""
    chosen = set(plan.linears)
    for index in range(len(source)):
        count = source.experts_in(index)
        for mlp in source.facts.mlps(count) if count else ():
            for name in (f"{source.layer_name(index)}.{part}" for part in (*mlp.inputs, mlp.down)):
                label = plan.described(plan.label_of(name)) if name in chosen else None
                if label is not None and label not in reader.expert_labels:
                    yield (
                        f"{reader.name} has no experts of {label}, which {name} is; give "
                        f"{', '.join(reader.expert_labels)}, or leave experts in float by {named('float_linears')}"
                    )
                    return


def _of_units(reader: Reader, plan: Plan, source: LayerwiseModel) -> Iterator[str]:
    """Linears that engines load as one, of which some are in codes and some are not."""
    chosen = set(plan.linears)
    for unit in units_of(source):
        if 0 < len(chosen.intersection(unit)) < len(unit):
            left, other = (next(name for name in unit if (name in chosen) == is_in) for is_in in (False, True))
            every = "both" if len(unit) == 2 else f"all {len(unit)} of such"
            yield (
                f"{reader.name} loads {left} and {other} as one, and only one of them is quantized; name {every} in "
                f"{named('float_linears')}, or none"
            )
            return


def _skipped_bias(plan: Plan, source: LayerwiseModel) -> str | None:
    """A linear that m2 gives a bias, which its architecture has none of, and which no int32 bias of W8A8 holds."""
    if plan.anti_method != OFFSETS:
        return None
    static = {name for name in plan.linears if plan.described(plan.label_of(name)) == W8A8}
    for index in range(len(source)):
        layer = source.layer_name(index)
        quantized = plan.of(layer)
        for subgraph in shifted_subgraphs(source.facts, source.experts_in(index)):
            if not any(part in quantized for part in subgraph.consumers):
                continue
            for name in (f"{layer}.{part}" for part in subgraph.consumers):
                if name not in static and source.model.get_submodule(name).bias is None:
                    return name
    return None


def misread(reader: Reader, plan: Plan, source: LayerwiseModel) -> Iterator[str]:
    """What an engine takes for something else, or leaves out, without a word."""
    skipped = _skipped_bias(plan, source)
    if skipped is not None:
        yield (
            f"{reader.name} skips the bias that {named('anti_method')} m2 gives {skipped}, whose architecture has none "
            "there; take W8A8 for all linears behind a norm, or another method"
        )
    has_zero = any(label in WEIGHT_ONLY and not symmetric for label, _, symmetric in plan.kinds)
    if has_zero and not reader.subtracts_offset:
        way = f"{named('requantize')} makes others" if plan.coded else f"leave out {named('symmetric')} False"
        yield (
            f"{reader.name} adds the zero points of weights (`(code + offset) * scale`), which are stored to be taken "
            f"off, as MindIE does; {way}"
        )


def _stops_older(plan: Plan) -> str | None:
    if (is_c8(plan.scheme) or is_fa(plan.scheme)) and plan.scheme.float_layers:
        layers = ", ".join(map(str, plan.scheme.float_layers))
        return (
            f"MindIE's older loader (atb_llm) looks for scales of K and V in every layer, and stops at {layers}, in "
            "float; its newer one, and vllm-ascend, do not"
        )
    return None


def check_target(target: str | None, plan: Plan, source: LayerwiseModel) -> None:
    """Raise an `OctavoError` that says what the chosen engine cannot read of a plan, and the way out.

    Args:
        target: one of `TARGETS`; None checks nothing.
        plan: what is to be made.
        source: the float model.
    """
    if target is None:
        return
    reader = READERS[target]
    of_linears = _of_linears(reader, plan), _of_experts(reader, plan, source)
    checks = (_of_cache(reader, plan), *of_linears, _of_units(reader, plan, source))
    for reasons in (*checks, misread(reader, plan, source)):
        for reason in reasons:
            raise OctavoError(f"{named('target')} {target}: {reason}")


def notes(target: str | None, plan: Plan, source: LayerwiseModel) -> list[str]:
    """What is to be said of engines that could load what a plan makes, and run it wrong or stop.

    Only where no `target` is chosen, which would have refused it, and of what engines have names for.
    """
    found = []
    if target is None:
        for reader in (_MINDIE, _VLLM_ASCEND):
            if not [*_of_cache(reader, plan), *_of_linears(reader, plan), *_of_experts(reader, plan, source)]:
                found += [*_of_units(reader, plan, source), *misread(reader, plan, source)]
    older = _stops_older(plan)
    if older is not None and target in (None, TARGETS[0]):
        found.append(older)
    return found
