"""How text is generated, as flags: greedily unless they ask for samples, and as generation_config.json says beyond."""

import argparse
import math
from typing import Any

import torch

from .common.command import DEVICES
from .common.convert.flag_values import count, positive
from .common.errors import OctavoError

OF_SAMPLING = ("temperature", "top_p", "top_k", "seed")
"""Flags that say nothing without `--do_sample`."""
_SEEDS = 2**64


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Let a parser take what is generated how, and where."""
    add, model = parser.add_argument, "(default: of the model's generation_config.json)"
    add("--max_new_tokens", type=positive, default=128, metavar="N", help="most tokens per answer (default 128)")
    add("--do_sample", action="store_true", help="sample instead of taking the likeliest token")
    add("--temperature", type=float, metavar="T", help=f"with --do_sample: divides the logits, above 0 {model}")
    add(
        "--top_p", type=float, metavar="P", help=f"with --do_sample: of the likeliest tokens that have P in all {model}"
    )
    add("--top_k", type=count, metavar="K", help=f"with --do_sample: of the K likeliest tokens, 0: of all {model}")
    add("--seed", type=count, metavar="N", help="with --do_sample: the same texts each time")
    add("--device_type", choices=DEVICES, default="cpu", help="where to run (default cpu)")


def check_sampling(flags: argparse.Namespace) -> None:
    """Raise an `OctavoError` if flags of sampling do not go together, or are out of their range."""
    for name in OF_SAMPLING:
        if getattr(flags, name) is not None and not flags.do_sample:
            raise OctavoError(f"--{name}: needs --do_sample")
    if flags.temperature is not None and not 0 < flags.temperature < math.inf:
        raise OctavoError(
            f"--temperature {flags.temperature}: is no number above 0; leave --do_sample out for the likeliest token"
        )
    if flags.top_p is not None and not 0 < flags.top_p <= 1:
        raise OctavoError(f"--top_p {flags.top_p}: is not above 0 and at most 1; 1 samples of all tokens")
    if flags.seed is not None and flags.seed >= _SEEDS:
        raise OctavoError(f"--seed {flags.seed}: has more than 64 bits; give a smaller one")


def sampling_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What `generate` of transformers is told; what no flag says, the model's generation_config.json does."""
    given = {name: getattr(flags, name) for name in OF_SAMPLING if name != "seed"}
    return {"do_sample": flags.do_sample, **{name: value for name, value in given.items() if value is not None}}


def set_seed(flags: argparse.Namespace) -> None:
    """Let the random numbers from here on be those of the flags' seed, if they have one."""
    if flags.seed is not None:
        torch.manual_seed(flags.seed)
