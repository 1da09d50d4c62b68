"""Time one call of attention over 128 keys, of which Python is the most: this tree against another version of it.

make -C OTHER setup
(cd OTHER && .venv/bin/python -m octavo.common.convert.output.bundle --arch llama3 --out DIR)
python benchmarks/overhead.py --before DIR

The other checkout has an environment of its own, since an environment imports the checkout that is installed in it.
Both run as bundles, which live beside each other in one process, and in turns, on one thread; `ratio` is the median of
those of all rounds. Rows are appended to `results/overhead.csv`.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cases import check_close
from rows import RESULTS, append_rows

from octavo.common.architecture import load_architecture
from octavo.common.convert.output.bundle import RUNTIME, write_bundle
from octavo.machine import device_name

HEADS, GROUPS, WIDTH, KEYS, CAPACITY = 9, 3, 64, 128, 512
ROUNDS, CALLS = 100, 100
COLUMNS = ("commit", "before", "torch", "machine", "case", "microseconds", "microseconds_before", "ratio")


def load_runtime(folder: Path, name: str) -> tuple[ModuleType, str]:
    """The runtime of a bundle, and the commit that it says it is of."""
    file = folder / f"{RUNTIME}.py"
    specification = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module, file.read_text(encoding="utf-8").splitlines()[0].split(" from commit ")[1].split(";")[0]


def stored() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """K and V by case, as a cache hands out views of its storage."""

    def first(storage: torch.Tensor, tokens: int = KEYS) -> torch.Tensor:
        return storage[:, :, :tokens]

    shape = (1, GROUPS, CAPACITY, WIDTH)
    int8 = [first(torch.randint(-128, 128, shape, dtype=torch.int8)) for _ in range(2)]
    int4 = [first(torch.randint(0, 256, (*shape[:3], WIDTH // 2), dtype=torch.uint8)) for _ in range(2)]
    token = first(torch.rand(1, GROUPS, CAPACITY, 1) * 0.02)
    channel = first(torch.rand(1, GROUPS, CAPACITY // 64, WIDTH).half() * 0.3, KEYS // 64)
    spans = first(torch.rand(1, GROUPS, CAPACITY, 2).half() * 0.3)
    grouped = {"codes": int4[0], "scale": channel, "zero": channel * 3, "group": 64}
    return {
        "int8, scales per token": ({"codes": int8[0], "scale": token}, {"codes": int8[1], "scale": token}),
        "int4, K per channel and 64 tokens, V per token and 32 channels": (
            grouped,
            {"codes": int4[1], "scale": spans, "zero": spans * 2},
        ),
    }


def decode_step(runtime: ModuleType, query: torch.Tensor, sides: tuple[dict[str, Any], ...]) -> Callable[[], Any]:
    """A call as a model makes it, of one version."""
    module = torch.nn.Module().eval()
    key, value = (runtime.Codes(**side) for side in sides)
    return lambda: runtime.quantized_attention(module, query, key, value, None)[0]


def microseconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    for _ in range(CALLS):
        run()
    return (time.perf_counter() - started) / CALLS * 1e6


def main() -> int:
    """Measure, append and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, type=Path, help="directory of the bundle of the other version")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    query = torch.randn(1, 1, HEADS, WIDTH).transpose(1, 2)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_bundle(load_architecture("llama3"), Path(folder))
        (ours, commit), (before, other) = load_runtime(Path(folder), "ours"), load_runtime(flags.before, "before")
        for case, sides in stored().items():
            runs = [decode_step(runtime, query, sides) for runtime in (ours, before)]
            check_close(case, runs[0](), runs[1](), 1e-5)
            times = [tuple(microseconds(run) for run in runs) for _ in range(ROUNDS + 2)][2:]
            mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(one / another for one, another in times)
            values = (commit, other, torch.__version__, device_name(torch.device("cpu")), case)
            numbers = (f"{mine:.1f}", f"{theirs:.1f}", f"{ratio:.3f}")
            row = dict(zip(COLUMNS, (*values, *numbers), strict=True))
            append_rows(RESULTS / "overhead.csv", COLUMNS, [row])
            print(f"{case}: {mine:.1f} us, before {theirs:.1f} us, ratio {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
