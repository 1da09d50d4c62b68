"""compressed-tensors: `quantization_config` in config.json, as vLLM, SGLang and transformers read it.

Weights `x = (code - zero) * scale`, as here, so that codes, scales and zero points stay bit for bit what they are.
N output channels, K input channels, H query heads, G KV heads, D head_dim.
"""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from ...runtime.checkpoint.files import TensorHeader
from ...runtime.schemes.linear_scheme import (
    FP8,
    FP8_DYNAMIC,
    W4A16,
    W4A16_DOUBLE,
    W8A8,
    W8A8_DYNAMIC,
    W8A8_MIXED,
    W8A16,
    WEIGHT_ONLY,
)
from ..units import units_of_layer
from .caches import (
    FLOAT,
    FP8_HEAD,
    FP8_TENSOR,
    INT8_CHANNEL,
    ONLINE,
    kind_of,
    leaves_biases_out,
    online_name,
    quantized_layers,
    static_scheme,
    why_not,
)
from .dialect import NAMES, PARSED, RUN, Dialect, Engine, Target, native_settings, write_texts
from .directory import OctavoDirectory
from .form import Form, LinearForm
from .layouts.compressed_tensors import METHOD, pack_signed, pack_zero_points
from .layouts.words import words_of
from .tensor_plan import TensorPlan

FORMATS_OF = {W8A8: "int-quantized", W8A8_DYNAMIC: "int-quantized", W8A16: "pack-quantized", W4A16: "pack-quantized",
              FP8: "float-quantized", FP8_DYNAMIC: "float-quantized"}  # fmt: skip
BITS = {W4A16: 4}
ONLINE_DTYPES = {
    "int8-token": "int8_per_token_head",
    "int4-token": "int4_per_token_head",
    "fp8-token": "fp8_per_token_head",
    "fp8_e5m2": "fp8_e5m2",
}
"""Schemes of vLLM that need no scales in a checkpoint, and its `--kv-cache-dtype`."""
STRATEGIES = {FP8_TENSOR: ("float", "tensor"), FP8_HEAD: ("float", "attn_head"), INT8_CHANNEL: ("int", "channel")}


def _check(form: Form) -> Iterator[str]:
    """See `Dialect`."""
    if form.architecture.decoder.experts is not None:
        yield (
            f"{form.architecture.name}: layers of experts are not written in this format; serve the directory itself, "
            "by models/*/run.py"
        )
    for name, linear in form.linears.items():
        if linear.label == W8A8_MIXED and name != form.head:
            yield (
                f"{name} keeps outlier channels in float ({W8A8_MIXED}), which no engine reads; convert with "
                "--is_dynamic True"
            )
        elif linear.label == W4A16_DOUBLE:
            yield (
                f"{name} has scales and zero points in 8 bits ({W4A16_DOUBLE}), which only Octavo and --format gguf "
                "read; convert with --scale_bits 16"
            )
    for name in form.added_biases:
        yield (
            f"{name} has a bias that the architecture has not, and engines skip it; convert with --anti_method m1 or "
            "m4 in the place of m2"
        )
    yield from split_units(form)
    yield from _check_cache(form)


def split_units(form: Form) -> Iterator[str]:
    """Refusals of linears that engines fuse, q, k and v, gate and up, and that are not quantized alike."""
    for index in range(form.layers):
        layer = form.architecture.layer_name(index)
        for names in units_of_layer(layer, form.architecture.decoder):
            kinds = {_kind(form.linears.get(name)) for name in names}
            if len(kinds) > 1:
                yield (
                    f"{', '.join(name.rpartition('.')[2] for name in names)} of {layer} are not quantized alike, and "
                    "engines make one linear of them; name all of them in --disable_names, or none"
                )


def _kind(linear: LinearForm | None) -> tuple | None:
    return None if linear is None else (linear.label, linear.group_size, linear.symmetric, linear.per_tensor)


def _check_cache(form: Form) -> Iterator[str]:
    kind = kind_of(form, ONLINE_DTYPES)
    if kind not in (FLOAT, ONLINE, *STRATEGIES):
        yield why_not(
            form,
            f"fp8 per tensor or head, int8 per channel, and what vLLM quantizes by itself ({', '.join(ONLINE_DTYPES)})",
            f"give {static_scheme(form, 'vllm-fp8')}, or --scheme int8-token",
        )
    elif form.folds and kind != ONLINE:
        yield leaves_biases_out(form)


def _weights(linear: LinearForm) -> dict[str, Any]:
    is_float = FORMATS_OF[linear.label] == "float-quantized"
    strategy = "group" if linear.group_size else "tensor" if linear.per_tensor else "channel"
    found = {"num_bits": BITS.get(linear.label, 8), "type": "float" if is_float else "int", "dynamic": False}
    return {**found, "symmetric": linear.symmetric, "strategy": strategy, "group_size": linear.group_size or None}


