"""onnxruntime-genai: the file of scales that its model builder puts into GroupQueryAttention, beside a float model.

`x = code * scale` with symmetric codes; a scale for a layer, or one for each channel of each KV head, head by head.
"""

from collections.abc import Iterator
from pathlib import Path

from ..output.writer import write_json
from .caches import FP8_TENSOR, INT8_CHANNEL, kind_of
from .dialect import NAMES, Dialect, Engine, Target, native_settings, write_texts
from .directory import OctavoDirectory
from .form import Form
from .plain import check_static, decoded_note, decoded_plan, static_pairs

FILE = "kv_cache_scales.json"
SCHEMES = {INT8_CHANNEL: ("int8_per_channel", 128), FP8_TENSOR: ("fp8_per_tensor", 448)}
"""The builder's `kv_cache_quant_scheme`, and the largest code that a scale is told with."""


def _check(form: Form) -> Iterator[str]:
    """See `Dialect`."""
    for name in form.added_biases:
        yield f"{name} has a bias that the builder skips; convert with --anti_method m1 or m4 in the place of m2"
    instead = "give --scheme ascend-c8 --statistics FILE, or --scheme vllm-fp8 --statistics FILE"
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
    options = f"kv_cache_quant_scheme={SCHEMES[kind_of(form)][0]} kv_cache_scale_file={place / FILE}"
    builder = f"python -m onnxruntime_genai.models.builder -i {place} -o {place}-onnx -p int4 -e cpu"
    return [f"{builder} --extra_options {options}  # onnxruntime-genai 0.18"]


ONNXRUNTIME_GENAI = Dialect(
    name="onnxruntime-genai",
    about="kv_cache_scale_file of its model builder, beside the model in float",
    engines=(Engine("onnxruntime-genai", "0.18", NAMES, "int8 KV per channel, fp8 KV per tensor"),),
    check=_check,
    write=_write,
    serve=_serve,
)
