"""The GPU's rows: attention, linears and whole models; what `gpu.sh` runs behind the tests.

python benchmarks/gpu.py --seconds 300                             everything that has no row of this code yet
python benchmarks/gpu.py --only "int8, scales per token" 8B        what these are parts of names of, and anew

Every step runs in a process of its own, since an error of a kernel ends all that its process could do, and has so many
seconds, since one may hang. Rows are appended to `DIR/gpu.csv` as they come, those of failures with the reason in
`error`; what has a row of the same code on the same machine, there or in benchmarks/results, is not measured again.
`--device cpu` goes the same way with shapes that take no time: what it measures is of no use.
"""

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from gpu_cases import DECODE, LINEARS, PREFILL, GpuCase, Measured, attention_case
from gpu_models import LARGE, SMALL, TINY, model_case
from rows import RESULTS, Row, append_rows, read_rows
from timing import Stopwatch, copy_bandwidth, in_turns, read_bandwidth

from octavo.common.convert.output.bundle import code_digest, commit
from octavo.common.errors import first_line
from octavo.machine import device_name

COLUMNS = (
    "commit", "code", "torch", "transformers", "machine", "op", "case", "what", "p50_ms", "p20_ms", "p80_ms",
    "megabytes", "gigabytes_per_s", "read_gigabytes_per_s", "copy_gigabytes_per_s", "share", "error",
)  # fmt: skip
SECONDS_PER_VARIANT = {"cuda": 1.0, "cpu": 0.01}
CUDA_IS_LOST = 9
"""Exit code of a process whose device takes no more work."""
LEAST_SECONDS = 15
"""What is not worth starting a process for."""


class Step(NamedTuple):
    """Cases that share a process, and its seconds."""

    cases: list[GpuCase]
    seconds: float


STEPS = {
    "cuda": {
        "decode": Step(DECODE, 75),
        "Llama 1B": Step(SMALL, 110),
        "prefill": Step(PREFILL, 50),
        "linears": Step(LINEARS, 40),
        "Llama 8B": Step(LARGE, 110),
    },
    "cpu": {
        "decode": Step([attention_case("decode, tiny", 2, 1, 100, 4, 2, 32)], 60),
        "prefill": Step([attention_case("prefill, tiny", 1, 40, 40, 4, 2, 32)], 60),
        "Llama tiny": Step([model_case("Llama tiny", TINY, 16, 1)], 90),
    },
}
"""By kind of device; the most wanted first."""


def name_of(case: GpuCase, what: str) -> str:
    """What `--only` looks in."""
    return f"{case.op}, {case.name}, {what}"


