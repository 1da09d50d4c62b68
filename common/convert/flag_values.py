"""What stands behind flags on a command line: how it is read, and which flags of the original are refused."""

import argparse
import json
import math
import re
from typing import Any

from .request import NO_M5

ACT_METHOD_NAMES = {"1": "minmax", "2": "histogram", "3": "auto", "percentile": "percentile", "mse": "mse"}
"""Values of `--act_method`, and what `LinearScheme` calls them."""


def boolean(text: str) -> bool:
    """True or False, as the original spells them."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text == "True"


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def level(text: str) -> int:
    """n of Ln."""
    if not re.fullmatch(r"L(0|[1-9][0-9]*)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not L0, L1, L2, ...")
    return int(text[1:])


def positive(text: str) -> int:
    """An integer above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def count(text: str) -> int:
    """An integer, 0 or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no integer, 0 or above")
    return int(text)


def limit(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def anti_method(text: str) -> str:
    """The name of a treatment of outliers; none is no name."""
    if text == "m5":
        raise argparse.ArgumentTypeError(NO_M5)
    return "" if text == "none" else text


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "fraction": (float, 0.01, "belongs to sparse quantization (--co_sparse), which Octavo does not do"),
    "co_sparse": (boolean, False, "sparse weights are not supported; dense W8A8 is what is written"),
    "do_smooth": (boolean, False, "the original's name for smoothing within the quantizer; --anti_method smooths"),
    "use_sigma": (
        boolean,
        False,
        "sigma clipping belongs to sparse and low-bit weights; --act_method clips activations",
    ),
    "sigma_factor": (float, 3.0, "belongs to --use_sigma, which Octavo does not do"),
    "use_reduce_quant": (boolean, False, "quantized communication belongs to Ascend's tensor parallelism"),
    "tp_size": (int, 1, "belongs to --use_reduce_quant; a checkpoint of Octavo is not split for tensor parallelism"),
    "is_lowbit": (boolean, False, "the original's own low-bit algorithm; --w_bit 4 with --w_method GPTQ is Octavo's"),
    "mm_tensor": (boolean, False, "weights are per channel, as in the original, which ignores this flag"),
    "open_outlier": (boolean, True, "weights keep no outliers apart; --quantization w8a8_mixed keeps those of inputs"),
}
"""Flags that parse, and are refused at any value but the one that asks for nothing: type, that value, reason."""
