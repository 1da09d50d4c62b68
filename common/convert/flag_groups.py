"""The flags of a conversion, in groups: those of Ascend's `convert_quant_weights.py`, and what Octavo adds.

Names, types and defaults: MindIE-LLM, `examples/atb_models/examples/convert/model_slim/quantifier.py`.
"""

import argparse
from pathlib import Path

from ..command import DEVICES
from ..errors import OctavoError
from ..runtime.schemes.kv_scheme import KV_CACHE_DTYPES
from ..runtime.schemes.linear_scheme import CPU_ACTIVATIONS, EMBEDDINGS, GROUP_SIZES, WEIGHT_METHODS
from .dialects.table import FORMATS, format_named
from .flag_values import (
    ACT_METHOD_NAMES,
    REFUSED,
    anti_method,
    boolean,
    count,
    json_object,
    level,
    limit,
    positive,
)
from .presets import RECIPES, check_preset
from .request import ANTI_METHODS, KV_SCALES, LINEAR_NAMES, OWN_FORMAT, TARGETS

KV_CACHE_CHOICES = (*KV_CACHE_DTYPES, "fp8_e5m2")
MOST_USED = (
    "model_path", "save_directory", "preset", "format", "target", "resume", "scheme", "quantization", "group_size",
    "anti_method", "embeddings", "calib_file", "calib_texts", "save_statistics", "max_kl", "device_type",
)  # fmt: skip
"""Flags that most need, for a help that fits a screen."""