def _inputs(linear: LinearForm) -> dict[str, Any] | None:
    if linear.label in WEIGHT_ONLY:
        return None
    is_dynamic = linear.label in (W8A8_DYNAMIC, FP8_DYNAMIC)
    found = {"num_bits": 8, "type": _weights(linear)["type"], "symmetric": linear.symmetric_inputs}
    return {**found, "dynamic": is_dynamic, "strategy": "token" if is_dynamic else "tensor", "group_size": None}


def _kv_scheme(form: Form) -> dict[str, Any] | None:
    """`kv_cache_scheme`; None of a cache that needs no scales."""
    kind = kind_of(form, ONLINE_DTYPES)
    if kind not in STRATEGIES:
        return None
    of_type, strategy = STRATEGIES[kind]
    return {
        "num_bits": 8, "type": of_type, "symmetric": True, "strategy": strategy, "dynamic": False, "group_size": None,
    }  # fmt: skip


def quantization_config(form: Form) -> dict[str, Any]:
    """`quantization_config` of config.json: linears in groups that are quantized alike, and the cache."""
    groups: dict[str, list[str]] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, linear in form.linears.items():
        if name == form.head:
            continue
        group = {"format": FORMATS_OF[linear.label], "weights": _weights(linear), "input_activations": _inputs(linear)}
        groups.setdefault(str(group), []).append(name)
        plain[str(group)] = group
    formats = {group["format"] for group in plain.values()}
    targets = {key: ["Linear"] if len(groups) == 1 else names for key, names in groups.items()}
    return {
        "quant_method": METHOD,
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "ignore": sorted({*form.float_linears, form.head}),
        "config_groups": {
            f"group_{index}": {"targets": targets[key], "output_activations": None, **plain[key]}
            for index, key in enumerate(groups)
        },
        "kv_cache_scheme": _kv_scheme(form),
    }


def _linear_headers(name: str, linear: LinearForm) -> dict[str, TensorHeader]:
    """Dtype and shape by name of what a linear is stored as, but for its bias."""
    count, width = linear.out_features, linear.in_features
    groups = width // linear.group_size if linear.group_size else 1
    scale = TensorHeader("F32", (1,) if linear.per_tensor else (count, groups))
    if linear.label not in WEIGHT_ONLY:
        is_float = FORMATS_OF[linear.label] == "float-quantized"
        found = {"weight": TensorHeader("F8_E4M3" if is_float else "I8", (count, width)), "weight_scale": scale}
        if linear.label in (W8A8, FP8):
            found["input_scale"] = TensorHeader("F32", (1,))
        if not linear.symmetric_inputs:
            found["input_zero_point"] = TensorHeader("I8", (1,))
    else:
        bits = BITS.get(linear.label, 8)
        found = {"weight_packed": TensorHeader("I32", (count, words_of(width, bits))), "weight_scale": scale}
        found["weight_shape"] = TensorHeader("I64", (2,))
        if not linear.symmetric:
            found["weight_zero_point"] = TensorHeader("I32", (words_of(count, bits), groups))
    return {f"{name}.{part}": header for part, header in found.items()}


def _linear_tensors(directory: OctavoDirectory, name: str, linear: LinearForm) -> dict[str, torch.Tensor]:
    """The tensors of `_linear_headers`."""
    parts = directory.linear(name)
    bits = BITS.get(linear.label, 8)
    zero = torch.zeros_like(parts.scale) if parts.zero is None else parts.zero
    input_zero = torch.zeros(1) if parts.input_zero is None else parts.input_zero
    found = {"weight": parts.codes, "weight_scale": parts.scale, "input_scale": parts.input_scale}
    found["input_zero_point"] = input_zero.to(torch.int8)
    if linear.label in WEIGHT_ONLY:
        found |= pack_signed(parts.codes, bits)
        found["weight_zero_point"] = pack_zero_points(zero, bits)
    headers = _linear_headers(name, linear)
    return {whole: found[whole.rpartition(".")[2]].reshape(header.shape) for whole, header in headers.items()}


def _scale_tensors(directory: OctavoDirectory) -> dict[str, torch.Tensor]:
    """`k_scale`, `v_scale` and `q_scale` of attentions: `[1]`, `[G, 1, 1]` and `[H, 1, 1]`, or `[G D]` per channel."""
    form, found = directory.form, {}
    kind = kind_of(form, ONLINE_DTYPES)
    if kind not in STRATEGIES:
        return {}
    for index, (scheme, scales) in enumerate(zip(form.schemes(), directory.scales(), strict=True)):
        for part, codec in (("q", scheme.query), ("k", scheme.key), ("v", scheme.value)):
            if codec is None:
                continue
            stored = {"q": scales.query, "k": scales.key and scales.key[0], "v": scales.value and scales.value[0]}[part]
            scale = torch.tensor([codec.fixed_scale]) if codec.fixed_scale else stored
            shape = {FP8_TENSOR: (1,), FP8_HEAD: (-1, 1, 1), INT8_CHANNEL: (-1,)}[kind]
            found[f"{form.attention(index)}.{part}_scale"] = scale.float().reshape(shape).contiguous()
    return found


