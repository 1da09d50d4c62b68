"""ModelOpt: `hf_quant_config.json`, as TensorRT-LLM and vLLM read it, for fp8 weights and an fp8 KV cache.

N output channels, K input channels.
"""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from ...runtime.checkpoint.files import TensorHeader
from ...runtime.schemes.linear_scheme import FP8, FP8_DYNAMIC
from ..output.writer import write_json
from .caches import FLOAT, FP8_TENSOR, kind_of, static_scheme
from .compressed_tensors import split_units
from .dialect import NAMES, RUN, Dialect, Engine, Target, native_settings, write_texts
from .directory import OctavoDirectory
from .form import Form, LinearForm
from .plain import check_static, static_pairs
from .tensor_plan import TensorPlan

CONFIG = "hf_quant_config.json"
VERSION = "0.40.0"
"""Of ModelOpt, whose layout this is."""


def _algorithm(linear: LinearForm) -> str | None:
    """ModelOpt's name of a kind of linear; None if it has none that this writes."""
    if linear.label == FP8 and linear.per_tensor:
        return "FP8"
    return "FP8_PER_CHANNEL_PER_TOKEN" if linear.label == FP8_DYNAMIC and not linear.per_tensor else None


def _coded(form: Form) -> dict[str, LinearForm]:
    """The linears that are written in codes; the last one is not."""
    return {name: linear for name, linear in form.linears.items() if name != form.head}


def _check(form: Form) -> Iterator[str]:
    """See `Dialect`."""
    for name, linear in _coded(form).items():
        if _algorithm(linear) is None:
            yield (
                f"{name} is {linear.label}, and the format says fp8 alone: convert with --quantization fp8, or write "
                "--format compressed-tensors"
            )
    for name in form.added_biases:
        yield f"{name} has a bias that engines skip; convert with --anti_method m1 or m4 in the place of m2"
    if form.architecture.decoder.experts is not None:
        yield f"{form.architecture.name}: layers of experts are not written in this format; serve the directory itself"
    yield from split_units(form)
    if kind_of(form) != FLOAT:
        yield from check_static(form, (FP8_TENSOR,), f"give {static_scheme(form, 'vllm-fp8')}, or --scheme float")
    elif not _coded(form):
        yield "nothing is quantized that the format could say; convert with --quantization fp8"


def _headers(name: str, linear: LinearForm) -> dict[str, TensorHeader]:
    shape = (linear.out_features, linear.in_features)
    scale = () if linear.per_tensor else (linear.out_features,)
    found = {"weight": TensorHeader("F8_E4M3", shape), "weight_scale": TensorHeader("F32", scale)}
    if linear.label == FP8:
        found["input_scale"] = TensorHeader("F32", ())
    return {f"{name}.{part}": header for part, header in found.items()}


def _tensors(directory: OctavoDirectory, name: str, linear: LinearForm) -> dict[str, torch.Tensor]:
    parts = directory.linear(name)
    found = {"weight": parts.codes, "weight_scale": parts.scale, "input_scale": parts.input_scale}
    headers = _headers(name, linear)
    return {whole: found[whole.rpartition(".")[2]].reshape(header.shape) for whole, header in headers.items()}


def _quantization(form: Form) -> dict[str, Any]:
    coded = _coded(form)
    return {
        "quant_algo": _algorithm(next(iter(coded.values()))) if coded else None,
        "kv_cache_quant_algo": None if kind_of(form) == FLOAT else "FP8",
        "exclude_modules": sorted({*form.float_linears, form.head}),
    }


def _write(directory: OctavoDirectory, target: Target) -> list[str]:
    """See `Dialect`."""
    form, plan = directory.form, TensorPlan(directory)
    for name in directory.floats():
        plan.keep(name)
    for name, linear in _coded(form).items():
        plan.make(_headers(name, linear), lambda name=name, linear=linear: _tensors(directory, name, linear))
    decoded = [name for name in (form.embedding, form.head) if name in form.linears]
    decoded += [form.embedding] * form.has_coded_embedding
    for name in decoded:
        plan.decode(name)
    if kind_of(form) != FLOAT:
        for index, (key, value) in enumerate(static_pairs(directory)):
            attention = form.attention(index)
            plan.add({f"{attention}.k_proj.k_scale": key.view(()), f"{attention}.v_proj.v_scale": value.view(())})
    said = {"producer": {"name": "modelopt", "version": VERSION}, "quantization": _quantization(form)}
    write_json(target.path / CONFIG, said)
    write_texts(directory, target, native_settings(directory))
    plan.write(target.path, target.most_bytes)
    return [f"{' and '.join(decoded)}: written in float, as the codes stand for it"] if decoded else []


def _serve(form: Form, place: Path) -> list[str]:
    """See `Dialect`."""
    cache = "" if kind_of(form) == FLOAT else " --kv-cache-dtype fp8"
    lines = [f"vllm serve {quote(str(place))} --quantization modelopt{cache}  # vLLM 0.32"] if _coded(form) else []
    return [*lines, f"trtllm-serve {quote(str(place))}{cache.replace('-cache-dtype', '_cache_dtype')}  # TensorRT-LLM"]


MODELOPT = Dialect(
    name="modelopt",
    about="hf_quant_config.json, for TensorRT-LLM and vLLM: fp8 linears and fp8 KV cache",
    engines=(
        Engine("vLLM", "0.32", RUN, "fp8 linears, fp8 KV per tensor"),
        Engine("TensorRT-LLM", "1.x", NAMES, "the same; its PyTorch backend takes 1 for scales of fp8 KV"),
    ),
    check=_check,
    write=_write,
    serve=_serve,
)
