"""The conversion that every `models/*/convert_quant_weights.py` runs: float checkpoint in, quantized directory out."""

import argparse
import copy
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .architecture import Architecture
from .bundle import bundle
from .cache import kv_bits_per_element, kv_bytes_per_token
from .calibration import default_texts, hold_back, read_calibration_file, tokenize
from .checkpoints.ascend import (
    DESCRIPTION_FILE,
    TensorHeader,
    build_description,
    in_file_order,
    scale_tensors,
    weight_file_names,
)
from .checkpoints.writer import check_output, whole_directory, write_json, write_weights
from .codebooks import fit_codebooks
from .errors import OctavoError
from .evaluate import Fidelity, compare
from .flags import parse_flags, run_script
from .linear import W8A8DynamicLinear, W8A8Linear
from .model import CONFIG_KEY, NATIVE_LOAD_HINT
from .observe import calibrate
from .quantize import input_range, outlier_score, quantize_linear, quantize_weight
from .scheme import Scheme, load_scheme
from .source import (
    FLOAT_DTYPES,
    check_device,
    find_source,
    load_source,
    load_tokenizer,
    read_source_config,
    read_source_headers,
)
from .statistics import Statistics, scales_of

LONGEST_SAMPLE = 2048
RANDOM_TOKENS = 512
"""Tokens of `--kv_scales random`."""
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.jinja",
    "*.model",
    "generation_config.json",
)
GIGABYTE = 10**9
FEW_TOKENS = 100
"""Below this the summary says that its figures mean little."""


@dataclass(frozen=True)
class Quantized:
    """A model in memory, quantized, and what is written of it.

    Attributes:
        scheme: of attention and cache.
        linears: label by name of the quantized linears.
        tensors: all tensors of the checkpoint, named for the file.
        tied: names of float tensors that are the same as a stored one.
        deq_scale_dtype: see `W8A8Linear`.
    """

    scheme: Scheme
    linears: dict[str, str]
    tensors: dict[str, torch.Tensor]
    tied: list[str]
    deq_scale_dtype: torch.dtype


def source_dtype(headers: dict[str, TensorHeader]) -> torch.dtype:
    """The dtype of a checkpoint: that of most of its tensors."""
    return FLOAT_DTYPES[Counter(header.dtype for header in headers.values()).most_common(1)[0][0]]


def chosen_scheme(flags: argparse.Namespace) -> Scheme:
    """The scheme of cache and attention that the flags ask for.

    Raises:
        OctavoError: an unknown preset, a file that holds no scheme, one that leaves everything in float, or scales of 1
            for codes that are no fp8.
    """
    name = flags.scheme or flags.kv_cache_dtype or "float"
    if flags.use_kvcache_quant or flags.use_fa_quant:
        name = "ascend-c8" if flags.use_kvcache_quant else "ascend-fa"
    scheme = load_scheme(name)
    if flags.kv_scales != "data" and not scheme.is_static:
        raise OctavoError(f"--kv_scales {flags.kv_scales}: scheme {scheme.name} has no static scales; leave it out")
    if flags.w_bit == 16 and not scheme.is_quantized:
        raise OctavoError(f"--w_bit 16 --a_bit 16: scheme {scheme.name} quantizes nothing either; choose another")
    return scheme.with_scales_of_one() if flags.kv_scales == "none" else scheme


