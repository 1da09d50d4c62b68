"""What the flags of a conversion ask for: each takes effect, or is refused with the reason."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..architecture import Architecture
from ..command import DefaultsHelp, OneLineParser
from ..errors import OctavoError
from ..runtime.checkpoint.files import read_json
from .flag_groups import add_conversion_flags, add_paths
from .flag_linears import LINEAR_FLAGS, linear_scheme_of_flags
from .flag_values import REFUSED
from .presets import check_preset, load_recipe
from .request import OWN_FORMAT, ConvertRequest
from .spelling import codes_stay

SCHEME_FLAGS = ("use_kvcache_quant", "use_fa_quant", "scheme", "kv_cache_dtype")
_BIT_FLAGS = ("w_bit", "a_bit", "is_dynamic")
ALTERNATIVES = ((SCHEME_FLAGS, SCHEME_FLAGS), (("quantization",), _BIT_FLAGS), (_BIT_FLAGS, ("quantization",)),
    (("disable_last_linear",), ("embeddings",)), (("embeddings",), ("disable_last_linear",)),
)  # fmt: skip
"""Flags, any of which takes the place of those of a recipe that are beside them."""


def build_parser(name: str) -> OneLineParser:
    """The parser of a conversion script."""
    parser = OneLineParser(
        description=f"Convert a {name} checkpoint to quantized linears, KV cache and attention.",
        formatter_class=DefaultsHelp,
        allow_abbrev=False,
    )
    add_paths(parser)
    add_conversion_flags(parser)
    return parser


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> set[str]:
    """Flags that stand on a command line; the parser serves for nothing else afterwards."""
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
    flags["recipe_scale_bits"] = flags.pop("scale_bits", None)
    replaced = {flag for alternatives in ALTERNATIVES if given & {*alternatives[0]} for flag in alternatives[1]}
    return {flag: value for flag, value in flags.items() if flag not in replaced}


def parse_flags(name: str, argv: list[str] | None, head: str | None = None) -> argparse.Namespace:
    """Parse and check what can be checked without touching a file; exits with 2 and one line.

    Args:
        name: of the architecture.
        head: name of its last linear, which flags that are given may leave in float; None: they do not by its name.
    """
    return complete_flags(lambda: build_parser(name), argv, head)


def complete_flags(
    make_parser: Callable[[], argparse.ArgumentParser], argv: list[str] | None, head: str | None
) -> argparse.Namespace:
    """As `parse_flags`, with parsers that take the flags of a conversion, source and output."""
    parser = make_parser()
    flags, given = parser.parse_args(argv), given_flags(make_parser(), argv)
    if flags.preset:
        stated = {"disable_last_linear"} if _states_head(flags, head) else set()
        parser.set_defaults(**_recipe_flags(flags.preset, given | stated))
        flags = parser.parse_args(argv)
    for flag, (_, harmless, reason) in REFUSED.items():
        if getattr(flags, flag) != harmless:
            parser.error(f"--{flag} {getattr(flags, flag)}: {reason}")
    chosen = [flag for flag in SCHEME_FLAGS if getattr(flags, flag)]
    if len(chosen) > 1:
        parser.error(f"--{chosen[0]} and --{chosen[1]} exclude each other: both say how K and V are stored; choose one")
    if flags.target and flags.format != OWN_FORMAT:
        parser.error(f"--target {flags.target} and --format {flags.format} exclude each other: a target is of ascend")
    if flags.calib_file is not None and flags.calib_texts:
        parser.error("--calib_file and --calib_texts: give one of the two")
    try:
        flags.linear = linear_scheme_of_flags(flags, is_given=bool(flags.preset or given & LINEAR_FLAGS))
    except OctavoError as error:
        parser.error(_of_codes(flags, given & LINEAR_FLAGS) or str(error))
    if flags.linear is None and not chosen and flags.embeddings == "float":
        parser.error("--w_bit 16 --a_bit 16 quantizes nothing; add --scheme, or --use_kvcache_quant True")
    return flags


def _of_codes(flags: argparse.Namespace, given: set[str]) -> str | None:
    """What is wrong with flags of linears whose codes stay as a checkpoint has them; None where that is not so."""
    file = Path(flags.model_path, "config.json")
    is_coded = file.is_file() and "quantization_config" in read_json(file)
    if flags.requantize or not is_coded or not (flags.preset or given):
        return None
    asked = f"--preset {flags.preset}" if flags.preset else f"--{min(given)}"
    return codes_stay(asked, f"{flags.model_path} are in codes already")


def _scheme_name(flags: argparse.Namespace) -> str:
    if flags.use_kvcache_quant:
        return "ascend-c8"
    return "ascend-fa" if flags.use_fa_quant else flags.scheme or flags.kv_cache_dtype or "float"


def request_of(flags: argparse.Namespace, architecture: Architecture | str | None = None) -> ConvertRequest:
    """The request that parsed flags stand for.

    Raises:
        OctavoError: see `ConvertRequest`.
    """
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
        mean_bits=flags.w_bits_mean,
        max_kl=flags.max_kl,
        calibration=flags.calib_texts if flags.calib_file is None else flags.calib_file,
        target=flags.target,
        pdmix=flags.pdmix,
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
    """The fields of a request that a preset sets, for `ConvertRequest(model, output, **recipe_fields("eight-bit"))`.

    Raises:
        OctavoError: there is no such preset; the message lists those there are.
    """
    check_preset(name)
    required = ["--model_path", ".", "--save_directory", "."]
    found, plain = (request_of(parse_flags(name, [*required, *more])) for more in (["--preset", name], []))
    values = {part.name: (getattr(found, part.name), getattr(plain, part.name)) for part in fields(ConvertRequest)}
    return {field: value for field, (value, default) in values.items() if value != default}
