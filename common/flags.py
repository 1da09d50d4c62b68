"""The flags of Ascend's `convert_quant_weights.py`: each takes effect, or is refused with the reason.

Names, types and defaults: MindIE-LLM, `examples/atb_models/examples/convert/model_slim/quantifier.py`.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging

from .errors import OctavoError, first_line
from .quantize import AUTOMATIC, HISTOGRAM, MIN_MAX
from .scheme import KV_CACHE_DTYPES

DEVICES = ("cpu", "cuda", "npu")
KV_CACHE_CHOICES = (*KV_CACHE_DTYPES, "fp8_e5m2")
KV_SCALES = ("data", "random", "none")


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


SCHEME_FLAGS = ("use_kvcache_quant", "use_fa_quant", "scheme", "kv_cache_dtype")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "fraction": (float, 0.01, "belongs to sparse quantization (--co_sparse), which Octavo does not do"),
    "co_sparse": (_boolean, False, "sparse weights are not supported; dense W8A8 is what is written"),
    "anti_method": (str, "", "outlier treatment is not supported yet; leave it out or give ''"),
    "do_smooth": (_boolean, False, "smoothing is not supported yet; leave it out"),
    "use_sigma": (
        _boolean,
        False,
        "sigma clipping belongs to sparse and low-bit weights; --act_method clips activations",
    ),
    "sigma_factor": (float, 3.0, "belongs to --use_sigma, which Octavo does not do"),
    "use_reduce_quant": (_boolean, False, "quantized communication belongs to Ascend's tensor parallelism"),
    "tp_size": (int, 1, "belongs to --use_reduce_quant; a checkpoint of Octavo is not split for tensor parallelism"),
    "is_lowbit": (_boolean, False, "low-bit weights are not supported; --w_bit takes 8 or 16"),
    "mm_tensor": (_boolean, False, "weights are per channel, as in the original, which ignores this flag"),
    "w_sym": (_boolean, True, "the weights of W8A8 are symmetric"),
    "open_outlier": (_boolean, True, "belongs to weight-only quantization, which is not supported yet"),
    "group_size": (int, 64, "belongs to weights quantized per group, which are not supported yet"),
    "fa_amp": (int, 0, "leaving attentions in float by sensitivity is not supported yet"),
}
"""Flags that parse, and are refused at any value but the one that asks for nothing: type, that value, reason."""


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a conversion script."""
    parser = OneLineParser(
        description=f"Convert a {name} checkpoint to W8A8, a quantized KV cache or quantized attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_path", required=True, help="directory of the float checkpoint (safetensors), or hub id")
    add("--save_directory", required=True, type=Path, help="directory to write; must not exist, or be empty")
    add("--part_file_size", type=_positive, help="split the weights into files of at most this many GB")
    add("--w_bit", type=int, choices=(8, 16), default=8, help="bits of the weights; 16 leaves them in float")
    add("--a_bit", type=int, choices=(8, 16), default=8, help="bits of the linear layers' inputs; as --w_bit")
    add("--use_kvcache_quant", type=_boolean, default=False, help="C8: static int8 KV cache, per channel")
    add("--use_fa_quant", type=_boolean, default=False, help="FAQuant: static int8 q, k and v, per head")
    add("--scheme", help="any scheme of KV cache and attention: name of a preset, or a JSON file of your own")
    add("--kv_cache_dtype", choices=KV_CACHE_CHOICES, help="the same, as vLLM spells it")
    add("--kv_scales", choices=KV_SCALES, default="data",
        help="static scales: from the texts, from random tokens (vLLM's calculate_kv_scales), or all 1")  # fmt: skip
    add("--calib_file", type=Path, help="texts, one per line: plain, or JSON with 'inputs_pretokenized'")
    add("--calib_texts", nargs="+", help="texts, used if there is no --calib_file")
    add("--act_method", type=int, choices=(MIN_MAX, HISTOGRAM, AUTOMATIC), default=1,
        help="range of activations: 1 min-max, 2 histogram, 3 automatic")  # fmt: skip
    add(
        "--is_dynamic",
        type=_boolean,
        default=False,
        help="quantize each token's inputs by a scale of its own (W8A8_DYNAMIC); down_proj too, unless disabled",
    )
    add("--disable_level", type=_level, default="L0", help="Ln leaves the n linears with the worst outliers in float")
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


def parse_flags(name: str, argv: list[str] | None) -> argparse.Namespace:
    """Parse and check what can be checked without touching a file; exits with 2 and one line."""
    parser = build_parser(name)
    flags = parser.parse_args(argv)
    for flag, (_, harmless, reason) in REFUSED.items():
        if getattr(flags, flag) != harmless:
            parser.error(f"--{flag} {getattr(flags, flag)}: {reason}")
    if flags.w_bit != flags.a_bit:
        parser.error(f"--w_bit {flags.w_bit} --a_bit {flags.a_bit}: W8A8 (8 and 8) or float (16 and 16)")
    chosen = [flag for flag in SCHEME_FLAGS if getattr(flags, flag)]
    if len(chosen) > 1:
        parser.error(f"--{chosen[0]} and --{chosen[1]} exclude each other: both say how K and V are stored; choose one")
    if flags.w_bit == 16 and not chosen:
        parser.error("--w_bit 16 --a_bit 16 quantizes nothing; add --scheme, or --use_kvcache_quant True")
    if flags.is_dynamic and flags.act_method != MIN_MAX:
        parser.error(f"--act_method {flags.act_method}: --is_dynamic takes each token's own range; leave it out")
    if flags.w_bit == 16:
        for flag in ("disable_names", "disable_level", "is_dynamic"):
            if getattr(flags, flag):
                parser.error(f"--{flag}: --w_bit 16 leaves every linear in float")
    return flags


def run_script(work: Any, argv: list[str] | None) -> int:
    """Run a script's `work(argv)`; an error the user can mend is one line on stderr and exit code 1."""
    # transformers' report of a failed load fills a screen; the one line of the error names the tensor
    logging.set_verbosity_error()
    try:
        work(argv)
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a damaged file can make torch or transformers raise anything
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        print(f"error: {type(error).__name__}: {first_line(error)} (OCTAVO_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return 0
