"""GGUF, one file for llama.cpp: weights in blocks of 32 whose codes are ours, and the tokenizer in it.

Q8_0 stands for `code * scale`, Q4_0 for `(index - 8) * scale` and Q4_1 for `index * scale + least`, scale and least in
float16, for 32 input channels each. N output channels, K input channels, G groups of them.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch

from ....ops.shared.codes import pack_int4
from ...progress import progress
from ...runtime.schemes.linear_scheme import FP8_LABELS, INT4_LABELS, STATIC, W8A8_MIXED
from ..output.shards import SAFETENSORS_DTYPES
from .caches import FLOAT, ONLINE, kind_of, online_name, quantized_layers, why_not
from .dialect import RUN, Dialect, Engine, Target
from .directory import LinearCodes, OctavoDirectory
from .form import Form, LinearForm
from .gguf_tokenizer import add_tokenizer, imported_gguf

FILE = "model.gguf"
BLOCK = 32
NAMES_OF = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's names of architectures, by model_type."""
TURNED = "llama"
"""The one whose q and k have the channels that RoPE pairs beside each other."""
CACHES = {"llamacpp-q8_0": "q8_0", "llamacpp-q4_0": "q4_0", "llamacpp-q4_1": "q4_1"}
"""Schemes that are llama.cpp's own, and its `--cache-type-k` and `-v`."""
BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
"""Of a block."""
FROM_FLOAT = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
MOST_ROUNDED = 2.0**-8
"""How far scales may be from those in float16, as `rounding` has it: codes of 8 bits then stand for weights that are
moved by less than half a step, which is what the codes themselves cost."""

Produce = Callable[[], np.ndarray]


def _check(form: Form) -> Iterator[str]:
    """See `Dialect`."""
    imported_gguf()
    if form.config.model_type not in NAMES_OF:
        yield (
            f"{form.architecture.name} is not written in this format, which {', '.join(NAMES_OF)} are; serve the "
            "directory itself, by models/*/run.py"
        )
    for name in form.added_biases:
        yield f"{name} has a bias that llama.cpp skips; convert with --anti_method m1 or m4 in the place of m2"
    rope = form.config.rope_parameters or {}
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        yield f"RoPE of type {rope['rope_type']!r} is not written; default and llama3 are"
    if kind_of(form, CACHES) != FLOAT and _cache(form) is None:
        yield why_not(
            form, f"nothing of a cache, and llama.cpp quantizes it by itself ({', '.join(CACHES)})",
            "give --scheme llamacpp-q8_0, or --scheme float",
        )  # fmt: skip


def _cache(form: Form) -> str | None:
    layers = quantized_layers(form)
    is_whole = len(layers) == form.layers and kind_of(form, CACHES) == ONLINE
    return online_name(layers[0], CACHES) if is_whole else None


def rounding(scale: torch.Tensor) -> float:
    """By how much float16 changes scales `[N, G]`, as a share of the largest of their output channel; inf beyond it."""
    if scale.max() > torch.finfo(torch.float16).max:
        return math.inf
    changed = (scale.to(torch.float16).float() - scale).abs()
    return float((changed / scale.amax(dim=1, keepdim=True)).max())


def _kind(linear: LinearForm) -> str | None:
    """The type of blocks that take the codes of a linear as they are; None if none does."""
    group = linear.group_size or linear.in_features
    if linear.label in (*FP8_LABELS, W8A8_MIXED) or group % BLOCK or linear.in_features % BLOCK:
        return None
    if linear.label in INT4_LABELS:
        return "Q4_0" if linear.symmetric else "Q4_1"
    return "Q8_0" if linear.symmetric else None


