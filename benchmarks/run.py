"""Time each op against the best that PyTorch has for the same work; print a table, append to `results/<device>.csv`.

python benchmarks/run.py --device cpu                    all ops
python benchmarks/run.py --device cpu --op attention     one

An op is timed only if its result equals its reference's in the same run. Variants of a case are timed in turns, so that
whatever else the machine does meets all of them. `share` is what a variant reads and writes per second, against the
read bandwidth measured in the same run.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from shapes import CASES, Case, cpu_model
from tqdm import tqdm

from octavo import ops
from octavo.common.bundle import commit

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "commit",
    "torch",
    "machine",
    "threads",
    "op",
    "case",
    "what",
    "p50_ms",
    "p20_ms",
    "p80_ms",
    "megabytes",
    "gigabytes_per_s",
    "read_gigabytes_per_s",
    "share",
    "times_ours",
)
PRINTED = ("op", "case", "what", "p50_ms", "p20_ms", "p80_ms", "gigabytes_per_s", "share", "times_ours")
SECONDS_PER_CASE = 6.0
ROUNDS = (7, 200)
"""The fewest and the most times that each variant of a case is timed."""


@dataclass
class Timing:
    """Quantiles of the times of one variant, in seconds."""

    p20: float
    p50: float
    p80: float


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turns(runs: dict[str, Callable[[], object]]) -> dict[str, Timing]:
    """Time each callable, one after the other, round after round, after two rounds of warming up."""
    for run in runs.values():
        run()
    once = sum(_seconds(run) for run in runs.values())
    rounds = min(max(int(SECONDS_PER_CASE / once), ROUNDS[0]), ROUNDS[1])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run))
    quantiles = {name: statistics.quantiles(values, n=10) for name, values in times.items()}
    return {name: Timing(tenths[1], tenths[4], tenths[7]) for name, tenths in quantiles.items()}


def read_bandwidth() -> float:
    """Bytes per second that the threads read from memory: the best of ten sums over 256 MB."""
    block = torch.ones(1 << 26)
    return block.nbytes / min(_seconds(block.sum) for _ in range(10))


def measure(case: Case, bandwidth: float) -> Iterator[dict[str, str]]:
    """A row per variant of a case, ours first."""
    variants, check = case.prepare()
    check()
    timings = in_turns({variant.what: variant.run for variant in variants})
    ours = timings[variants[0].what].p50
    for variant in variants:
        timing = timings[variant.what]
        values = (
            commit(),
            torch.__version__,
            cpu_model(),
            torch.get_num_threads(),
            case.op,
            case.name,
            variant.what,
            f"{timing.p50 * 1e3:.3f}",
            f"{timing.p20 * 1e3:.3f}",
            f"{timing.p80 * 1e3:.3f}",
            f"{variant.nbytes / 1e6:.2f}",
            f"{variant.nbytes / timing.p50 / 1e9:.1f}",
            f"{bandwidth / 1e9:.1f}",
            f"{variant.nbytes / timing.p50 / bandwidth:.2f}",
            f"{timing.p50 / ours:.2f}",
        )
        yield dict(zip(COLUMNS, map(str, values), strict=True))


def print_table(rows: list[dict[str, str]]) -> None:
    """The columns that a reader compares, aligned."""
    lines = [PRINTED, *(tuple(row[column] for column in PRINTED) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(PRINTED))]
    for line in lines:
        cells = (
            text.ljust(width) if index < 3 else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def main() -> int:
    """Measure, append and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--op", choices=sorted({case.op for case in CASES}), help="only this op")
    flags = parser.parse_args()
    print(ops.report())
    file = RESULTS / f"{flags.device}.csv"
    file.parent.mkdir(exist_ok=True)
    is_new = not file.exists()
    rows: list[dict[str, str]] = []
    with file.open("a", newline="", encoding="utf-8") as stream, torch.inference_mode():
        writer = csv.DictWriter(stream, COLUMNS)
        if is_new:
            writer.writeheader()
        bandwidth = read_bandwidth()
        chosen = [case for case in CASES if flags.op in (None, case.op)]
        for case in tqdm(chosen, unit="case"):
            torch.manual_seed(0)
            for row in measure(case, bandwidth):
                writer.writerow(row)
                rows.append(row)
    print(
        f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, reads {bandwidth / 1e9:.1f} GB/s"
    )
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