class Bench:
    """What the rows of a process have in common, and where they go."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags, self.device = flags, torch.device(flags.device)
        self.file, self.running = flags.results / "gpu.csv", flags.results / "gpu.running"
        self.common = {
            "commit": os.environ.get("OCTAVO_COMMIT") or commit(),
            "code": code_digest()[:12],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": device_name(self.device),
        }
        self.read_rate = self.copy_rate = float("nan")

    def has_row(self, case: GpuCase, what: str) -> bool:
        """Whether this code has been measured on this machine."""
        wanted = {"code": self.common["code"], "machine": self.common["machine"], "case": case.name, "what": what}
        rows = [row for file in {self.file, RESULTS / "gpu.csv"} for row in read_rows(file)]
        return any(all(row[name] == value for name, value in wanted.items()) for row in rows)

    def is_wanted(self, case: GpuCase, what: str) -> bool:
        """Whether a variant is to be measured."""
        if self.flags.only:
            return any(part in name_of(case, what) for part in self.flags.only)
        return not self.has_row(case, what)

    def append(self, op: str, case: str, what: str, **values: str) -> None:
        """Keep a row."""
        row: Row = {**dict.fromkeys(COLUMNS, ""), **self.common, "op": op, "case": case, "what": what, **values}
        append_rows(self.file, COLUMNS, [row])
        print(f"{op}, {case}, {what}: {values.get('p50_ms') or values['error']}", flush=True)

    def measure(self, case: GpuCase, measured: Measured) -> None:
        """Append the row of a variant.

        Raises:
            Exception: whatever it raises.
        """
        run, nbytes = measured.make()
        seconds = SECONDS_PER_VARIANT[self.device.type]
        timing = in_turns({"": run}, Stopwatch(self.device, case.wall), seconds)[""]
        rate = nbytes / timing.p50
        times = {f"{name}_ms": f"{getattr(timing, name) * 1e3:.4f}" for name in ("p50", "p20", "p80")}
        self.append(
            case.op, case.name, measured.what, **times,
            megabytes=f"{nbytes / 1e6:.2f}",
            gigabytes_per_s=f"{rate / 1e9:.1f}",
            read_gigabytes_per_s=f"{self.read_rate / 1e9:.1f}",
            copy_gigabytes_per_s=f"{self.copy_rate / 1e9:.1f}",
            share=f"{rate / self.read_rate:.3f}",
        )  # fmt: skip

    def try_variant(self, case: GpuCase, measured: Measured) -> None:
        """Append the row of a variant, or that of its failure; the process ends where the device is lost."""
        self.running.write_text("\n".join((case.op, case.name, measured.what)), encoding="utf-8")
        began = time.perf_counter()
        try:
            self.measure(case, measured)
        except Exception as error:
            traceback.print_exc()
            self.append(case.op, case.name, measured.what, error=f"{type(error).__name__}: {first_line(error)}"[:300])
        self.running.unlink()
        print(f"    {time.perf_counter() - began:.1f} s", flush=True)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                sys.stdout.flush()
                os._exit(CUDA_IS_LOST)  # what would run at an ordinary exit aborts

    def work(self, cases: list[GpuCase]) -> None:
        """Measure what is wanted of some cases."""
        torch.manual_seed(0)
        self.read_rate, self.copy_rate = read_bandwidth(self.device), copy_bandwidth(self.device)
        print(f"reads {self.read_rate / 1e9:.0f} GB/s, copies {self.copy_rate / 1e9:.0f} GB/s", flush=True)
        for case in cases:
            with torch.no_grad():
                for measured in case.variants(self.device):
                    if self.is_wanted(case, measured.what):
                        self.try_variant(case, measured)

    def note_cut(self, reason: str) -> None:
        """Append the row of what was running when its process was ended, so that the next begins behind it."""
        if self.running.exists():
            op, case, what = self.running.read_text(encoding="utf-8").split("\n")
            self.append(op, case, what, error=reason)
            self.running.unlink()


def run_step(bench: Bench, name: str, seconds: float) -> None:
    """Run a step in processes of its own, as many as errors of the device ask for, within its seconds."""
    end = time.monotonic() + seconds
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    while (left := end - time.monotonic()) > (LEAST_SECONDS if bench.device.type == "cuda" else 1):
        try:
            code = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            bench.note_cut(f"it did not end within the {seconds:.0f} s of its step")
            return
        if code == 0:
            return
        if not bench.running.exists() and code != CUDA_IS_LOST:
            print(f"{name}: ended with {code}", flush=True)
            return
        bench.note_cut(f"its process ended with {code}")


def wanted_names(bench: Bench, step: Step) -> Iterator[str]:
    """What is to be measured of a step, without making anything."""
    for case in step.cases:
        if case.op == "linear":  # whose variants are known when they are made
            yield case.name
        else:
            yield from (found.what for found in case.variants(bench.device) if bench.is_wanted(case, found.what))


def main() -> int:
    """Measure what is wanted, in the order of `STEPS`, until time is up; exit code 1 if time was too short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(STEPS), default="cuda")
    parser.add_argument("--seconds", type=float, default=300, help="for all of it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of gpu.csv")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts of names, to be measured anew")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    bench, steps = Bench(flags), STEPS[flags.device]
    if flags.worker:
        bench.work(steps[flags.worker].cases)
        return 0
    flags.results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + flags.seconds
    for name, step in steps.items():
        if not any(wanted_names(bench, step)):
            continue
        left = min(step.seconds, end - time.monotonic())
        if left < LEAST_SECONDS:
            print(f"no time is left for {name} and what comes behind it: run this again", flush=True)
            return 1
        run_step(bench, name, left)
    return 0


if __name__ == "__main__":
    sys.exit(main())
