"""`octavo schemes [NAME]`: how K and V can be stored, what serves that on this machine, and when to choose which."""

import argparse
import json
import textwrap
from collections.abc import Iterable
from typing import Any

import torch

from ..common.command import aligned
from ..common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from ..common.runtime.schemes.tensor_codec import Codec
from ..counting import bits_note
from ..ops.attention import attention
from ..ops.shared.registry import served_by
from ..wording import COMPARED, HEAD_DIM, KV_HEADS, LAYERS, TOKENS, WHEN, codec_short, codec_words, usual_bits

HEADER = ("scheme", "K", "V", "bits", "texts", "kernel", "when to choose it")
WIDTH = 120
OPTIONS = (
    "sinks",
    "window",
    "rotate_key",
    "rotate_value",
    "smooth_key",
    "center_key",
    "key_basis",
    "value_basis",
    "sharp_share",
    "sharp_dtype",
    "prefill",
    "layers",
    "float_layers",
)
"""Fields of a scheme beside its codecs that say what it does."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Let a parser take a scheme, or none."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a scheme, or a JSON file: its definition in full")
    parser.add_argument("--all", action="store_true", help="list those too that are only there to be compared with")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")


def this_device() -> str:
    """The device of this machine that a model would run on: "cuda", "npu" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "npu" if hasattr(torch, "npu") and torch.npu.is_available() else "cpu"


def kernel_of(scheme: Scheme, device: str) -> str:
    """What attends to K and V that are stored so on a device, in a word or two."""
    kernel = served_by(attention.__name__, device.upper()).split(";")[0].split(":")[0].removesuffix(" kernel")
    codecs = [codec for codec in (scheme.key, scheme.value) if codec is not None]
    decodes = not all(codec.is_native_on(device) for codec in codecs)
    return f"{kernel}, decoded" if decodes else kernel


def facts_of(scheme: Scheme, device: str) -> dict[str, Any]:
    """What there is to say of a scheme, as plain data."""
    return {
        "name": scheme.name,
        "key": codec_words(scheme.key),
        "value": codec_words(scheme.value),
        "query": codec_words(scheme.query),
        "bits": round(usual_bits(scheme), 2),
        "needs_calibration": scheme.is_static,
        "device": device,
        "kernel": kernel_of(scheme, device),
        "when": WHEN.get(scheme.name, ""),
        "origin": scheme.origin,
        "definition": scheme.to_dict(),
    }


def _row(scheme: Scheme, device: str) -> tuple[str, ...]:
    facts = facts_of(scheme, device)
    texts = "yes" if facts["needs_calibration"] else ""
    codecs = codec_short(scheme.key), codec_short(scheme.value)
    return facts["name"], *codecs, f"{facts['bits']:.2f}", texts, facts["kernel"], facts["when"]


def _code_bits(scheme: Scheme) -> int:
    """Bits of a code of K and of one of V together."""
    return sum(16 if codec is None else codec.bits for codec in (scheme.key, scheme.value))


def table(device: str, names: Iterable[str] = WHEN) -> list[str]:
    """Schemes, those of the most bits first, in lines; of all others, how to see them."""
    schemes = sorted(map(load_scheme, names), key=lambda scheme: -_code_bits(scheme))
    shape = f" of a model of {LAYERS} layers with {KV_HEADS} KV heads of {HEAD_DIM} channels"
    has_more = len(schemes) < len(WHEN)
    return [
        *aligned([HEADER, *(_row(scheme, device) for scheme in schemes)]),
        *(["", f"--all lists those to be compared with as well: {_families(COMPARED)}."] if has_more else []),
        "",
        *textwrap.wrap(f"{bits_note(TOKENS, shape)}.", WIDTH),
        "K, V: the type of a code, and what shares a scale; /N: groups of N tokens (channel) or channels (token).",
        f"texts: scales come from calibration texts. kernel: of attention, on this machine's {device}; decoded: codes",
        "become floats, block by block, before it reads them.",
        "octavo schemes NAME prints a definition in full; octavo convert MODEL --scheme NAME takes it.",
    ]


def _families(names: Iterable[str]) -> str:
    """The names up to their last dash, each once."""
    return ", ".join(dict.fromkeys(name.rpartition("-")[0] for name in names))


def _details(codec: Codec | None) -> str:
    """A codec in words, with what the few do not say."""
    if codec is None:
        return "float"
    kind = "static" if not codec.dynamic else f"dynamic, scales in {codec.scale_dtype}"
    more = [f"rule {codec.rule}"] if codec.rule != "range" else []
    more += [f"{codec.outliers} outlier(s) per token and head in float16"] if codec.outliers else []
    more += [f"balanced in tiles of {codec.tile} tokens"] if codec.tile else []
    more += ["as it was before RoPE"] if codec.before_rope else []
    unit = "scales in units of" if codec.dynamic else "scale"
    more += [f"{unit} {codec.fixed_scale:g}"] if codec.fixed_scale else []
    return ", ".join([codec_words(codec), kind, *more])


def description(scheme: Scheme, device: str) -> list[str]:
    """One scheme in full, in lines."""
    facts, stated = facts_of(scheme, device), scheme.to_dict()
    rows = [
        ("scheme", scheme.name),
        ("from", scheme.origin),
        ("when to choose it", facts["when"]),
        ("K", _details(scheme.key)),
        ("V", _details(scheme.value)),
        ("q", _details(scheme.query)),
        *((option.replace("_", " "), str(stated[option])) for option in OPTIONS if option in stated),
        ("bits, all counted", f"{facts['bits']:.2f}"),
        ("calibration texts", "needed" if scheme.is_static else "not needed"),
        (f"kernel on this {device}", facts["kernel"]),
    ]
    return [
        *aligned([row for row in rows if row[1]]),
        "",
        "as a file for --scheme FILE.json:",
        json.dumps(stated, indent=1),
    ]


def run(flags: argparse.Namespace) -> None:
    """Print the table of all schemes, or the definition of one.

    Raises:
        OctavoError: there is no such scheme; the message has the nearest.
    """
    device = this_device()
    schemes = [load_scheme(name) for name in ([flags.name] if flags.name else PRESETS)]
    if flags.json:
        found = [facts_of(scheme, device) for scheme in schemes]
        print(json.dumps(found[0] if flags.name else found, indent=2))
        return
    listed = [name for name in WHEN if flags.all or name not in COMPARED]
    print("\n".join(description(schemes[0], device) if flags.name else table(device, listed)))
