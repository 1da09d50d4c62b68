"""`octavo serve DIR`: an OpenAI-style endpoint, from a converted directory or a model with a quantized cache."""

import argparse
import shlex
import sys
from pathlib import Path

from ..common.command import DEVICES, OneLineParser
from ..common.convert.dialects.directory import OctavoDirectory
from ..common.convert.dialects.rewriting import refusals
from ..common.convert.dialects.table import formats_of
from ..common.errors import OctavoError
from ..common.runtime.cache.sizes import kv_bytes_per_token
from ..common.runtime.schemes.kv_scheme import load_scheme
from ..generate import Speaker
from ..place import add_model_flags, find_place, rewrite_command, speaker_of, usual_output
from ..serving import check_port, check_server, serve

_BATCHES = "vllm"
_ONE_BY_ONE = (
    "requests are answered one after the other: transformers' continuous batching takes no attention but its own"
)


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take the model, and where it is served."""
    add_model_flags(parser)
    add = parser.add_argument
    add("--host", default="localhost", help="address to listen at (default localhost: this machine alone)")
    add("--port", type=int, default=8000, help="port to listen at (default 8000)")
    add("--served_model_name", metavar="NAME", help="what clients call the model (default: the directory's name)")
    add("--device_type", choices=DEVICES, default="cpu", help="where to run (default cpu)")
    add("--continuous_batching", action="store_true", help=argparse.SUPPRESS)


def _engine(flags: argparse.Namespace) -> str | None:
    """The command that writes a model for an engine which batches requests; None if no format of it holds the model."""
    place, suffix = find_place(flags.model_path), f"-{_BATCHES}"
    if not place.is_converted:
        rest = "--quantization w8a8_dynamic --format compressed-tensors --save_directory"
        source, target = flags.model_path, usual_output(flags.model_path, suffix)
        return f"octavo convert {shlex.quote(source)} {rest} {shlex.quote(str(target))}"
    refused = refusals(OctavoDirectory(place.directory).form)
    found = next((name for name in formats_of(_BATCHES) if refused[name] is None), None)
    return None if found is None else rewrite_command(flags.model_path, place.directory, found, suffix)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _banner(speaker: Speaker, name: str, flags: argparse.Namespace) -> str:
    config, itemsize = speaker.model.config, speaker.model.dtype.itemsize
    ours, plain = (kv_bytes_per_token(config, scheme, itemsize) for scheme in (speaker.scheme, load_scheme("float")))
    engine = _engine(flags)
    many = f"; for many at once: {engine}" if engine else ""
    return (
        f"{name} at http://{flags.host}:{flags.port}/v1, KV cache {speaker.scheme.name}: {ours:,} bytes a token "
        f"(in float {plain:,}); {_ONE_BY_ONE}{many}"
    )


def run(flags: argparse.Namespace) -> None:
    """Serve the model until somebody ends it.

    Raises:
        OctavoError: there is no such model, or none that can be served; something is missing.
    """
    if flags.continuous_batching:
        engine = _engine(flags)
        raise OctavoError(f"--continuous_batching: {_ONE_BY_ONE}; leave it out{(engine and f', or {engine}') or ''}")
    check_server()
    check_port(flags.host, flags.port)
    speaker = speaker_of(flags)
    name = flags.served_model_name or Path(flags.model_path).resolve().name
    _say(_banner(speaker, name, flags))
    serve(speaker, name, flags.host, flags.port, _say)
