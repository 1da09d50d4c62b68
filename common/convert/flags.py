"""The flags of Ascend's `convert_quant_weights.py`: each takes effect, or is refused with the reason.

Names, types and defaults: MindIE-LLM, `examples/atb_models/examples/convert/model_slim/quantifier.py`.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from ...ops.shared.resources import resource
from ..command import DEVICES, OneLineParser
from ..errors import OctavoError
from ..runtime.schemes.kv_scheme import KV_CACHE_DTYPES
from ..runtime.schemes.linear_scheme import (
    FP8_DYNAMIC,
    GROUP_SIZES,
    LINEAR_LABELS,
    W4A16,
    W8A8,
    W8A8_DYNAMIC,
    W8A16,
    WEIGHT_METHODS,
    WEIGHT_ONLY,
    LinearScheme,
)

KV_CACHE_CHOICES = (*KV_CACHE_DTYPES, "fp8_e5m2")
KV_SCALES = ("data", "random", "none")
ACT_METHOD_NAMES = {"1": "minmax", "2": "histogram", "3": "auto", "percentile": "percentile", "mse": "mse"}
ANTI_METHODS = ("", "m1", "m2", "m3", "m4", "m6")
END_TO_END = ("memory-first", "speed-first", "balanced", "ascend", "ascend-fa")
"""Values of `--preset`."""
QUANTIZATIONS = {"float": None, **{label.lower(): label for label in LINEAR_LABELS}, "fp8": FP8_DYNAMIC}
"""Values of `--quantization`: Ascend's labels in small letters, as MindIE spells them, and vLLM's fp8."""
BITS = {(8, 16): W8A16, (4, 16): W4A16, (16, 16): None}
"""Label by `--w_bit` and `--a_bit`; 8 and 8 depend on `--is_dynamic`."""
DEFAULT_GROUP = {W4A16: 64}


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text == "True"


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def _level(text: str) -> int:
    if not re.fullmatch(r"L(0|[1-9][0-9]*)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not L0, L1, L2, ...")
    return int(text[1:])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of layers")
    return int(text)


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


SCHEME_FLAGS = ("use_kvcache_quant", "use_fa_quant", "scheme", "kv_cache_dtype")


_BIT_FLAGS = ("w_bit", "a_bit", "is_dynamic")
ALTERNATIVES = ((SCHEME_FLAGS, SCHEME_FLAGS), (("quantization",), _BIT_FLAGS), (_BIT_FLAGS, ("quantization",)))
"""Flags, any of which takes the place of those of a preset that are beside them."""


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "fraction": (float, 0.01, "belongs to sparse quantization (--co_sparse), which Octavo does not do"),
    "co_sparse": (_boolean, False, "sparse weights are not supported; dense W8A8 is what is written"),
    "do_smooth": (_boolean, False, "the original's name for smoothing within the quantizer; --anti_method smooths"),
    "use_sigma": (
        _boolean,
        False,
        "sigma clipping belongs to sparse and low-bit weights; --act_method clips activations",
    ),
    "sigma_factor": (float, 3.0, "belongs to --use_sigma, which Octavo does not do"),
    "use_reduce_quant": (_boolean, False, "quantized communication belongs to Ascend's tensor parallelism"),
    "tp_size": (int, 1, "belongs to --use_reduce_quant; a checkpoint of Octavo is not split for tensor parallelism"),
    "is_lowbit": (_boolean, False, "the original's own low-bit algorithm; --w_bit 4 with --w_method GPTQ is Octavo's"),
    "mm_tensor": (_boolean, False, "weights are per channel, as in the original, which ignores this flag"),
    "open_outlier": (_boolean, True, "weights keep no outliers apart; --quantization w8a8_mixed keeps those of inputs"),
}
"""Flags that parse, and are refused at any value but the one that asks for nothing: type, that value, reason."""
NO_M5 = (
    "m5 is CBQ, which trains the weights of several layers together; m4 and m6 are the exact rewrites that come closest"
)


def _anti_method(text: str) -> str:
    if text == "m5":
        raise argparse.ArgumentTypeError(NO_M5)
    return "" if text == "none" else text


def end_to_end(name: str) -> dict[str, Any]:
    """The flags that a `--preset` stands for, and under "about" what it is for."""
    return json.loads(resource(f"common/convert/recipes/{name}.json"))


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a conversion script."""
    parser = OneLineParser(
        description=f"Convert a {name} checkpoint to quantized linears, KV cache and attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_path", required=True, help="directory of the float checkpoint (safetensors), or hub id")
    add("--save_directory", required=True, type=Path, help="directory to write; must not exist, or be empty")
    add("--part_file_size", type=_positive, help="split the weights into files of at most this many GB")
    add("--resume", action="store_true", help="go on with a conversion that was interrupted, if there is one")
    parser.set_defaults(preset_group=None, preset_sym=True)  # of kinds of linears that have groups and zero points
    add("--preset", choices=END_TO_END, help="a set of flags by name; flags that are given take the place of its own")
    add("--w_bit", type=int, choices=(4, 8, 16), default=8, help="bits of the weights; 16 leaves them in float")
    add(
        "--a_bit",
        type=int,
        choices=(8, 16),
        default=8,
        help="bits of the linear layers' inputs; 16 leaves them in float",
    )
    add("--quantization", choices=tuple(QUANTIZATIONS), help="of the linear layers by name, instead of bits")
    add("--w_sym", type=_boolean, default=True, help="False: weights with a zero point, for W8A16 and W4A16")
    add("--group_size", type=int, choices=GROUP_SIZES,
        help="input channels that share a scale of W8A16 or W4A16; 0: per channel (W4A16: default 64)")  # fmt: skip
    add("--w_method", choices=WEIGHT_METHODS, default="MinMax", help="how codes of weights are chosen")
    add("--anti_method", type=_anti_method, choices=ANTI_METHODS, default="",
        help="outliers: m1 SmoothQuant, m2 with an offset, m3 AWQ, m4 iterative, m6 searched; none")  # fmt: skip
    add("--use_kvcache_quant", type=_boolean, default=False, help="C8: static int8 KV cache, per channel")
    add("--use_fa_quant", type=_boolean, default=False, help="FAQuant: static int8 q, k and v, per head")
    add("--scheme", help="any scheme of KV cache and attention: name of a preset, or a JSON file of your own")
    add("--kv_cache_dtype", choices=KV_CACHE_CHOICES, help="the same, as vLLM spells it")
    add("--kv_scales", choices=KV_SCALES, default="data",
        help="static scales: from the texts, from random tokens (vLLM's calculate_kv_scales), or all 1")  # fmt: skip
    add("--calib_file", type=Path, help="texts, one per line: plain, or JSON with 'inputs_pretokenized'")
    add("--calib_texts", nargs="+", help="texts, used if there is no --calib_file")
    add("--act_method", choices=tuple(ACT_METHOD_NAMES), default="1",
        help="range of static inputs: 1 min-max, 2 histogram, 3 automatic, percentile, mse of outputs")  # fmt: skip
    add(
        "--is_dynamic",
        type=_boolean,
        default=False,
        help="quantize each token's inputs by a scale of its own (W8A8_DYNAMIC); the MLP's last too, unless disabled",
    )
    add("--disable_level", type=_level, default="L0", help="Ln leaves the n linears with the worst outliers in float")
    add("--fa_amp", type=_count, default=0, help="so many linears or attentions, those that cost most, stay in float")
    add("--max_kl", type=_limit, help="write nothing if the KL from float on the held-back texts is larger")
    add("--disable_names", nargs="+", help="linears left in float, as names or globs; replaces the recipe's list")
    add("--disable_last_linear", type=_boolean, default=True, help="leave lm_head in float")
    add("--device_type", choices=DEVICES, default="cpu", help="where calibration runs")
    add("--tokenizer_args", type=_json_object, default="{}", help="JSON object of arguments for the tokenizer")
    add("--input_ids_name", default="input_ids", help="the tokenizer's name of the ids")
    add("--attention_mask_name", default="attention_mask", help="the tokenizer's name of the mask")
    add("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")
    add("--save_statistics", type=Path, help="also write the calibration statistics to this file")
    for flag, (kind, default, reason) in REFUSED.items():
        add(f"--{flag}", type=kind, default=default, help=f"refused unless {default!r}: {reason}")
    return parser


