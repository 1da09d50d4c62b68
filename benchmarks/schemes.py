"""Time attention of one query over what the cache of each scheme holds, per key, beside SDPA over floats.

    python benchmarks/schemes.py
    python benchmarks/schemes.py --schemes int8-token octavo-4 --tokens 8192

A layer of each scheme is filled with random k and v. One round appends a token to each and attends to all, in turns;
`attention_us` and `update_us` are medians of the two halves. The token is the last but one of a group of tokens, so
that none becomes codes by it where they do so in groups. Several layers of each kind take turns too, so that a cache
comes from memory as far as it does in a model. Before a scheme is timed, its output is held against that of a query
in float64, which the references compute. Rows are appended to `results/schemes.csv`, of which `tables.py` makes a
table.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from cases import check_close
from rows import RESULTS, Row, append_rows
from torch.nn import functional

from octavo.common.convert.output.bundle import commit
from octavo.common.runtime.attention import quantized_attention
from octavo.common.runtime.cache.quantized_layer import QuantizedLayer
from octavo.common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.common.runtime.static_scales import LayerScales
from octavo.machine import device_name

COLUMNS = ("commit", "torch", "machine", "threads", "heads", "kv_heads", "head_dim", "tokens", "scheme", "attention_us",
           "update_us", "ns_per_key", "bytes_per_key")  # fmt: skip
SHAPES = ((9, 3, 64), (32, 8, 128))
"""Heads, KV heads and head_dim: of SmolLM2-135M, and of an 8B model."""
SDPA = "float32, SDPA"
LAYERS, ROUNDS = 2, 20
LIMIT = 1e-4
"""Relative error of an output: queries that are quantized may tip over in float64."""

Step = tuple[Callable[[], object], Callable[[], object]]
"""What appends a token, and what attends."""


def _static(codec: Codec | None, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Scale and zero for values of a normal distribution."""
    if codec is None or codec.dynamic or not codec.is_calibrated:
        return None
    scale = torch.full((kv_heads, 1, head_dim), 4.0 / codec.ends[1])
    return scale, None if codec.symmetric else torch.zeros_like(scale)


def _levels(codec: Codec | None) -> torch.Tensor | None:
    return torch.linspace(-1, 1, 2**codec.bits) if codec is not None and codec.levels == "calibrated" else None


def _basis(kv_heads: int, head_dim: int) -> torch.Tensor:
    """A rotation of each KV head, which costs what any basis does."""
    return torch.linalg.qr(torch.randn(kv_heads, head_dim, head_dim))[0]


def filled_layer(scheme: Scheme, shape: tuple[int, int, int], tokens: int) -> QuantizedLayer:
    """A layer that holds so many random tokens."""
    _, kv_heads, head_dim = shape
    scales = LayerScales(
        _static(scheme.key, kv_heads, head_dim),
        _static(scheme.value, kv_heads, head_dim),
        None if scheme.query is None else torch.full((1, 1, 1), 4.0 / scheme.query.ends[1]),
        _levels(scheme.key),
        _levels(scheme.value),
        key_mean=torch.randn(kv_heads, 1, head_dim) if scheme.center_key else None,
        key_basis=_basis(kv_heads, head_dim) if scheme.key_basis else None,
        value_basis=_basis(kv_heads, head_dim) if scheme.value_basis else None,
    )
    layer = QuantizedLayer(scheme, scales, None, 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim))
    layer.update(*(torch.randn(1, kv_heads, tokens, head_dim) for _ in range(2)))
    return layer


def step_of(layer: QuantizedLayer, shape: tuple[int, int, int]) -> Step:
    """A decode step of the layer; the token goes again before the next comes, so that the layer does not grow."""
    heads, kv_heads, head_dim = shape
    module = torch.nn.Module().eval()
    query, key, value = (torch.randn(1, count, 1, head_dim) for count in (heads, kv_heads, kv_heads))
    handles = [layer.update(key, value)]

    def update() -> None:
        handles[0] = layer.update(key, value)

    def attend(query: torch.Tensor = query) -> torch.Tensor:
        return quantized_attention(module, query, *handles[0], None, head_dim**-0.5)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the reference runs is what is asked for
        expected = attend(query.double())
    check_close(layer.scheme.name, attend(), expected, LIMIT)
    return update, attend


def sdpa_step(shape: tuple[int, int, int], tokens: int) -> Step:
    """The same in float32: the heads of a KV head pass for its queries, which is quicker than `enable_gqa`."""
    heads, kv_heads, head_dim = shape
    keys, values = (torch.randn(1, kv_heads, tokens, head_dim) for _ in range(2))
    query = torch.randn(1, kv_heads, heads // kv_heads, head_dim)
    return lambda: None, lambda: functional.scaled_dot_product_attention(query, keys, values)


def timed(steps: dict[str, list[tuple[QuantizedLayer | None, Step]]]) -> dict[str, tuple[float, float]]:
    """Medians of seconds, of the update and of attention."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, layers in steps.items():
            for layer, (update, attend) in layers:
                if layer is not None:
                    layer.crop(-1)
                start = time.perf_counter()
                update()
                middle = time.perf_counter()
                attend()
                times[name].append((middle - start, time.perf_counter() - middle))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in times.items()}


def measured_rows(names: list[str], tokens: int) -> Iterator[Row]:
    """A row for each shape and scheme."""
    version = commit()
    for shape in SHAPES:
        heads, kv_heads, head_dim = shape
        steps: dict[str, list[tuple[QuantizedLayer | None, Step]]] = {}
        steps[SDPA] = [(None, sdpa_step(shape, tokens)) for _ in range(LAYERS)]
        nbytes = {SDPA: 8.0 * kv_heads * head_dim}
        for name in names:
            layers = [filled_layer(load_scheme(name), shape, tokens - 2) for _ in range(LAYERS)]
            steps[name] = [(layer, step_of(layer, shape)) for layer in layers]
            used = layers[0].key_store.nbytes() + layers[0].value_store.nbytes()
            nbytes[name] = used / tokens
        for name, (update, attention) in timed(steps).items():
            row = {
                "commit": version, "torch": torch.__version__, "machine": device_name(torch.device("cpu")),
                "threads": torch.get_num_threads(), "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
                "tokens": tokens, "scheme": name, "attention_us": f"{attention * 1e6:.1f}",
                "update_us": f"{update * 1e6:.1f}", "ns_per_key": f"{attention * 1e9 / tokens:.2f}",
                "bytes_per_key": f"{nbytes[name]:.0f}",
            }  # fmt: skip
            print(", ".join(f"{part} {row[part]}" for part in COLUMNS[4:]), flush=True)
            yield {part: str(value) for part, value in row.items()}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--schemes", nargs="+", default=list(PRESETS))
    flags = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        append_rows(RESULTS / "schemes.csv", COLUMNS, measured_rows(flags.schemes, flags.tokens))


if __name__ == "__main__":
    main()
