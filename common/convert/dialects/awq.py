"""AWQ, as AutoAWQ writes it: W4A16 of a checkpoint for vLLM, LMDeploy, SGLang and transformers."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ...runtime.checkpoint.files import TensorHeader
from ...runtime.schemes.linear_scheme import W4A16
from .dialect import PARSED, RUN, Dialect, Engine, Target
from .directory import OctavoDirectory
from .form import Form, LinearForm
from .layouts.awq import awq_config, pack_awq
from .word_layouts import LMDEPLOY_GROUP, group_of, lmdeploy_command, serve_words, unsaid, write_words

_IN_WORD = 8
_INSTEAD = "--w_bit 4 --a_bit 16"


def _check(form: Form) -> Iterator[str]:
    """See `Dialect`."""
    yield from unsaid(form, (W4A16,), _INSTEAD, _IN_WORD)


def _headers(linear: LinearForm, groups: int) -> dict[str, TensorHeader]:
    words = linear.out_features // _IN_WORD
    return {
        "qweight": TensorHeader("I32", (linear.in_features, words)),
        "qzeros": TensorHeader("I32", (groups, words)),
        "scales": TensorHeader("F16", (groups, linear.out_features)),
    }


def _pack(name: str, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    return pack_awq(codes, zeros, scales)


def _write(directory: OctavoDirectory, target: Target) -> list[str]:
    """See `Dialect`."""
    form = directory.form
    config = awq_config(group_of(form), sorted(name for name in form.float_linears if name != form.head))
    return write_words(directory, target, config, _headers, _pack)


def _serve(form: Form, place: Path) -> list[str]:
    """See `Dialect`."""
    lines = serve_words(form, place)
    if group_of(form) == LMDEPLOY_GROUP:
        lines.append(lmdeploy_command(place, "awq"))
    return lines


AWQ = Dialect(
    name="awq",
    about="W4A16 as AutoAWQ writes it, for vLLM, LMDeploy, SGLang and transformers",
    engines=(
        Engine("transformers", "5.24 with gptqmodel 7.7", RUN, "W4A16 in groups, by its own linears"),
        Engine("vLLM", "0.32", RUN, "W4A16 in groups; what the cache is in, by its own flag"),
        Engine("SGLang", "0.5.23", PARSED, "W4A16 in groups"),
        Engine("LMDeploy", "0.18", PARSED, "W4A16 in groups of 128"),
    ),
    check=_check,
    write=_write,
    serve=_serve,
)
