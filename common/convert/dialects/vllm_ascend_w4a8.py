"""W4A8_DYNAMIC for vllm-ascend: its only int4 of dense models, whose inputs it leaves in float.

Our own W4A16 is the same, by another layout, which vllm-ascend has no linear for. N output channels, K input channels.
"""

from collections.abc import Iterator
from pathlib import Path

from ...runtime.checkpoint.ascend import C8_MODULES, DESCRIPTION_FILE, build_description, c8_place
from ...runtime.checkpoint.files import TensorHeader
from ...runtime.schemes.kv_scheme import load_scheme
from ...runtime.schemes.linear_scheme import W4A16
from ..output.writer import write_json
from ..targets import W4A8_FORMAT, serving
from .caches import FLOAT, INT8_CHANNEL, kind_of, leaves_biases_out, quantized_layers, static_scheme, why_not
from .compressed_tensors import split_units
from .dialect import PARSED, Dialect, Engine, Target, native_settings, write_texts
from .directory import OctavoDirectory
from .form import Form, LinearForm
from .layouts.w4a8 import PER_BYTE, SHARES, w4a8_parts
from .tensor_plan import TensorPlan
from .word_layouts import group_of, layer_linears

LABEL = "W4A8_DYNAMIC"
_INSTEAD = "--w_bit 4 --a_bit 16"
_CHANNELS = 8
"""Output channels in a word of the operator."""


def _check(form: Form) -> Iterator[str]:
    """See `Dialect`."""
    linears = layer_linears(form)
    if form.architecture.decoder.experts is not None:
        yield f"{form.architecture.name}: experts are not written in this format; convert with --is_dynamic True"
    if not linears:
        yield f"no linear is in codes; convert with {_INSTEAD}"
    for name, linear in linears.items():
        if linear.label != W4A16:
            yield f"{name} is in {linear.label}, and the format holds {W4A16} alone; convert with {_INSTEAD}"
        if not linear.symmetric:
            yield f"{name} has zero points, which vllm-ascend leaves out; convert with --w_sym True"
        if linear.has_bias or name in form.added_biases:
            yield (
                f"{name} has a bias, which vllm-ascend leaves out of such linears; convert with --is_dynamic True "
                "--target vllm-ascend, or name it in --disable_names"
            )
        if linear.out_features % _CHANNELS:
            yield f"{name} has {linear.out_features} output channels, no multiple of {_CHANNELS}; leave it in float"
    if linears and (group_of(form) or 0) <= 0:
        yield "linears have no groups of one size, which the format states once; convert with --group_size 32"
    yield from split_units(form)
    kind = kind_of(form)
    if kind not in (FLOAT, INT8_CHANNEL) or any(scheme.query for scheme in quantized_layers(form)):
        yield why_not(form, "int8 per channel", f"give {static_scheme(form, 'ascend-c8')}, or --scheme float")
    elif form.folds and kind != FLOAT:
        yield leaves_biases_out(form)


def _shares_inputs(form: Form, name: str) -> bool:
    """Whether ranks share the inputs of a linear."""
    decoder = form.architecture.decoder
    return name.endswith((f".{decoder.attention.output}", f".{decoder.mlp.down}"))


def _headers(linear: LinearForm, shares_inputs: bool) -> dict[str, TensorHeader]:
    count, groups = linear.out_features, linear.in_features // (linear.group_size or linear.in_features)
    return {
        "weight": TensorHeader("I8", (count // PER_BYTE, linear.in_features)),
        "weight_scale": TensorHeader("F32", (count, 1)),
        "weight_offset": TensorHeader("F32", (count, 1)),
        "weight_scale_second": TensorHeader("F32", (count, groups)),
        "weight_offset_second": TensorHeader("F32", (count, groups)),
        "scale_bias": TensorHeader("F32", (count, SHARES if shares_inputs else 1)),
    }


def _add_scales(directory: OctavoDirectory, plan: TensorPlan) -> None:
    """Scales of K and V, `[G D]`, and zero points of 0, by the names that description and files have."""
    for index, (scheme, scales) in enumerate(zip(directory.form.schemes(), directory.scales(), strict=True)):
        if scheme.key is None:
            continue
        for module, (scale, _) in zip(C8_MODULES, (scales.key, scales.value), strict=True):
            values = scale.float().flatten()
            for end, tensor in (("scale", values), ("offset", values.new_zeros(values.shape))):
                plan.add({".".join((directory.form.attention(index), *c8_place(module, end, False))): tensor})


def _write(directory: OctavoDirectory, target: Target) -> list[str]:
    """See `Dialect`."""
    form, plan = directory.form, TensorPlan(directory)
    for name in directory.floats():
        plan.keep(name)
    linears = layer_linears(form)
    for name, linear in linears.items():
        shares = _shares_inputs(form, name)

        def make(name: str = name, shares: bool = shares) -> dict:
            parts = directory.linear(name)
            return {f"{name}.{end}": made for end, made in w4a8_parts(parts.codes, parts.scale, shares).items()}

        plan.make({f"{name}.{end}": header for end, header in _headers(linear, shares).items()}, make)
    decoded = [form.embedding] if form.has_coded_embedding else []
    decoded += [form.head] if form.head in form.linears else []
    for name in decoded:
        plan.decode(name)
    if kind_of(form) != FLOAT:
        _add_scales(directory, plan)
    tied = {} if f"{form.head}.weight" in plan.headers else {f"{form.head}.weight": "FLOAT"}
    scheme = load_scheme("float" if kind_of(form) == FLOAT else "ascend-c8")
    labels = dict.fromkeys(linears, LABEL)
    write_json(
        target.path / DESCRIPTION_FILE, build_description(plan.headers, tied, labels, scheme, group_of(form) or 0)
    )
    write_texts(directory, target, native_settings(directory))
    plan.write(target.path, target.most_bytes)
    notes = ["inputs of linears stay in float there, and scales are rounded to the dtype in which it runs the model"]
    return notes + [f"{name}: written in float, as the codes stand for it" for name in decoded]


def _serve(form: Form, place: Path) -> list[str]:
    """See `Dialect`."""
    return serving("vllm-ascend", place)


VLLM_ASCEND_W4A8 = Dialect(
    name=W4A8_FORMAT,
    about="W4A16 in groups as the W4A8_DYNAMIC of vllm-ascend, whose dense linears leave inputs in float",
    engines=(Engine("vllm-ascend", "0.25.1rc1", PARSED, "W4A16 in groups of one size, without biases; C8"),),
    check=_check,
    write=_write,
    serve=_serve,
)
