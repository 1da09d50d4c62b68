"""Measure the quantized caches of transformers beside ours, and append the rows to `results/peers.csv`.

Peers: `transformers.QuantizedCache` with optimum-quanto (int4, int2; groups of 64 along axis 0) and hqq (int8, int4;
groups of 64 along axis 1), 128 tokens of residual each, and its fp8 (one scale per tensor). What is not installed is
skipped.

Conditions, the same for all: windows spread over a text, float32 weights, a prompt of half a window, then chunks of 64
tokens, teacher-forced; scored are the predictions from the second half, against the float model without a cache. Within
the prompt, the peers attend to float K and V, and ours to what is stored, which is harder. Ours run on a prepared model
(`prepare`), whose biases of K and V are not in the cache.

Bits are those of an element of K and V in sequences of one window in a 16-bit model: codes; scales and zeros, which the
peers hold in the model's dtype, so in 16 bits; and tokens kept in float at their mean number, 16 bits each. The peers'
residual is empty after each 128th token.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rows import RESULTS, Row, append_rows
from scoring import add_scoring_flags, load_float, read_windows
from tqdm import tqdm
from transformers import PreTrainedModel

from octavo.common.convert.measure.fidelity import Fidelity, compare
from octavo.common.convert.output.bundle import commit
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.compatibility import cache_argument
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.stock_model import prepare

CHUNK = 64
GROUP, RESIDUAL = 64, 128
"""Defaults of transformers' QuantizedCache."""
OURS = ("int8-token", "octavo-8", "octavo-4", "kivi-4", "octavo-2", "llamacpp-q4_0")
COLUMNS = ("commit", "model", "system", "what", "windows", "tokens", "bits", "kl", "perplexity", "float_perplexity",
           "perplexity_percent", "top1")  # fmt: skip


class Peer(NamedTuple):
    """A cache of transformers.

    Attributes:
        package: what it needs beside transformers, by its name on PyPI; "" for nothing.
        backend: as `transformers.QuantizedCache` names it; "" for a `DynamicCache`.
        bits: of a code.
        axis: along which groups share a scale.
    """

    package: str
    backend: str
    bits: int
    axis: int = 0


PEERS = {
    "float": Peer("", "", 16),
    "fp8": Peer("", "fp8", 8),
    "quanto-int4": Peer("optimum-quanto", "quanto", 4),
    "quanto-int2": Peer("optimum-quanto", "quanto", 2),
    "hqq-int8": Peer("hqq", "hqq", 8, 1),
    "hqq-int4": Peer("hqq", "hqq", 4, 1),
}

NewCache = Callable[[], transformers.Cache]


def system_of(peer: Peer) -> str | None:
    """Names and versions of what a peer consists of, or None where that is not installed."""
    host = f"transformers {transformers.__version__}"
    if not peer.package:
        return host
    try:
        return f"{host}, {peer.package} {version(peer.package)}"
    except PackageNotFoundError:
        return None


def peer_bits(peer: Peer, length: int) -> float:
    """Bits of an element of K and V in sequences of `length` tokens; see the module."""
    if peer.backend in ("", "fp8"):
        return peer.bits
    residual = (RESIDUAL - 1) / 2
    return (16 * residual + (peer.bits + 2 * 16 / GROUP) * (length - residual)) / length


def peer_cache(peer: Peer, model: PreTrainedModel) -> transformers.Cache:
    """An empty cache of a peer."""
    if not peer.backend:
        return transformers.DynamicCache(config=model.config)
    if peer.backend == "fp8":
        return transformers.QuantizedCache("fp8", model.config)
    sizes = {"nbits": peer.bits, "axis_key": peer.axis, "axis_value": peer.axis}
    return transformers.QuantizedCache(
        peer.backend, model.config, **sizes, q_group_size=GROUP, residual_length=RESIDUAL
    )


def logits_of_second_half(model: PreTrainedModel, ids: torch.Tensor, cache: transformers.Cache) -> torch.Tensor:
    """Logits `[1, S / 2, vocabulary]` of the second half of `[1, S]` ids, in chunks behind a prompt of the first."""
    half = ids.shape[1] // 2
    model(ids[:, :half], **{cache_argument(model): cache}, logits_to_keep=1)
    chunks = ids[:, half:].split(CHUNK, dim=1)
    return torch.cat([model(chunk, **{cache_argument(model): cache}).logits for chunk in chunks], dim=1)


def score(
    model: PreTrainedModel, expected: list[torch.Tensor], samples: list[torch.Tensor], new_cache: NewCache, name: str
) -> Fidelity:
    """Compare a cache with the float logits of the second halves of the samples."""
    floats, whole = iter(expected), iter(samples)
    halves = [sample[:, sample.shape[1] // 2 :] for sample in samples]
    return compare(
        lambda _: next(floats),
        lambda _: logits_of_second_half(model, next(whole), new_cache()),
        tqdm(halves, desc=name, unit="window"),
    )


def measure(flags: argparse.Namespace) -> Iterator[Row]:
    """A row for each peer that is installed, and for each scheme of ours."""
    tree = commit()  # before the results make it dirty
    name = Path(flags.model_path).name
    model, tokenizer = load_float(flags.model_path)
    samples = read_windows(flags, tokenizer)
    with torch.inference_mode():
        expected = [
            model(sample, logits_to_keep=flags.length // 2).logits
            for sample in tqdm(samples, desc="float", unit="window")
        ]

    def row(system: str, what: str, bits: float, new_cache: NewCache) -> Row:
        result = score(model, expected, samples, new_cache, what)
        change = 100 * (result.perplexity / result.float_perplexity - 1)
        numbers = (f"{bits:.2f}", f"{result.kl:.6f}", f"{result.perplexity:.4f}", f"{result.float_perplexity:.4f}",
                   f"{change:+.2f}", f"{result.top1:.4f}")  # fmt: skip
        values = (tree, name, system, what, str(len(samples)), str(result.tokens), *numbers)
        print(", ".join(values[1:]), flush=True)
        return dict(zip(COLUMNS, values, strict=True))

    for what in flags.peers:
        peer = PEERS[what]
        system = system_of(peer)
        if system is None:
            print(f"{what} is skipped: {peer.package} is not installed", flush=True)
            continue
        yield row(system, what, peer_bits(peer, flags.length), lambda peer=peer: peer_cache(peer, model))
    prepare(model)
    for preset in flags.schemes:
        bits = kv_bits_per_element(model.config, load_scheme(preset), flags.length)
        yield row("octavo", preset, bits, lambda preset=preset: QuantizedCache(model.config, preset))


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_scoring_flags(parser)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--schemes", nargs="*", default=list(OURS), help="presets without static scales")
    flags = parser.parse_args()
    append_rows(RESULTS / "peers.csv", COLUMNS, measure(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
