"""onnxruntime-genai: the file of scales that its model builder puts into GroupQueryAttention, beside a float model.

`x = code * scale` with symmetric codes; a scale for a layer, or one for each channel of each KV head, head by head.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from ..output.writer import write_json
from .caches import (
    FP8_CHANNEL,
    FP8_TENSOR,
    INT4_CHANNEL,
    INT4_TENSOR,
    INT8_CHANNEL,
    INT8_TENSOR,
    kind_of,
    static_scheme,
)
from .dialect import PARSED, RUN, Dialect, Engine, Target, native_settings, write_texts
from .directory import OctavoDirectory
from .form import Form
from .plain import check_static, decoded_note, decoded_plan, static_pairs

FILE = "kv_cache_scales.json"
SCHEMES = {
    INT8_CHANNEL: ("int8_per_channel", 128),
    INT8_TENSOR: ("int8_per_tensor", 128),
    INT4_CHANNEL: ("int4_per_channel", 8),
    INT4_TENSOR: ("int4_per_tensor", 8),
    FP8_CHANNEL: ("fp8_per_channel", 448),
    FP8_TENSOR: ("fp8_per_tensor", 448),
}
"""The builder's `kv_cache_quant_scheme`, and the largest code that a scale is told with."""
GPU_ONLY = (FP8_CHANNEL, FP8_TENSOR)
"""What onnxruntime has kernels for on GPUs alone."""
RUN_LINES = (
    "import onnxruntime_genai as g",
    "m = g.Model({place!r})",
    "t = g.Tokenizer(m)",
    "p = g.GeneratorParams(m)",
    "p.set_search_options(max_length=64)",
    "r = g.Generator(m, p)",
    "r.append_tokens(t.encode('Once upon a time'))",
    "[r.generate_next_token() for _ in iter(r.is_done, True)]",
    "print(t.decode(r.get_sequence(0)))",
)
"""The package has no command that generates."""


def _check(form: Form) -> Iterator[str]:
    """See `Dialect`."""
    for name in form.added_biases:
        yield f"{name} has a bias that the builder skips; convert with --anti_method m1 or m4 in the place of m2"
    instead = f"give {static_scheme(form, 'ascend-c8')}, or {static_scheme(form, 'vllm-fp8')}"
    yield from check_static(form, tuple(SCHEMES), instead)


def _plain(scale: list[float]) -> float | list[float]:
    return scale[0] if len(scale) == 1 else scale


def _write(directory: OctavoDirectory, target: Target) -> list[str]:
    """See `Dialect`."""
    pairs, (_, largest) = static_pairs(directory), SCHEMES[kind_of(directory.form)]
    write_texts(directory, target, native_settings(directory))
    scales = {
        "k_scales": [_plain(key.tolist()) for key, _ in pairs],
        "v_scales": [_plain(value.tolist()) for _, value in pairs],
    }
    write_json(target.path / FILE, {"scales": scales, "layer_ids": list(range(len(pairs))), "qmax": largest})
    decoded_plan(directory).write(target.path, target.most_bytes)
    return decoded_note(directory.form)


def _serve(form: Form, place: Path) -> list[str]:
    """See `Dialect`."""
    kind, graph = kind_of(form), f"{place}-onnx"
    options = f"kv_cache_quant_scheme={SCHEMES[kind][0]} {shlex.quote(f'kv_cache_scale_file={place / FILE}')}"
    where = "-p fp16 -e cuda" if kind in GPU_ONLY else "-p fp32 -e cpu"
    paths = f"-i {shlex.quote(str(place))} -o {shlex.quote(graph)}"
    return [
        f"python -m onnxruntime_genai.models.builder {paths} {where} --extra_options {options}  # onnxruntime-genai "
        "0.18; -p int4 quantizes the linears, too",
        f"python -c {shlex.quote('; '.join(RUN_LINES).format(place=graph))}",
    ]


ONNXRUNTIME_GENAI = Dialect(
    name="onnxruntime-genai",
    about="kv_cache_scale_file of its model builder, beside the model in float",
    engines=(
        Engine(
            "onnxruntime-genai",
            "0.18 with onnxruntime 1.32",
            RUN,
            "on the CPU: int8 and int4 KV, per channel and per tensor",
            "4 bits with static scales are for trials: of SmolLM2-135M KL is 0.38 per channel, as with our own class",
        ),
        Engine(
            "onnxruntime-genai",
            "0.18 with onnxruntime 1.32",
            PARSED,
            "on GPUs: the same and fp8 KV, which its builder takes and its CPU has no kernel for",
        ),
    ),
    check=_check,
    write=_write,
    serve=_serve,
)
