"""Memory of caches whose layers slide, and of caches that keep all, really filled.

    python benchmarks/sliding.py --tokens 32768

A layer of each kind of a model (one that slides, one that sees all) is filled with random k and v, in a first pass and
then in passes of one token, and its bytes are multiplied by how many such layers the model has. Rows are appended to
`results/sliding.csv`, of which `tables.py` makes a table.
"""

import argparse
import copy
from collections.abc import Iterator

import torch
from rows import RESULTS, Row, append_rows
from transformers import Gemma3TextConfig, MistralConfig, PreTrainedConfig

from octavo.common.convert.output.bundle import commit
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sizes import kv_bytes
from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM, load_scheme

COLUMNS = ("commit", "model", "scheme", "tokens", "keeping_all", "forgetting", "in_use")
"""The last three in MiB."""
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


def measured_rows(schemes: list[str], tokens: int) -> Iterator[Row]:
    """A row for each model and scheme."""
    for name, config in MODELS.items():
        for scheme in schemes:
            all_kept, kept = (model_bytes(each, scheme, tokens) for each in (keeps_all(config), config))
            in_use = kv_bytes(config, load_scheme(scheme), tokens, CROP_ROOM)
            figures = {"keeping_all": all_kept, "forgetting": kept, "in_use": in_use}
            row = {"commit": commit(), "model": name, "scheme": scheme, "tokens": str(tokens)}
            row |= {part: f"{size / 2**20:.1f}" for part, size in figures.items()}
            print(", ".join(f"{part} {value}" for part, value in row.items()), flush=True)
            yield row


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--schemes", nargs="+", default=["float", "int8-token", "octavo-4"])
    flags = parser.parse_args()
    append_rows(RESULTS / "sliding.csv", COLUMNS, measured_rows(flags.schemes, flags.tokens))


if __name__ == "__main__":
    main()
