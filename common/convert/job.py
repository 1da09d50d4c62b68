"""What a conversion is to do: the flags checked against the model, and the plan that follows from them."""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from ..architecture import Architecture
from ..errors import OctavoError
from ..runtime.checkpoint.files import TensorHeader
from ..runtime.checkpoint.loading import check_settings, check_stored_sizes
from ..runtime.decoder import attention_modules
from ..runtime.schemes.kv_scheme import Scheme, load_scheme
from ..runtime.schemes.linear_scheme import W8A8, LinearScheme
from .calibration.codebooks import fit_codebooks
from .calibration.observe import calibrate
from .calibration.streams import Texts
from .calibration.texts import default_texts, hold_back, read_calibration_file, tokenize
from .output.bundle import code_digest
from .output.writer import check_output
from .pipeline import Conversion
from .plan import OFFSETS, Plan
from .source.checkpoint import (
    FLOAT_DTYPES,
    check_device,
    find_source,
    layerwise_source,
    load_source,
    load_tokenizer,
    read_source_headers,
    source_files,
)
from .source.config import read_source_config

LONGEST_SAMPLE = 2048
RANDOM_TOKENS = 512
"""Tokens of `--kv_scales random`."""
NOT_OF_THE_JOB = ("save_directory", "model_path", "resume", "calib_file", "calib_texts", "scheme", "linear", "preset",
                  "preset_group", "preset_sym")  # fmt: skip
"""Flags that the bytes of the output do not follow from, or not from their names."""
ONLY_WHETHER = ("max_kl", "save_statistics")
"""Flags of which only matters whether they are given."""


def source_dtype(headers: dict[str, TensorHeader]) -> str:
    """The dtype of a checkpoint, as safetensors spells it: that of most of its tensors."""
    return Counter(header.dtype for header in headers.values()).most_common(1)[0][0]


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
    if flags.kv_scales == "random" and scheme.has_codebooks:
        raise OctavoError(f"--kv_scales random: the codebooks of {scheme.name} come from texts; leave it out")
    if flags.linear is None and not scheme.is_quantized:
        raise OctavoError(f"--w_bit 16 --a_bit 16: scheme {scheme.name} quantizes nothing either; choose another")
    return scheme.with_scales_of_one() if flags.kv_scales == "none" else scheme


