"""Memory of caches whose layers slide, and of caches that keep all, really filled.

    python benchmarks/sliding.py --tokens 32768

A layer of each kind of a model (one that slides, one that sees all) is filled with random k and v, in a first pass and
then in passes of one token, and its bytes are multiplied by how many such layers the model has.
"""

import argparse
import copy
from collections.abc import Iterator

import torch
from transformers import Gemma3TextConfig, MistralConfig, PreTrainedConfig

from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sizes import kv_bytes
from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM, load_scheme

STEPS = 100
"""Passes of one token behind the first."""
MODELS = {
    "Mistral-7B-v0.1": MistralConfig(num_hidden_layers=32, num_key_value_heads=8, head_dim=128, sliding_window=4096),
    "Gemma-3-4B": Gemma3TextConfig(num_hidden_layers=34, num_key_value_heads=4, head_dim=256, sliding_window=1024),
}


def keeps_all(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the same model without windows."""
    config = copy.deepcopy(config)
    config.sliding_window = None
    return config


def layer_bytes(cache: QuantizedCache, index: int, config: PreTrainedConfig, tokens: int) -> int:
    """Bytes of a layer that holds so many tokens."""
    shape = (1, config.num_key_value_heads, tokens - STEPS, config.head_dim)
    for part in (torch.randn(shape, dtype=torch.bfloat16), *torch.randn((STEPS, *shape[:2], 1, shape[3])).bfloat16()):
        cache.update(part, part, index)
    layer = cache.layers[index]
    used = layer.key_store.nbytes() + layer.value_store.nbytes()
    layer.reset()
    return used


def model_bytes(config: PreTrainedConfig, scheme: str, tokens: int) -> int:
    """Bytes of a cache of all layers."""
    cache = QuantizedCache(config, scheme)
    of_kind = {is_sliding: cache.is_sliding.index(is_sliding) for is_sliding in set(cache.is_sliding)}
    measured = {kind: layer_bytes(cache, index, config, tokens) for kind, index in of_kind.items()}
    return sum(measured[is_sliding] for is_sliding in cache.is_sliding)


def rows(schemes: list[str], tokens: int) -> Iterator[str]:
    """A line for each model and scheme."""
    for name, config in MODELS.items():
        for scheme in schemes:
            all_kept, kept = (model_bytes(each, scheme, tokens) for each in (keeps_all(config), config))
            in_use = kv_bytes(config, load_scheme(scheme), tokens, CROP_ROOM)
            yield (
                f"{name:16} {scheme:12} {tokens:>7,} tokens: keeping all {all_kept / 2**20:8.1f} MiB, "
                f"forgetting {kept / 2**20:7.1f} MiB ({all_kept / kept:.1f} times less), in use {in_use / 2**20:7.1f}"
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--schemes", nargs="+", default=["float", "int8-token", "octavo-4"])
    flags = parser.parse_args()
    for row in rows(flags.schemes, flags.tokens):
        print(row, flush=True)


if __name__ == "__main__":
    main()
