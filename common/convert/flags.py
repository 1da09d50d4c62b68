"""The flags of Ascend's `convert_quant_weights.py`: each takes effect, or is refused with the reason.

Names, types and defaults: MindIE-LLM, `examples/atb_models/examples/convert/model_slim/quantifier.py`.
"""

import argparse
import json
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...ops.shared.resources import resource
from ..architecture import Architecture
from ..command import DEVICES, OneLineParser
from ..errors import OctavoError
from ..runtime.schemes.kv_scheme import KV_CACHE_DTYPES
from ..runtime.schemes.linear_scheme import CPU_ACTIVATIONS, EMBEDDINGS, GROUP_SIZES, WEIGHT_METHODS
from .dialects.table import FORMATS, format_named
from .flag_linears import LINEAR_FLAGS, linear_scheme_of_flags
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
from .request import ANTI_METHODS, KV_SCALES, LINEAR_NAMES, OWN_FORMAT, TARGETS, ConvertRequest

KV_CACHE_CHOICES = (*KV_CACHE_DTYPES, "fp8_e5m2")
RECIPES = ("memory-first", "eight-bit", "speed-first", "balanced", "ascend", "ascend-fa")
"""Sets of flags by name: values of `--preset`, whose files are in `recipes/`."""
SCHEME_FLAGS = ("use_kvcache_quant", "use_fa_quant", "scheme", "kv_cache_dtype")
_BIT_FLAGS = ("w_bit", "a_bit", "is_dynamic")
ALTERNATIVES = ((SCHEME_FLAGS, SCHEME_FLAGS), (("quantization",), _BIT_FLAGS), (_BIT_FLAGS, ("quantization",)),
    (("disable_last_linear",), ("embeddings",)), (("embeddings",), ("disable_last_linear",)),
)  # fmt: skip
"""Flags, any of which takes the place of those of a recipe that are beside them."""


def load_recipe(name: str) -> dict[str, Any]:
    """The flags of a recipe, and under "about" what it is for."""
    return json.loads(resource(f"common/convert/recipes/{name}.json"))