def random_samples(config: PreTrainedConfig) -> list[dict[str, torch.Tensor]]:
    """Random tokens, as of vLLM's warm-up with calculate_kv_scales."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, RANDOM_TOKENS), generator=generator)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def choose_linears(model: nn.Module, flags: argparse.Namespace, recipe: list[str], head: str) -> list[str]:
    """Names of the linear layers to quantize, before `--disable_level` and `--fa_amp`.

    Raises:
        OctavoError: a name or glob of `--disable_names` matches no linear layer.
    """
    if flags.linear is None:
        return []
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # The recipe is for static int8: inputs with scales of their own, or in floats, bear the outliers of a few layers.
    recipe = [glob for glob in recipe if glob != head] if flags.linear.label == W8A8 else []
    patterns = list(flags.disable_names or recipe)
    for pattern in flags.disable_names or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OctavoError(f"--disable_names {pattern}: matches no linear layer; they are named as {names[0]}")
    if flags.disable_last_linear:
        patterns.append(head)
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]


def say(text: str) -> None:
    """Print a line on stderr, apart from the summary."""
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
    say("no --calib_file and no --calib_texts: calibrating on the small text that comes with Octavo")
    return default_texts()


def _needs_texts(flags: argparse.Namespace, scheme: Scheme, linears: list[str]) -> bool:
    """Whether anything rests on the calibration texts."""
    linear = flags.linear
    by_inputs = linears and (linear.needs_inputs or flags.anti_method or linear.w_method != "MinMax")
    return bool(by_inputs or scheme.is_static or flags.save_statistics or flags.disable_level or flags.fa_amp)


class Job:
    """One conversion: what the flags name, found and checked, and the plan that follows from them.

    Raises:
        OctavoError: anything that the user can mend.
    """

    def __init__(self, architecture: Architecture, flags: argparse.Namespace) -> None:
        self.architecture, self.flags = architecture, flags
        check_output(flags.save_directory, "--save_directory")
        self.scheme = chosen_scheme(flags)
        if flags.anti_method == OFFSETS and self.scheme.has_codebooks:
            raise OctavoError(
                f"--anti_method m2: shifts what the codebooks of {self.scheme.name} are for; take another"
            )
        if flags.anti_method and flags.save_statistics:
            raise OctavoError(
                f"--save_statistics: --anti_method {flags.anti_method} changes what is observed, and the file is for "
                "the model as it is; save it in a run without"
            )
        _check_statistics_file(flags.save_statistics, flags.save_directory)
        check_device(flags.device_type)
        self.directory = find_source(flags.model_path, flags.trust_remote_code)
        self.config = read_source_config(self.directory, architecture)
        self.headers = read_source_headers(self.directory)
        check_settings(f"{self.directory}/config.json", self.config)
        check_stored_sizes(f"{self.directory}/config.json", self.config, self.headers)
        self.texts = _texts(flags)
        tokenizer = load_tokenizer(self.directory, flags.tokenizer_args, flags.trust_remote_code)
        longest = min(LONGEST_SAMPLE, self.config.get("max_position_embeddings", LONGEST_SAMPLE))
        samples = tokenize(tokenizer, self.texts, longest, flags.input_ids_name, flags.attention_mask_name)
        samples, self.held_back = hold_back(samples)
        if flags.max_kl is not None and all(sample["input_ids"].shape[1] < 2 for sample in self.held_back):
            raise OctavoError(f"--max_kl {flags.max_kl}: the held-back texts have one token each; give longer ones")
        self.source = layerwise_source(self.directory, flags.device_type, architecture)
        recipe = architecture.floats(self.source.config, FLOAT_DTYPES[source_dtype(self.headers)])
        self.linears = choose_linears(self.source.model, flags, recipe, architecture.decoder.head)
        if flags.anti_method and not self.linears:
            raise OctavoError(f"--anti_method {flags.anti_method}: --disable_names leaves every linear in float")
        self.samples = samples if _needs_texts(flags, self.scheme, self.linears) else samples[:1]

    def plan(self, floats: Iterable[str]) -> Plan:
        """What to make of the model, but for some linears and attentions, which stay in float.

        Raises:
            OctavoError: nothing is left to quantize.
        """
        floats = set(floats)
        linears = tuple(name for name in self.linears if name not in floats)
        names = [name for name, _ in attention_modules(self.source.model)]
        layers = tuple(index for index, name in enumerate(names) if name in floats)
        scheme = self.scheme
        if layers:
            scheme = dataclasses.replace(scheme, float_layers=tuple(sorted({*scheme.float_layers, *layers})))
        if not (linears or any(scheme.of_layer(index).is_quantized for index in range(len(names)))):
            raise OctavoError("every linear and attention stays in float; nothing would be quantized")
        linear = self.flags.linear or LinearScheme()
        return Plan(scheme, linear, linears, self.flags.anti_method, source_dtype(self.headers))

    def conversion(
        self, plan: Plan, known: dict[str, torch.Tensor] | None = None, measures: bool = False
    ) -> Conversion:
        """The model at its start."""
        random = random_samples(self.source.config) if self.flags.kv_scales == "random" else None
        texts = Texts(self.samples, self.held_back, random)
        return Conversion(self.architecture, self.source, plan, texts, known, measures)

    @cached_property
    def codebooks(self) -> dict[str, torch.Tensor]:
        """Statistics that only the whole model in memory can give, if the scheme needs any."""
        if not self.scheme.has_codebooks:
            return {}
        model = load_source(self.directory, self.flags.device_type, self.architecture)
        found = fit_codebooks(model, self.samples, calibrate(model, [], tqdm(self.samples, desc="calibrating")))
        return {name: tensor for name, tensor in found.tensors.items() if ".levels." in name or ".before." in name}

    def odd_groups(self, plan: Plan) -> Iterator[tuple[int, int]]:
        """Input channels and size of the groups of linears that cannot have those that were asked for."""
        for name in plan.linears:
            depth = self.source.model.get_submodule(name).in_features
            group = depth // plan.linear.num_groups(depth)
            if plan.linear.group_size and group != plan.linear.group_size:
                yield depth, group

    def identity(self) -> dict[str, Any]:
        """What the bytes of the output follow from, so that nothing else is resumed in the place of it."""
        known = {name: value for name, value in vars(self.flags).items() if name not in NOT_OF_THE_JOB}
        flags = {name: None if value is None else repr(value) for name, value in known.items()}
        flags |= {name: "not given" if getattr(self.flags, name) is None else "given" for name in ONLY_WHETHER}
        if self.flags.linear is not None:  # with what a preset has set
            flags |= {"group_size": self.flags.linear.group_size, "w_sym": self.flags.linear.symmetric}
        files = source_files(self.directory)
        ids = [sample["input_ids"].tolist() for sample in (*self.samples, *self.held_back)]
        return {
            **flags,
            "scheme": self.scheme.to_dict(),
            "files of --model_path": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "config.json": self.config,
            "calibration texts": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
            "code of Octavo": code_digest(),
            "versions of torch and transformers": [torch.__version__, transformers.__version__],
            "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        }