def _given(name: str, argv: list[str] | None) -> set[str]:
    """Flags that stand on the command line."""
    parser = build_parser(name)
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def _preset_flags(preset: str, given: set[str]) -> dict[str, Any]:
    """The flags of a preset, but for those that say what given ones say otherwise."""
    flags = {flag: value for flag, value in end_to_end(preset).items() if flag != "about"}
    flags["preset_group"] = flags.pop("group_size", None)
    flags["preset_sym"] = flags.pop("w_sym", True) or "w_sym" in given
    replaced = {flag for alternatives in ALTERNATIVES if given & {*alternatives[0]} for flag in alternatives[1]}
    return {flag: value for flag, value in flags.items() if flag not in replaced}


def parse_flags(name: str, argv: list[str] | None) -> argparse.Namespace:
    """Parse and check what can be checked without touching a file; exits with 2 and one line."""
    parser = build_parser(name)
    flags = parser.parse_args(argv)
    if flags.preset:
        parser.set_defaults(**_preset_flags(flags.preset, _given(name, argv)))
        flags = parser.parse_args(argv)
    for flag, (_, harmless, reason) in REFUSED.items():
        if getattr(flags, flag) != harmless:
            parser.error(f"--{flag} {getattr(flags, flag)}: {reason}")
    chosen = [flag for flag in SCHEME_FLAGS if getattr(flags, flag)]
    if len(chosen) > 1:
        parser.error(f"--{chosen[0]} and --{chosen[1]} exclude each other: both say how K and V are stored; choose one")
    try:
        flags.linear = chosen_linear_scheme(flags)
    except OctavoError as error:
        parser.error(str(error))
    if flags.linear is None and not chosen:
        parser.error("--w_bit 16 --a_bit 16 quantizes nothing; add --scheme, or --use_kvcache_quant True")
    return flags