def _write(directory: OctavoDirectory, target: Target) -> list[str]:
    """See `Dialect`."""
    form, plan, notes = directory.form, TensorPlan(directory), []
    for name in directory.floats():
        plan.keep(name)
    for name, linear in form.linears.items():
        if name == form.head:
            plan.decode(name)
            continue
        headers = _linear_headers(name, linear)
        plan.make(headers, lambda name=name, linear=linear: _linear_tensors(directory, name, linear))
    if form.has_coded_embedding:
        plan.decode(form.embedding)
    plan.add(_scale_tensors(directory))
    decoded = [name for name in (form.embedding, form.head) if f"{name}.weight" in plan.headers and (
        name in form.linears or form.has_coded_embedding)]  # fmt: skip
    if decoded:
        notes.append(f"{' and '.join(decoded)}: written in float, as the codes stand for it")
    settings = native_settings(directory) | {"quantization_config": quantization_config(form)}
    write_texts(directory, target, settings)
    plan.write(target.path, target.most_bytes)
    return notes


def _serve(form: Form, place: Path) -> list[str]:
    """See `Dialect`."""
    kind, layers = kind_of(form, ONLINE_DTYPES), quantized_layers(form)
    if kind == INT8_CHANNEL:
        return [
            f"vllm serve {quote(str(place))} --kv-cache-dtype int8  # Huawei's Ascend-vLLM alone; vLLM 0.32 refuses it"
        ]
    flags = ""
    if kind == ONLINE:
        flags = f" --kv-cache-dtype {online_name(layers[0], ONLINE_DTYPES)}"
    elif kind != FLOAT:
        flags = " --kv-cache-dtype fp8"
    floats = form.float_layers()
    if floats:
        flags += f" --kv-cache-dtype-skip-layers {' '.join(map(str, floats))}"
    where = ", on GPUs: on the CPU it takes this dtype without a word and answers wrong" if kind == ONLINE else ""
    lines = [f"vllm serve {quote(str(place))}{flags}  # vLLM 0.32{where}"]
    if kind in (FLOAT, FP8_TENSOR) and not floats:
        lines.append(f"python -m sglang.launch_server --model-path {quote(str(place))}  # SGLang 0.5.23")
    return lines


COMPRESSED_TENSORS = Dialect(
    name="compressed-tensors",
    about="quantization_config in config.json, for vLLM, SGLang and transformers",
    engines=(
        Engine(
            "vLLM",
            "0.32",
            RUN,
            "W8A8, W4A16, W8A16 on GPUs, fp8 KV per tensor; fp8 KV per head with FlashAttention 3",
            "on the CPU, int8_per_token_head, int4_per_token_head and turboquant_* are taken without a word, and what "
            "is answered is wrong; auto and fp8 are real there. fp8 (with AVX-512) rounds K and V towards zero, not to "
            "the nearest, which in all else is our attention: of SmolLM2-135M KL(float || it) is 0.0198 and ours "
            "0.0065, and 119 of 128 greedy tokens are ours, 125 with the same rounding. W8A8 and W4A16 compute what "
            "ours do, and are as far from float within 3 %; of W8A8, codes of inputs tip over where float32 sums are "
            "in another order, so that 114 (static) and 118 (dynamic) of 128 tokens are ours. W4A16 has no float32 "
            "there: give --dtype bfloat16; by its source, with AMX it takes inputs in int8 unless VLLM_CPU_INT4_W4A8=0",
        ),
        Engine(
            "transformers",
            "5.24 with compressed-tensors 0.20",
            RUN,
            "all linears but those with zero points, which it makes no room for; fp8 KV scales",
            "K and V go through fp8 and stay in float: nothing is saved",
        ),
        Engine("LMDeploy", "0.18", PARSED, "W4A16 in groups of 32 and 128"),
        Engine("SGLang", "0.5.23", PARSED, "W4A16; fp8 KV per tensor, without scales of queries"),
        Engine("SGLang", "0.5.23", NAMES, "W8A8 and W8A16"),
        Engine("Huawei's Ascend-vLLM", "2025-12", NAMES, "int8 KV per channel"),
    ),
    check=_check,
    write=_write,
    serve=_serve,
)
