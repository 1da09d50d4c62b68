"""FastDeploy: the largest values of K and V beside a float model, by which its int8 cache per channel is scaled.

`x = code * largest / 127`, for each channel of each KV head, head by head.
"""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from ....ops.shared.codes import CODE_RANGES
from .caches import INT8_CHANNEL, kind_of, quantized_layers, static_scheme
from .dialect import NAMES, Dialect, Engine, Target, native_settings, write_texts
from .directory import OctavoDirectory
from .form import Form
from .plain import check_static, decoded_note, decoded_plan, static_pairs

TYPES = {INT8_CHANNEL: "int8"}
"""Its `kv_cache_quant_type`."""
PARTS = ("cachek_matmul", "cachev_matmul")


def _check(form: Form) -> Iterator[str]:
    """See `Dialect`."""
    for name in form.added_biases:
        yield f"{name} has a bias that the engine skips; convert with --anti_method m1 or m4 in the place of m2"
    yield from check_static(form, (INT8_CHANNEL,), f"give {static_scheme(form, 'ascend-c8')}")


def _write(directory: OctavoDirectory, target: Target) -> list[str]:
    """See `Dialect`."""
    form, plan = directory.form, decoded_plan(directory)
    codec = quantized_layers(form)[0].key
    for index, pair in enumerate(static_pairs(directory)):
        largest = {
            f"{form.attention(index)}.{part}.activation_scale": scale * CODE_RANGES[codec.stored_dtype][1]
            for part, scale in zip(PARTS, pair, strict=True)
        }
        plan.add(largest)
    said = {"quantization": "mix_quant", "kv_cache_quant_type": TYPES[kind_of(form)]}
    write_texts(directory, target, native_settings(directory) | {"quantization_config": said})
    plan.write(target.path, target.most_bytes)
    return decoded_note(form)


def _serve(form: Form, place: Path) -> list[str]:
    """See `Dialect`."""
    return [f"python -m fastdeploy.entrypoints.openai.api_server --model {quote(str(place))}  # FastDeploy 2.x"]


FASTDEPLOY = Dialect(
    name="fastdeploy",
    about="largest values of K and V per channel, beside the model in float",
    engines=(Engine("FastDeploy", "2.x", NAMES, "int8 KV per channel"),),
    check=_check,
    write=_write,
    serve=_serve,
)