FOR_LINEARS = {
    "disable_names": None, "disable_level": 0, "is_dynamic": False, "anti_method": "", "group_size": None,
    "w_method": "MinMax", "w_sym": True, "act_method": "1", "disable_last_linear": True,
}  # fmt: skip
"""Flags that mean nothing where every linear stays in float, and what they are unless given."""


def chosen_linear_scheme(flags: argparse.Namespace) -> LinearScheme | None:
    """How linear layers are quantized, from the flags; None leaves them in float.

    Raises:
        OctavoError: flags that do not go together.
    """
    if flags.quantization and (flags.is_dynamic or (flags.w_bit, flags.a_bit) != (8, 8)):
        raise OctavoError("--quantization, and --w_bit, --a_bit or --is_dynamic exclude each other: choose one way")
    label = QUANTIZATIONS[flags.quantization] if flags.quantization else _label_of_bits(flags)
    if label is None:
        for flag, unless_given in FOR_LINEARS.items():
            if getattr(flags, flag) != unless_given:
                raise OctavoError(f"--{flag}: --w_bit 16 leaves every linear in float")
        return None
    if label not in WEIGHT_ONLY and (flags.group_size or not flags.w_sym):
        given = f"--group_size {flags.group_size}" if flags.group_size else "--w_sym False"
        raise OctavoError(
            f"{given}: {label} has symmetric weights with a scale per output channel; W8A16 (--a_bit 16) and W4A16 "
            "(--w_bit 4 --a_bit 16) take groups and zero points"
        )
    usual = (flags.preset_group or DEFAULT_GROUP.get(label, 0)) if label in WEIGHT_ONLY else 0
    scheme = LinearScheme(
        label,
        group_size=usual if flags.group_size is None else flags.group_size,
        symmetric=flags.w_sym and (flags.preset_sym or label not in WEIGHT_ONLY),
        w_method=flags.w_method,
        act_method=ACT_METHOD_NAMES[flags.act_method],
    )
    if not scheme.is_static and flags.act_method != "1":
        raise OctavoError(
            f"--act_method {flags.act_method}: {label} (--is_dynamic, --quantization) has no static ranges of inputs"
        )
    return scheme


def _label_of_bits(flags: argparse.Namespace) -> str | None:
    bits = flags.w_bit, flags.a_bit
    if bits == (8, 8):
        return W8A8_DYNAMIC if flags.is_dynamic else W8A8
    if bits not in BITS:
        raise OctavoError(
            f"--w_bit {bits[0]} --a_bit {bits[1]}: "
            "choose 8 and 8 (W8A8), 8 and 16 (W8A16), 4 and 16 (W4A16), or 16 and 16 (float)"
        )
    if flags.is_dynamic:
        raise OctavoError(f"--is_dynamic: inputs are quantized by --w_bit 8 --a_bit 8, not {bits[0]} and {bits[1]}")
    return BITS[bits]