def _per_block(parts: LinearCodes, values: torch.Tensor) -> torch.Tensor:
    """Scales or zeros `[N, G]` as `[N, K / 32]`."""
    blocks = parts.codes.shape[1] // BLOCK
    return values.expand(len(parts.codes), -1).repeat_interleave(blocks // values.shape[1], dim=1)


def block_bytes(parts: LinearCodes, kind: str) -> torch.Tensor:
    """Rows of codes as blocks of a type, uint8 `[N, K / 32 * bytes]`, scales rounded to float16."""
    scale = _per_block(parts, parts.scale).to(torch.float16)
    fields = [scale[..., None].view(torch.uint8)]
    if kind == "Q4_1":
        zero = torch.zeros_like(parts.scale) if parts.zero is None else parts.zero
        least = -(_per_block(parts, zero) + 8) * _per_block(parts, parts.scale)
        fields.append(least.to(torch.float16)[..., None].view(torch.uint8))
    codes = parts.codes.unflatten(1, (-1, BLOCK))
    fields.append(codes.view(torch.uint8) if kind == "Q8_0" else pack_int4(codes, BLOCK))
    return torch.cat(fields, dim=-1).flatten(1)


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Channels that RoPE pairs beside each other, in place of half a head apart."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


class _File:
    """A GGUF file of a directory: what is planned, then written tensor by tensor."""

    def __init__(self, directory: OctavoDirectory, file: Path) -> None:
        self.gguf = imported_gguf()
        self.directory, self.form = directory, directory.form
        self.arch = NAMES_OF[self.form.config.model_type]
        self.writer = self.gguf.GGUFWriter(file, self.arch)
        model = next(key for key, name in self.gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        self._names = self.gguf.get_tensor_name_map(model, self.form.layers)
        self._makers: list[Produce] = []
        self.in_float: list[str] = []
        self.too_small: list[str] = []
        self.rounded: dict[str, float] = {}

    def _turns(self, name: str) -> int:
        """Heads of q or k whose channels are interleaved; 0 of all else."""
        config, part = self.form.config, name.split(".")[-2]
        if self.arch != TURNED:
            return 0
        return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part, 0)

    def _plan(self, name: str, shape: tuple[int, ...], kind: str, make: Callable[[], torch.Tensor]) -> None:
        """A tensor of a checkpoint's name; `make` gives its rows, which are bytes of blocks or floats."""
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        heads, of_ggml = self._turns(name), self.gguf.GGMLQuantizationType[kind]
        nbytes = math.prod(shape) * BYTES.get(kind, {"F32": 128}.get(kind, 64)) // BLOCK
        stored = shape if kind in ("F32", "F16") else (*shape[:-1], nbytes // math.prod(shape[:-1]))
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
        self.writer.add_tensor_info(found, stored, np.dtype(dtype), nbytes, of_ggml)

        def made() -> np.ndarray:
            rows = _interleaved(make(), heads) if heads else make()
            return (rows.view(torch.uint8) if kind == "BF16" else rows).contiguous().numpy()

        self._makers.append(made)

    def keep(self, name: str) -> None:
        """A tensor in float: matrices as they are, vectors in float32."""
        header = self.directory.floats()[name]
        is_vector = len(header.shape) == 1
        kind = "F32" if is_vector else FROM_FLOAT[header.dtype]
        dtype = torch.float32 if is_vector else SAFETENSORS_DTYPES[header.dtype]
        self._plan(name, header.shape, kind, lambda: self.directory.read(name).to(dtype))

    def coded(self, module: str, linear: LinearForm) -> None:
        """The weight of a linear or embedding in codes, as blocks; in float16 where no blocks take its codes."""
        name, shape, kind = f"{module}.weight", (linear.out_features, linear.in_features), _kind(linear)
        changed = 0.0 if kind is None else rounding(self.directory.scale(module))
        if kind is None or changed > MOST_ROUNDED:
            (self.in_float if kind is None else self.too_small).append(module)
            self._plan(name, shape, "F16", lambda: self._float16(module))
            return
        if changed:
            self.rounded[module] = changed
        self._plan(name, shape, kind, lambda: self._blocks(module, kind))

    def _float16(self, module: str) -> torch.Tensor:
        return torch.cat([rows.to(torch.float16) for rows, _ in self.directory.float_rows(module)])

    def _blocks(self, module: str, kind: str) -> torch.Tensor:
        return torch.cat([block_bytes(parts, kind) for parts in self.directory.linear_rows(module)])

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A float32 tensor of GGUF's own name."""
        self.writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), tensor.nbytes)
        self._makers.append(lambda: tensor.numpy())

    def write(self) -> None:
        """Write everything."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        for make in progress(self._makers, "tensor", about="writing"):
            self.writer.write_tensor_data(make())
        self.writer.close()


def _add_facts(file: _File) -> None:
    """What llama.cpp must know of the model."""
    config, writer = file.form.config, file.writer
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(file.directory.path.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(file.gguf.GGML_QUANT_VERSION)
    if config.rope_parameters.get("rope_type") == "llama3":
        file.add("rope_freqs.weight", llama3_factors(config.rope_parameters, width))


def llama3_factors(rope: dict[str, Any], width: int) -> torch.Tensor:
    """By what Llama 3.1 divides the frequencies of RoPE, float32 `[D / 2]`.

    Source: `_compute_llama3_parameters` of transformers: short waves stay, long ones are divided by `factor`, and
    between them it is gone over smoothly.
    """
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    waves = 2 * math.pi * rope["rope_theta"] ** steps
    turns = rope["original_max_position_embeddings"] / waves
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _write(directory: OctavoDirectory, target: Target) -> list[str]:
    """See `Dialect`."""
    form, file = directory.form, _File(directory, target.path / FILE)
    _add_facts(file)
    notes = add_tokenizer(file.writer, directory.path, form.config.vocab_size, target.trust_remote_code)
    for name in directory.floats():
        file.keep(name)
    linears = dict(form.linears)
    if form.has_coded_embedding:
        linears[form.embedding] = directory.embedding_form()
    for name, linear in linears.items():
        file.coded(name, linear)
    file.write()
    if file.in_float:
        notes.append(f"{_some(file.in_float)}: in float16, since no blocks of llama.cpp take such codes")
    if file.too_small:
        notes.append(f"{_some(file.too_small)}: in float16, since float16 has no room for the scales of the codes")
    if file.rounded:
        most = max(file.rounded.values())
        notes.append(
            f"{_some(list(file.rounded))}: codes as they are, scales rounded to float16, which moves weights by at "
            f"most {most:.2%} of the largest of their output channel"
        )
    if any(linear.label in STATIC for linear in form.linears.values()):
        notes.append("scales of inputs are left out: llama.cpp quantizes inputs by itself")
    return notes


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} linears, as {names[0]}"


def _serve(form: Form, place: Path) -> list[str]:
    """See `Dialect`."""
    name = _cache(form)
    flags = "" if name is None else f" --flash-attn on --cache-type-k {name} --cache-type-v {name}"
    return [f"llama-server --model {quote(str(place / FILE))}{flags}  # llama.cpp of llama-cpp-python 0.3.36"]


GGUF = Dialect(
    name="gguf",
    about="one file for llama.cpp, tokenizer included: Q8_0, Q4_0 and Q4_1 with the codes of the linears, else float16",
    engines=(
        Engine(
            "llama.cpp",
            "llama-cpp-python 0.3.36",
            RUN,
            "Llama, Mistral, Qwen2 and Qwen3; its own caches: --scheme llamacpp-*",
            "in caches of 8 and 4 bits it turns K as well, which llamacpp-* do not: of SmolLM2-135M KL with a cache in "
            "q4_0 is 0.044 there and 0.088 in our class, in q8_0 it is 0.0035 and 0.0038",
        ),
    ),
    check=_check,
    write=_write,
    serve=_serve,
)