def random_statistics(model: nn.Module, statistics: Statistics) -> Statistics:
    """`statistics` whose attention entries come from random tokens, as vLLM's warm-up with calculate_kv_scales."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, RANDOM_TOKENS), generator=generator)
    found = calibrate(model, [], [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    return Statistics({**statistics.tensors, **found.tensors}, statistics.metadata)


def choose_linears(model: nn.Module, flags: argparse.Namespace, recipe: list[str]) -> list[str]:
    """Names of the linear layers to quantize, before `--disable_level`.

    Raises:
        OctavoError: a name or glob of `--disable_names` matches no linear layer.
    """
    if flags.w_bit == 16:
        return []
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # The recipe is for static scales: a dynamic one is not upset by the outliers of a few layers.
    recipe = [] if flags.is_dynamic else [glob for glob in recipe if glob != "lm_head"]
    patterns = list(flags.disable_names or recipe)
    for pattern in flags.disable_names or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OctavoError(f"--disable_names {pattern}: matches no linear layer; they are named as {names[0]}")
    if flags.disable_last_linear:
        patterns.append("lm_head")
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]


def drop_worst(names: list[str], statistics: Statistics, level: int) -> list[str]:
    """`names` without the `level` linear layers whose inputs have the worst outliers."""
    worst = sorted(names, key=lambda name: outlier_score(statistics, name), reverse=True)[:level]
    return [name for name in names if name not in worst]


def quantize_model(
    model: nn.Module,
    statistics: Statistics,
    linears: list[str],
    scheme: Scheme,
    act_method: int,
    is_dynamic: bool,
    headers: dict[str, TensorHeader],
) -> Quantized:
    """All tensors of the quantized checkpoint, in the order of the model; float ones in the dtype of the source."""
    dtype = source_dtype(headers)
    deq_scale_dtype = torch.float32 if dtype == torch.bfloat16 else torch.int64
    replaced = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    quantized: dict[str, torch.Tensor] = {}
    for name in tqdm(linears, desc="quantizing", unit="linear", disable=not linears):
        linear = model.get_submodule(name)
        if is_dynamic:
            parts = quantize_weight(linear)
        else:
            parts = quantize_linear(linear, *input_range(statistics, name, act_method), deq_scale_dtype)
        quantized.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    quantized.update(scale_tensors(model, scheme, scales_of(scheme, statistics)))
    tensors = {
        # transformers renames some tensors as it loads them; those take the dtype of the others
        name: tensor.detach().cpu().to(FLOAT_DTYPES[headers[name].dtype] if name in headers else dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in replaced and name not in tied
    }
    labels = dict.fromkeys(linears, (W8A8DynamicLinear if is_dynamic else W8A8Linear).LABEL)
    return Quantized(
        scheme, labels, in_file_order(model, {**tensors, **quantized}), sorted(tied - replaced), deq_scale_dtype
    )


def build_quantized(architecture: Architecture, model: nn.Module, quantized: Quantized) -> nn.Module:
    """The quantized model that a load of the written directory gives, sharing the float tensors of `model`."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = None
    config.octavo = {
        "scheme": quantized.scheme.to_dict(),
        "quantized_linears": quantized.linears,
        "deq_scale": "I64" if quantized.deq_scale_dtype == torch.int64 else "F32",
    }
    config.tie_word_embeddings = model.config.tie_word_embeddings and "lm_head" not in quantized.linears
    with torch.device("meta"):
        result = architecture.model_class(config)
    float_state = model.state_dict()
    result.load_state_dict(
        {name: float_state.get(name, t) if t.is_floating_point() else t
         for name, t in quantized.tensors.items()},
        strict=False,
        assign=True,
    )  # fmt: skip
    result.tie_weights()
    for name, buffer in list(result.named_buffers()):
        if buffer.is_meta:
            parent, _, child = name.rpartition(".")
            setattr(result.get_submodule(parent), child, model.get_buffer(name))
    return result.eval().to(model.device)


def output_config(source: dict[str, Any], architecture: Architecture, quantized: Quantized) -> dict[str, Any]:
    """The config.json to write: the source's, with what loads the modeling file and says the scheme."""
    config = {
        **source,
        "architectures": [architecture.model_class.__name__],
        "auto_map": architecture.auto_map,
        CONFIG_KEY: {"scheme": quantized.scheme.to_dict()},
        "transformers_weights": NATIVE_LOAD_HINT,
    }
    if "lm_head" in quantized.linears:
        config["tie_word_embeddings"] = False
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    if "rope_theta" in (config.get("rope_parameters") or {}):
        # Readers built on transformers 4, MindIE among them, look for it here and else take 10000 in silence.
        config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
    return config


def write_checkpoint(
    directory: Path,
    source: Path,
    config: dict[str, Any],
    architecture: Architecture,
    quantized: Quantized,
    part_file_size: int | None,
) -> int:
    """Write the output directory, whole or not at all; return its size in bytes."""
    description = build_description(quantized.tensors, quantized.tied, quantized.linears, quantized.scheme)
    with whole_directory(directory, "--save_directory") as stage:
        most_bytes = None if part_file_size is None else part_file_size * GIGABYTE
        write_weights(stage, weight_file_names(description)[0], quantized.tensors, most_bytes)
        write_json(stage / DESCRIPTION_FILE, description)
        write_json(stage / "config.json", output_config(config, architecture, quantized))
        for pattern in TOKENIZER_FILES:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, stage / file.name)
        for name, text in bundle(architecture).items():
            (stage / name).write_text(text, encoding="utf-8")
        return sum(file.stat().st_size for file in stage.iterdir())