def _add_paths(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_path", required=True, help="directory of the checkpoint (safetensors), or hub id")
    add("--save_directory", required=True, type=Path, help="directory to write; must not exist, or be empty")
    about = "engine that is to read it: its names, and a refusal of what it cannot read; none: MindIE's names"
    add("--target", choices=TARGETS, help=about)
    add("--part_file_size", type=positive, help="split the weights into files of at most this many GB")
    add("--format", type=format_named, choices=FORMATS, default=OWN_FORMAT,
        help="of the output: ascend, which the scripts here run, or that of an engine")  # fmt: skip
    add("--resume", action="store_true", help="go on with a conversion that was interrupted, if there is one")
    parser.set_defaults(recipe_group=None, recipe_sym=True)  # of kinds of linears that have groups and zero points
    add("--preset", choices=RECIPES, help="a set of flags by name; flags that are given take the place of its own")


def _add_linears(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--w_bit", type=int, choices=(4, 8, 16), default=8, help="bits of the weights; 16 leaves them in float")
    add(
        "--a_bit",
        type=int,
        choices=(8, 16),
        default=8,
        help="bits of the linear layers' inputs; 16 leaves them in float",
    )
    add("--quantization", choices=tuple(LINEAR_NAMES), help="of the linear layers by name, instead of bits")
    add("--w_sym", type=boolean, default=True, help="False: weights with a zero point, for W8A16 and W4A16")
    add("--group_size", type=int, choices=GROUP_SIZES,
        help="input channels that share a scale of W8A16 or W4A16; 0: per channel (W4A16: default 64)")  # fmt: skip
    add("--w_method", choices=WEIGHT_METHODS, default="MinMax", help="how codes of weights are chosen")
    add("--cpu_activations", choices=CPU_ACTIVATIONS, default=CPU_ACTIVATIONS[0],
        help="inputs of W8A16 and W4A16 on the CPU: int8 per token and group, or as they are")  # fmt: skip
    add("--requantize", action="store_true",
        help="decode linears that the checkpoint holds in codes, and quantize them as flags say")  # fmt: skip
    add("--anti_method", type=anti_method, choices=ANTI_METHODS, default="",
        help="outliers: m1 SmoothQuant, m2 with an offset, m3 AWQ, m4 iterative, m6 searched; none")  # fmt: skip


def _add_cache_and_texts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--use_kvcache_quant", type=boolean, default=False, help="C8: static int8 KV cache, per channel")
    add("--use_fa_quant", type=boolean, default=False, help="FAQuant: static int8 q, k and v, per head")
    add("--scheme", help="any scheme of KV cache and attention: name of a preset, or a JSON file of your own")
    add("--kv_cache_dtype", choices=KV_CACHE_CHOICES, help="the same, as vLLM spells it")
    add("--kv_scales", choices=KV_SCALES, default="data",
        help="static scales: from the texts, from random tokens (vLLM's calculate_kv_scales), or all 1")  # fmt: skip
    add("--calib_file", type=Path, help="texts, one per line: plain, or JSON with 'inputs_pretokenized'")
    add("--calib_texts", nargs="+", help="texts, used if there is no --calib_file")


def _add_choices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--act_method", choices=tuple(ACT_METHOD_NAMES), default="1",
        help="range of static inputs: 1 min-max, 2 histogram, 3 automatic, percentile, mse of outputs")  # fmt: skip
    add(
        "--is_dynamic",
        type=boolean,
        default=False,
        help="quantize each token's inputs by a scale of its own (W8A8_DYNAMIC); the MLP's last too, unless disabled",
    )
    units = "q, k and v count as one, and so do gate and up, and all of a layer's experts"
    about = f"Ln leaves the n linears with the worst outliers in float; {units}"
    add("--disable_level", type=level, default="L0", help=about)
    about = f"so many linears or attentions, those that cost most, stay in float; {units}"
    add("--fa_amp", type=count, default=0, help=about)
    add("--max_kl", type=limit, help="write nothing if the KL from float on the held-back texts is larger")
    add("--disable_names", nargs="+", help="linears left in float, as names or globs; replaces the recipe's list")
    add("--disable_last_linear", type=boolean, help="leave lm_head in float; it is unless --embeddings int8 is given")
    add("--embeddings", choices=EMBEDDINGS, default=EMBEDDINGS[0],
        help="int8: the embedding and lm_head in groups of 32 channels, once where tied")  # fmt: skip


def _add_surroundings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device_type", choices=DEVICES, default="cpu", help="where calibration runs")
    add("--tokenizer_args", type=json_object, default="{}", help="JSON object of arguments for the tokenizer")
    add("--input_ids_name", default="input_ids", help="the tokenizer's name of the ids")
    add("--attention_mask_name", default="attention_mask", help="the tokenizer's name of the mask")
    add("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")
    add("--save_statistics", type=Path, help="also write the calibration statistics to this file")
    for flag, (kind, default, reason) in REFUSED.items():
        add(f"--{flag}", type=kind, default=default, help=f"refused unless {default!r}: {reason}")


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a conversion script."""
    parser = OneLineParser(
        description=f"Convert a {name} checkpoint to quantized linears, KV cache and attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for add_flags in (_add_paths, _add_linears, _add_cache_and_texts, _add_choices, _add_surroundings):
        add_flags(parser)
    return parser


def _given(name: str, argv: list[str] | None) -> set[str]:
    """Flags that stand on the command line."""
    parser = build_parser(name)
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def _states_head(flags: argparse.Namespace, head: str | None) -> bool:
    """Whether names of linears that stay in float say so of the last one."""
    return head is not None and any(fnmatchcase(head, pattern) for pattern in flags.disable_names or ())


def _recipe_flags(recipe: str, given: set[str]) -> dict[str, Any]:
    """The flags of a recipe, but for those that say what given ones say otherwise."""
    flags = {flag: value for flag, value in load_recipe(recipe).items() if flag != "about"}
    flags["recipe_group"] = flags.pop("group_size", None)
    flags["recipe_sym"] = flags.pop("w_sym", True) or "w_sym" in given
    replaced = {flag for alternatives in ALTERNATIVES if given & {*alternatives[0]} for flag in alternatives[1]}
    return {flag: value for flag, value in flags.items() if flag not in replaced}


def parse_flags(name: str, argv: list[str] | None, head: str | None = None) -> argparse.Namespace:
    """Parse and check what can be checked without touching a file; exits with 2 and one line.

    Args:
        name: of the architecture.
        head: name of its last linear, which flags that are given may leave in float; None: they do not by its name.
    """
    parser = build_parser(name)
    flags = parser.parse_args(argv)
    if flags.preset:
        given = _given(name, argv) | ({"disable_last_linear"} if _states_head(flags, head) else set())
        parser.set_defaults(**_recipe_flags(flags.preset, given))
        flags = parser.parse_args(argv)
    for flag, (_, harmless, reason) in REFUSED.items():
        if getattr(flags, flag) != harmless:
            parser.error(f"--{flag} {getattr(flags, flag)}: {reason}")
    chosen = [flag for flag in SCHEME_FLAGS if getattr(flags, flag)]
    if len(chosen) > 1:
        parser.error(f"--{chosen[0]} and --{chosen[1]} exclude each other: both say how K and V are stored; choose one")
    given = flags.preset or _given(name, argv) & LINEAR_FLAGS
    try:
        flags.linear = linear_scheme_of_flags(flags, is_given=bool(given))
    except OctavoError as error:
        parser.error(str(error))
    if flags.linear is None and not chosen and flags.embeddings == "float":
        parser.error("--w_bit 16 --a_bit 16 quantizes nothing; add --scheme, or --use_kvcache_quant True")
    return flags


def _scheme_name(flags: argparse.Namespace) -> str:
    if flags.use_kvcache_quant:
        return "ascend-c8"
    return "ascend-fa" if flags.use_fa_quant else flags.scheme or flags.kv_cache_dtype or "float"


def request_of(flags: argparse.Namespace, architecture: Architecture | str | None = None) -> ConvertRequest:
    """The request that parsed flags stand for.

    Raises:
        OctavoError: both a file of texts and texts are given.
    """
    if flags.calib_file is not None and flags.calib_texts:
        raise OctavoError("--calib_file and --calib_texts: give one of the two")
    return ConvertRequest(
        flags.model_path,
        flags.save_directory,
        scheme=_scheme_name(flags),
        linear=flags.linear,
        architecture=architecture,
        cpu_activations=flags.cpu_activations,
        anti_method=flags.anti_method,
        kv_scales=flags.kv_scales,
        float_linears=flags.disable_names,
        float_head=flags.disable_last_linear,
        embeddings=flags.embeddings,
        float_outliers=flags.disable_level,
        float_costliest=flags.fa_amp,
        max_kl=flags.max_kl,
        calibration=flags.calib_texts if flags.calib_file is None else flags.calib_file,
        target=flags.target,
        device=flags.device_type,
        tokenizer_arguments=flags.tokenizer_args,
        input_ids_name=flags.input_ids_name,
        attention_mask_name=flags.attention_mask_name,
        trust_remote_code=flags.trust_remote_code,
        max_shard_gb=flags.part_file_size,
        save_statistics=flags.save_statistics,
        resume=flags.resume,
        format=flags.format,
        requantize=flags.requantize,
    )


def parse_request(architecture: Architecture, argv: list[str] | None) -> ConvertRequest:
    """The request that a command line stands for; one that cannot be parsed ends the process with 2 and one line.

    Raises:
        OctavoError: see `request_of`.
    """
    return request_of(parse_flags(architecture.name, argv, architecture.decoder.head), architecture)


def recipe_fields(name: str) -> dict[str, Any]:
    """The fields of a request that a recipe sets, for `ConvertRequest(model, output, **recipe_fields("balanced"))`.

    Raises:
        OctavoError: there is no such recipe; the message lists those there are.
    """
    if name not in RECIPES:
        raise OctavoError(f"recipe {name}: is none of {', '.join(RECIPES)}")
    required = ["--model_path", ".", "--save_directory", "."]
    found, plain = (request_of(parse_flags(name, [*required, *more])) for more in (["--preset", name], []))
    values = {part.name: (getattr(found, part.name), getattr(plain, part.name)) for part in fields(ConvertRequest)}
    return {field: value for field, (value, default) in values.items() if value != default}
