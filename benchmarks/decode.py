"""Time one decode step of a whole model, float and quantized in alternation; append rows to `results/decode.csv`.

The caches hold random keys and values of the context's length, so that no long prefill is needed. `float` is the model
of transformers with DynamicCache and SDPA in fp32.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rows import append_rows
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from octavo.common.bundle import commit
from octavo.common.cache import QuantizedCache, head_dim_of
from octavo.ops.library import NAMESPACE

COLUMNS = (
    "commit",
    "torch",
    "transformers",
    "machine",
    "threads",
    "model",
    "what",
    "context",
    "kv_bytes",
    "p50_ms",
    "p20_ms",
    "p80_ms",
    "ratio_to_float",
)
WARM_UP = 3


def _filled(cache: Any, config: Any, context: int) -> Any:
    """The cache with `context` random tokens in every layer, `[1, G, context, D]`."""
    shape = (1, config.num_key_value_heads, context, head_dim_of(config))
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def _kv_bytes(cache: Any) -> int:
    """Bytes that one more token takes in the cache, over all layers."""
    if isinstance(cache, DynamicCache):
        return sum(2 * layer.keys[:, :, 0].nbytes for layer in cache.layers)
    stores = [store for layer in cache.layers for store in (layer.key_store, layer.value_store)]
    return sum(part[:, :, 0].nbytes for store in stores for part in store.parts())


def measure(flags: argparse.Namespace, context: int) -> list[dict[str, str]]:
    """A row per variant: float, the stock model with a quantized cache, and the quantized checkpoints."""
    plain = AutoModelForCausalLM.from_pretrained(flags.model_path, dtype=torch.float32).eval()
    stock = AutoModelForCausalLM.from_pretrained(flags.model_path, dtype=torch.float32).eval()
    stock.set_attn_implementation(NAMESPACE)
    variants = {
        "float": (plain, DynamicCache(config=plain.config)),
        "float weights + int8-token": (stock, QuantizedCache(stock.config, "int8-token")),
    }
    for directory in flags.checkpoint:
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        variants[directory.name] = (model, model.new_cache())
    for model, cache in variants.values():
        _filled(cache, model.config, context)
    token = torch.tensor([[1]])
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for step in tqdm(range(flags.steps + WARM_UP), desc=f"context {context}", unit="step"):
            for name, (model, cache) in variants.items():
                started = time.perf_counter()
                model(token, past_key_values=cache)
                if step >= WARM_UP:
                    seconds[name].append(time.perf_counter() - started)
    kv_bytes = {name: _kv_bytes(cache) for name, (_, cache) in variants.items()}
    baseline = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, times in seconds.items():
        p20, p50, p80 = (statistics.quantiles(times, n=10)[index] * 1e3 for index in (1, 4, 7))
        values = (
            commit(),
            torch.__version__,
            transformers.__version__,
            platform.machine(),
            torch.get_num_threads(),
            Path(flags.model_path).name,
            name,
            context,
            kv_bytes[name],
            f"{p50:.1f}",
            f"{p20:.1f}",
            f"{p80:.1f}",
            f"{baseline * 1e3 / p50:.2f}",
        )
        rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return rows


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="float checkpoint")
    parser.add_argument(
        "--checkpoint", nargs="*", type=Path, default=[], help="quantized directories, named for the table"
    )
    parser.add_argument("--context", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--steps", type=int, default=20)
    flags = parser.parse_args()
    for context in flags.context:
        append_rows("decode.csv", COLUMNS, measure(flags, context))
    return 0


if __name__ == "__main__":
    sys.exit(main())