def _summary(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _check_statistics_file(file: Path | None, output: Path) -> None:
    if file is None:
        return
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise OctavoError(f"--save_statistics {file}: is no file in a directory that exists")
    if file.resolve().parent == output.resolve():
        raise OctavoError(f"--save_statistics {file}: lies in --save_directory, written whole; name another place")


def _texts(flags: argparse.Namespace) -> list[str]:
    if flags.calib_file is not None:
        if flags.calib_texts:
            raise OctavoError("--calib_file and --calib_texts: give one of the two")
        return read_calibration_file(flags.calib_file)
    if flags.calib_texts:
        return flags.calib_texts
    _say("no --calib_file and no --calib_texts: calibrating on the small text that comes with Octavo")
    return default_texts()


def _fidelity(model: nn.Module, other: nn.Module, samples: list[dict[str, torch.Tensor]]) -> Fidelity | None:
    ids = [sample["input_ids"] for sample in samples if sample["input_ids"].shape[1] > 1]
    if not ids:
        return None
    progress = tqdm(ids, desc="comparing", unit="text")
    return compare(lambda i: model(i.to(model.device)).logits, lambda i: other(i.to(other.device)).logits, progress)


def convert(architecture: Architecture, flags: argparse.Namespace) -> None:
    """Convert as the flags say, and print a summary.

    Raises:
        OctavoError: anything that the user can mend.
    """
    check_output(flags.save_directory, "--save_directory")
    scheme = chosen_scheme(flags)
    _check_statistics_file(flags.save_statistics, flags.save_directory)
    check_device(flags.device_type)
    source = find_source(flags.model_path)
    config = read_source_config(source, architecture)
    headers = read_source_headers(source)
    texts = _texts(flags)
    tokenizer = load_tokenizer(source, flags.tokenizer_args, flags.trust_remote_code)
    longest = min(LONGEST_SAMPLE, config.get("max_position_embeddings", LONGEST_SAMPLE))
    samples = tokenize(tokenizer, texts, longest, flags.input_ids_name, flags.attention_mask_name)
    samples, held_back = hold_back(samples)
    model = load_source(source, flags.device_type)

    linears = choose_linears(model, flags, architecture.float_linears(model.config, source_dtype(headers)))
    needs_texts = (linears and not flags.is_dynamic) or scheme.is_static or flags.save_statistics is not None
    seen = samples if needs_texts or flags.disable_level else samples[:1]
    statistics = calibrate(model, linears, tqdm(seen, desc="calibrating", unit="text"))
    statistics.check_finite()
    if flags.kv_scales == "random":
        statistics = random_statistics(model, statistics)
    linears = drop_worst(linears, statistics, flags.disable_level)
    if not (linears or scheme != load_scheme("float")):
        raise OctavoError("--disable_names and --disable_level leave every linear in float; nothing would be quantized")
    if scheme.has_codebooks:
        statistics = fit_codebooks(model, samples, statistics)
    quantized = quantize_model(model, statistics, linears, scheme, flags.act_method, flags.is_dynamic, headers)
    fidelity = _fidelity(model, build_quantized(architecture, model, quantized), held_back)
    if flags.save_statistics is not None:
        statistics.save(flags.save_statistics)
    size = write_checkpoint(flags.save_directory, source, config, architecture, quantized, flags.part_file_size)

    float_bytes = max(FLOAT_DTYPES[header.dtype].itemsize for header in headers.values())
    before = sum(file.stat().st_size for file in source.glob("model*.safetensors"))
    rows = [
        ("", "float", "quantized"),
        ("checkpoint, MB", f"{before / 1e6:.1f}", f"{size / 1e6:.1f}"),
        ("KV cache, bytes per token", str(kv_bytes_per_token(model.config, load_scheme("float"), float_bytes)),
         str(kv_bytes_per_token(model.config, quantized.scheme, float_bytes))),
        ("KV cache, bits per element, all counted", str(8 * float_bytes),
         f"{kv_bits_per_element(model.config, quantized.scheme):.2f}"),
    ]  # fmt: skip
    if fidelity is not None:
        rows.append(("perplexity", f"{fidelity.float_perplexity:.3f}", f"{fidelity.perplexity:.3f}"))
        rows.append(("KL(float || quantized), nats per token", "", f"{fidelity.kl:.5f}"))
    print(_summary(rows))
    if fidelity is not None:
        where = f"{len(held_back)} text(s) held back from calibration" if len(texts) > 1 else "the one calibration text"
        print(f"perplexity and KL over {fidelity.tokens} tokens of {where}")
        if fidelity.tokens < FEW_TOKENS:
            print(f"fewer than {FEW_TOKENS} tokens: give more calibration texts for figures that mean something")
    kind = next(iter(quantized.linears.values()), W8A8Linear.LABEL)
    print(f"wrote {flags.save_directory}: {len(linears)} linears in {kind}, attention {quantized.scheme.name}")


def main(architecture: Architecture, argv: list[str] | None = None) -> int:
    """Entry point of a conversion script; returns the exit code."""
    return run_script(lambda arguments: convert(architecture, parse_flags(architecture.name, arguments)), argv)
