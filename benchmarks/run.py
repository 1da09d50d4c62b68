"""Time ops and whole models against the best that PyTorch has for the same work; append to `results/<device>.csv`.

python benchmarks/run.py --device cpu                    everything
python benchmarks/run.py --device cuda --op attention    one op, or `model`

A case is timed only if its results equal its references' in the same run. Variants of a case are timed in turns, so
that whatever else the machine does meets all of them. `share` is what a variant has to move per second, against the
read bandwidth measured in the same run. `python benchmarks/tables.py` writes README's tables from the newest rows.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
import transformers
from cases import Case
from rows import RESULTS, Row, append_rows
from shapes import OP_CASES
from timing import Stopwatch, in_turns, read_bandwidth
from tqdm import tqdm

from models import MODEL_CASES
from octavo import ops
from octavo.common.command import aligned
from octavo.common.convert.output.bundle import commit
from octavo.machine import device_name

CASES = {kind: [*OP_CASES[kind], *MODEL_CASES[kind]] for kind in OP_CASES}
COLUMNS = (
    "commit",
    "torch",
    "transformers",
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


def measure(case: Case, device: torch.device, bandwidth: float, version: str) -> Iterator[Row]:
    """A row per variant of a case, ours first; `version` is the commit whose code is loaded.

    Raises:
        AssertionError: a result is not its reference's.
    """
    torch.manual_seed(0)
    variants, check = case.prepare(device)
    check()
    timings = in_turns({variant.what: variant.run for variant in variants}, Stopwatch(device, case.wall))
    ours = timings[variants[0].what].p50
    for variant in variants:
        timing = timings[variant.what]
        values = (
            version,
            torch.__version__,
            transformers.__version__,
            device_name(device),
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


def print_table(rows: list[Row]) -> None:
    """The columns that a reader compares, aligned."""
    print("\n".join(aligned([PRINTED, *(tuple(row[column] for column in PRINTED) for row in rows)], texts=3)))


def main() -> int:
    """Measure, append and print; exit code 1 if a check failed, of which the other cases are timed all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    parser.add_argument("--op", choices=sorted({case.op for cases in CASES.values() for case in cases}))
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    device = torch.device(flags.device)
    print(ops.report())
    rows: list[Row] = []
    failed: list[str] = []
    version = commit()  # before the results make the tree dirty
    with torch.inference_mode():
        bandwidth = read_bandwidth(device)
        for case in tqdm([case for case in CASES[flags.device] if flags.op in (None, case.op)], unit="case"):
            try:
                measured = list(measure(case, device, bandwidth, version))
            except Exception as error:
                failed.append(f"{case.op}, {case.name}: {type(error).__name__}: {error}")
                continue
            append_rows(RESULTS / f"{flags.device}.csv", COLUMNS, measured)
            rows += measured
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"reads {bandwidth / 1e9:.1f} GB/s"
    )
    print_table(rows)
    for line in failed:
        print(f"not timed: {line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