def preset_name(text: str) -> str:
    """The `type` of a flag that takes the name of a preset."""
    try:
        return check_preset(text)
    except OctavoError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Let a parser take what the scripts are given by flags alone: source and output."""
    add = parser.add_argument
    add("--model_path", required=True, metavar="MODEL", help="directory of the checkpoint (safetensors), or hub id")
    add("--save_directory", required=True, type=Path, metavar="DIR", help="to write; must not exist, or be empty")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is written").add_argument
    about = "a set of flags, which others take the place of: one of"
    add("--preset", type=preset_name, metavar="NAME", help=f"{about} {', '.join(RECIPES)}")
    about = "what the scripts here and transformers run, or as an engine reads it: one of"
    named = f"{about} {', '.join(FORMATS)}"
    add("--format", type=format_named, choices=FORMATS, default=OWN_FORMAT, metavar="NAME", help=named)
    about = "engine on Ascend that is to read it: its names, and a refusal of what it cannot read: one of"
    add("--target", choices=TARGETS, metavar="NAME", help=f"{about} {', '.join(TARGETS)}; none: MindIE's names")
    add("--part_file_size", type=positive, metavar="GB", help="split the weights into files of at most so many GB")
    add("--resume", action="store_true", help="go on with a conversion that was interrupted, if there is one")
    parser.set_defaults(
        recipe_group=None, recipe_sym=True, recipe_scale_bits=None
    )  # of kinds of linears that have groups and zero points


def _add_linears(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("linears").add_argument
    add("--quantization", choices=tuple(LINEAR_NAMES), metavar="NAME", help=f"one of {', '.join(LINEAR_NAMES)}")
    add("--w_bit", type=int, choices=(4, 8, 16), default=8, help="bits of the weights; 16 leaves them in float")
    add("--a_bit", type=int, choices=(8, 16), default=8, help="bits of the inputs; 16 leaves them in float")
    about = "quantize each token's inputs by a scale of its own (W8A8_DYNAMIC); the MLP's last too, unless disabled"
    add("--is_dynamic", type=boolean, default=False, metavar="BOOL", help=about)
    about = "input channels that share a scale of W8A16 or W4A16; 0: per channel (W4A16: default 64)"
    add("--group_size", type=int, choices=GROUP_SIZES, help=about)
    about = "False: weights with a zero point, for W8A16 and W4A16"
    add("--w_sym", type=boolean, default=True, metavar="BOOL", help=about)
    about = "8: scales of W4A16 and zero points, which it has then, in 8 bits: 4.5 bits a weight in groups of 32"
    add("--scale_bits", type=int, choices=(8, 16), help=about)
    about = "label W8A8 as W8A8_MIX: by token where engines prefill, static where they decode"
    add("--pdmix", type=boolean, default=False, metavar="BOOL", help=about)
    add("--w_method", choices=WEIGHT_METHODS, default="MinMax", help="how codes of weights are chosen")
    about = "range of static inputs: 1 min-max, 2 histogram, 3 automatic, percentile, mse of outputs"
    add("--act_method", choices=tuple(ACT_METHOD_NAMES), default="1", help=about)
    about = "inputs of W8A16 and W4A16 on the CPU: int8 per token and group, or as they are"
    add("--cpu_activations", choices=CPU_ACTIVATIONS, default=CPU_ACTIVATIONS[0], help=about)
    about = "outliers: m1 SmoothQuant, m2 with an offset, m3 AWQ, m4 iterative, m6 searched; none"
    add("--anti_method", type=anti_method, choices=ANTI_METHODS, default="", metavar="NAME", help=about)
    about = "int8: the embedding and lm_head in groups of 32 channels, once where tied"
    add("--embeddings", choices=EMBEDDINGS, default=EMBEDDINGS[0], help=about)
    about = "decode linears that the checkpoint holds in codes, and quantize them as flags say"
    add("--requantize", action="store_true", help=about)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("KV cache and attention").add_argument
    add("--scheme", metavar="NAME", help="any that `octavo schemes` lists, or a JSON file of your own")
    about = f"the same, as vLLM spells it: one of {', '.join(KV_CACHE_CHOICES)}"
    add("--kv_cache_dtype", choices=KV_CACHE_CHOICES, metavar="NAME", help=about)
    about = "C8: static int8 KV cache, per channel"
    add("--use_kvcache_quant", type=boolean, default=False, metavar="BOOL", help=about)
    about = "FAQuant: static int8 q, k and v, per head"
    add("--use_fa_quant", type=boolean, default=False, metavar="BOOL", help=about)
    about = "static scales: of texts, of random tokens (vLLM's calculate_kv_scales), all 1, or the source's"
    add("--kv_scales", choices=KV_SCALES, default="data", help=about)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("calibration, where there is any, and the figures that are printed").add_argument
    about = "texts, one per line: plain, or JSON with 'inputs_pretokenized'; none: a small one that comes along"
    add("--calib_file", type=Path, metavar="FILE", help=about)
    add("--calib_texts", nargs="+", metavar="TEXT", help="texts, used if there is no --calib_file")
    about = "also write the calibration statistics to this file"
    add("--save_statistics", type=Path, metavar="FILE", help=about)
    add("--device_type", choices=DEVICES, default="cpu", help="where calibration runs")


def _add_choices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what stays in float, or is not written").add_argument
    about = "write nothing if the KL from float on the held-back texts is larger"
    add("--max_kl", type=limit, metavar="X", help=about)
    units = "q, k and v count as one, and so do gate and up, and all of a layer's experts"
    about = "of linears in int4, those that cost most for their size in int8: the mean of bits a weight, all counted"
    add("--w_bits_mean", type=limit, metavar="X", help=about)
    about = f"so many linears or attentions, those that cost most; {units}"
    add("--fa_amp", type=count, default=0, metavar="N", help=about)
    about = f"Ln: the n linears with the worst outliers; {units}"
    add("--disable_level", type=level, default="L0", metavar="Ln", help=about)
    add("--disable_names", nargs="+", metavar="NAME", help="names or globs of linears; replaces the recipe's list")
    about = "whether lm_head does; it does unless --embeddings int8 is given"
    add("--disable_last_linear", type=boolean, metavar="BOOL", help=about)


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tokenizer").add_argument
    add("--tokenizer_args", type=json_object, default="{}", metavar="JSON", help="object of arguments for it")
    add("--input_ids_name", default="input_ids", metavar="NAME", help="its name of the ids")
    add("--attention_mask_name", default="attention_mask", metavar="NAME", help="its name of the mask")
    add("--trust_remote_code", action="store_true", help="run code that comes with it")


def _add_refused(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("flags of the original that Octavo refuses, but for the value named").add_argument
    for flag, (kind, default, reason) in REFUSED.items():
        add(f"--{flag}", type=kind, default=default, metavar="X", help=f"{default!r}: {reason}")


def add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    """Let a parser take all flags of a conversion but for those of source and output."""
    for add_group in (
        _add_outputs,
        _add_linears,
        _add_cache,
        _add_calibration,
        _add_choices,
        _add_tokenizer,
        _add_refused,
    ):
        add_group(parser)
