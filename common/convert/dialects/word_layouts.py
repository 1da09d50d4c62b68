"""What the writers of AWQ and GPTQ share: linears of one size of groups, scales in float16, the engine's own cache.

N output channels, K input channels, G groups of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from ...errors import OctavoError
from ...runtime.checkpoint.files import TensorHeader
from .caches import FLOAT, ONLINE, kind_of, online_name, quantized_layers, why_not
from .compressed_tensors import ONLINE_DTYPES, split_units
from .dialect import Target, native_settings, write_texts
from .directory import OctavoDirectory
from .form import Form, LinearForm
from .tensor_plan import TensorPlan

LMDEPLOY_GROUP = 128
"""Input channels of the only groups that LMDeploy takes."""
Pack = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
"""From a name, codes `[N, K]`, zeros and scales `[N, G]` to tensors by the ends of their names."""


def layer_linears(form: Form) -> dict[str, LinearForm]:
    """The linears in codes but for the last one, which is written in float."""
    return {name: linear for name, linear in form.linears.items() if name != form.head}


def _group(linear: LinearForm) -> int:
    """Input channels that share a scale."""
    return linear.group_size or linear.in_features


def group_of(form: Form) -> int | None:
    """The size of the groups of all linears, -1 where each has one of all its channels; None if sizes differ."""
    linears = layer_linears(form).values()
    if not any(linear.group_size for linear in linears):
        return -1
    sizes = {_group(linear) for linear in linears}
    return next(iter(sizes)) if len(sizes) == 1 else None


def unsaid(form: Form, labels: tuple[str, ...], instead: str, multiple: int) -> Iterator[str]:
    """Refusals that AWQ and GPTQ have in common.

    Args:
        labels: kinds of linears that the layout holds.
        instead: flags of a conversion that makes such linears.
        multiple: of output channels that fill words.
    """
    linears = layer_linears(form)
    if form.architecture.decoder.experts is not None:
        yield (
            f"{form.architecture.name}: layers of experts are not written in this format; serve the directory itself, "
            "by models/*/run.py"
        )
    if not linears:
        yield f"no linear is in codes; convert with {instead}"
    for name, linear in linears.items():
        if linear.label not in labels:
            yield f"{name} is in {linear.label}, and the layout holds {' and '.join(labels)}; convert with {instead}"
        if linear.out_features % multiple:
            yield f"{name} has {linear.out_features} output channels, no multiple of {multiple}; leave it in float"
    if len({linear.label for linear in linears.values()}) > 1:
        yield f"linears are of several kinds, and the layout has one; convert with {instead}"
    if linears and group_of(form) is None:
        sizes = " and ".join(map(str, sorted({_group(linear) for linear in linears.values()})))
        yield f"linears have groups of {sizes} channels, and the layout has one size; convert with --group_size 32"
    for name in form.added_biases:
        yield f"{name} has a bias that the architecture has not, and engines skip it; convert with --anti_method m3"
    yield from split_units(form)
    if kind_of(form, ONLINE_DTYPES) not in (FLOAT, ONLINE):
        yield why_not(
            form,
            f"nothing of a cache, so that it is one that the engine quantizes by itself ({', '.join(ONLINE_DTYPES)}) "
            "or in float,",
            "give --scheme int8-token, or --format compressed-tensors",
        )


@dataclass
class HalfScales:
    """Scales as float16, and what of them was rounded to it.

    Attributes:
        rounded: names of linears whose scales are others in float16.
    """

    rounded: list[str] = field(default_factory=list)

    def __call__(self, name: str, scale: torch.Tensor) -> torch.Tensor:
        """`[N, G]` as float16.

        Raises:
            OctavoError: one is too large for it.
        """
        half = scale.half()
        if not bool(torch.isfinite(half).all()):
            raise OctavoError(
                f"{name}: a scale of {float(scale.max()):g} is too large for float16, which the layout has"
            )
        if not torch.equal(half.float(), scale.float()):
            self.rounded.append(name)
        return half


def write_words(
    directory: OctavoDirectory,
    target: Target,
    config: dict[str, Any],
    headers: Callable[[LinearForm, int], Mapping[str, TensorHeader]],
    pack: Pack,
) -> list[str]:
    """Write a directory whose linears are packed in words; returns notes for the user.

    Args:
        config: `quantization_config` of config.json.
        headers: of the tensors of a linear, by the ends of their names, from it and its number of groups.
        pack: makes them.
    """
    form, plan, half = directory.form, TensorPlan(directory), HalfScales()
    for name in directory.floats():
        plan.keep(name)
    for name, linear in layer_linears(form).items():
        groups = linear.in_features // linear.group_size if linear.group_size else 1
        planned = {f"{name}.{end}": header for end, header in headers(linear, groups).items()}

        def make(name: str = name) -> dict[str, torch.Tensor]:
            parts = directory.linear(name)
            zero = torch.zeros_like(parts.scale) if parts.zero is None else parts.zero
            found = pack(name, parts.codes, zero, half(name, parts.scale))
            return {f"{name}.{end}": tensor for end, tensor in found.items()}

        plan.make(planned, make)
    floats = [form.embedding] if form.has_coded_embedding else []
    floats += [form.head] if form.head in form.linears else []
    for name in floats:
        plan.decode(name)
    settings = native_settings(directory) | {"quantization_config": config}
    write_texts(directory, target, settings)
    plan.write(target.path, target.most_bytes)
    notes = [f"{' and '.join(floats)}: written in float, as the codes stand for it"] if floats else []
    if half.rounded:
        notes.append(f"scales of {len(half.rounded)} linears, as {half.rounded[0]}, are rounded to float16")
    return notes


def lmdeploy_command(place: Path, model_format: str) -> str:
    """The command that serves groups of `LMDEPLOY_GROUP` with LMDeploy."""
    return f"lmdeploy serve api_server {quote(str(place))} --model-format {model_format}  # LMDeploy 0.18, on GPUs"


def serve_words(form: Form, place: Path, where: str = "") -> list[str]:
    """The command that serves it with vLLM; `where` says on which devices alone."""
    if kind_of(form, ONLINE_DTYPES) == FLOAT:
        return [f"vllm serve {quote(str(place))}  # vLLM 0.32{where}"]
    dtype = online_name(quantized_layers(form)[0], ONLINE_DTYPES)
    floats = form.float_layers()
    skipped = f" --kv-cache-dtype-skip-layers {' '.join(map(str, floats))}" if floats else ""
    return [f"vllm serve {quote(str(place))} --kv-cache-dtype {dtype}{skipped}  # vLLM 0.32, on GPUs"]
