"""GPTQ, as AutoGPTQ and GPTQModel write it: W4A16 and W8A16 of a checkpoint for vLLM, SGLang and transformers."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ...runtime.checkpoint.files import TensorHeader
from ...runtime.schemes.linear_scheme import W4A16, W8A16
from .dialect import PARSED, RUN, Dialect, Engine, Target
from .directory import OctavoDirectory
from .form import Form, LinearForm
from .layouts.gptq import FIRST, SECOND, gptq_config, pack_gptq
from .layouts.words import words_of
from .word_layouts import (
    LMDEPLOY_GROUP,
    group_of,
    layer_linears,
    lmdeploy_command,
    serve_words,
    unsaid,
    write_words,
)

_BITS = {W4A16: 4, W8A16: 8}
_WHOLE_WORDS = 8
_ZEROS = (
    "vLLM 0.32, SGLang 0.5.23 and LMDeploy 0.18 take no zeros in this layout, transformers with gptqmodel does; "
    "for them convert without --w_sym False, or write --format awq"
)
_INSTEAD = "--w_bit 4 --a_bit 16, or --w_bit 8 --a_bit 16"


def _check(form: Form) -> Iterator[str]:
    """See `Dialect`."""
    yield from unsaid(form, tuple(_BITS), _INSTEAD, _WHOLE_WORDS)
    for name, linear in layer_linears(form).items():
        if linear.in_features % _WHOLE_WORDS:
            yield f"{name} has {linear.in_features} input channels, no multiple of {_WHOLE_WORDS}; leave it in float"


def _headers(linear: LinearForm, groups: int) -> dict[str, TensorHeader]:
    bits = _BITS[linear.label]
    return {
        "qweight": TensorHeader("I32", (words_of(linear.in_features, bits), linear.out_features)),
        "qzeros": TensorHeader("I32", (groups, words_of(linear.out_features, bits))),
        "scales": TensorHeader("F16", (groups, linear.out_features)),
        "g_idx": TensorHeader("I32", (linear.in_features,)),
    }


def _version(directory: OctavoDirectory) -> str:
    """The first version of the layout, unless a zero is the lowest code, which it cannot hold."""
    for name, linear in layer_linears(directory.form).items():
        if linear.symmetric:
            continue
        zero = directory.linear(name).zero
        if zero is not None and float(zero.min()) == -(2 ** (_BITS[linear.label] - 1)):
            return SECOND
    return FIRST


def _write(directory: OctavoDirectory, target: Target) -> list[str]:
    """See `Dialect`."""
    form, version = directory.form, _version(directory)
    linears = layer_linears(form)
    bits, symmetric = _BITS[next(iter(linears.values())).label], all(linear.symmetric for linear in linears.values())
    floats = [name for name in form.float_linears if name != form.head]
    config = gptq_config(bits, group_of(form), symmetric, version=version)
    if floats:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in floats}

    def pack(name: str, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        return pack_gptq(codes, zeros, scales, bits, version)

    notes = write_words(directory, target, config, _headers, pack)
    return notes if symmetric else [*notes, _ZEROS]


def _serve(form: Form, place: Path) -> list[str]:
    """See `Dialect`."""
    linears = layer_linears(form).values()
    if not all(linear.symmetric for linear in linears):
        return []
    is_small = all(linear.label == W4A16 for linear in linears)
    lines = serve_words(form, place, "" if is_small else ", on GPUs")
    if is_small and group_of(form) == LMDEPLOY_GROUP:
        lines.append(lmdeploy_command(place, "gptq"))
    return lines


GPTQ = Dialect(
    name="gptq",
    about="W4A16 and W8A16 as GPTQModel writes them, for vLLM, LMDeploy, SGLang and transformers",
    engines=(
        Engine("transformers", "5.24 with gptqmodel 7.7", RUN, "W4A16 and W8A16, by its own linears"),
        Engine("vLLM", "0.32", RUN, "W4A16 without zeros, W8A16 on GPUs; what the cache is in, by its own flag"),
        Engine("SGLang", "0.5.23", PARSED, "W4A16 without zeros"),
        Engine("LMDeploy", "0.18", PARSED, "W4A16 without zeros, in groups of 128"),
    ),
    check=_check,
    write=_write,
    serve=_serve,
)
