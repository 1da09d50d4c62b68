"""How the benchmarks time: variants of one case in turns, on the device's own clock, beside its measured bandwidth."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SECONDS_PER_CASE = 6.0
ROUNDS = (5, 200)
"""The fewest and the most times that each variant of a case is timed."""
FLUSHED_BYTES = 1 << 28
QUEUED_CYCLES = 2_000_000
"""GPU cycles of waiting put in front of a timed kernel, in which the host gets ahead of the device."""


@dataclass(frozen=True)
class Timing:
    """Quantiles of the times of one variant, in seconds."""

    p20: float
    p50: float
    p80: float


class Stopwatch:
    """Seconds that a call takes on a device.

    On a GPU that is the time between two events, with the L2 cache flushed before and the calls queued behind a wait,
    so that no launch is counted. With `wall` it is the time that somebody waits, launches and synchronization included.
    """

    def __init__(self, device: torch.device, wall: bool) -> None:
        self.on_gpu = device.type == "cuda"
        self.wall = wall or not self.on_gpu
        self._flushed = None if self.wall else torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Time one call."""
        if self.wall:
            self._finish()
            started = time.perf_counter()
            run()
            self._finish()
            return time.perf_counter() - started
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        torch.cuda._sleep(QUEUED_CYCLES)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    def _finish(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def in_turns(
    runs: dict[str, Callable[[], object]], watch: Stopwatch, seconds: float = SECONDS_PER_CASE
) -> dict[str, Timing]:
    """Time each callable, one after the other, round after round for about so long, after two rounds of warming up."""
    for run in runs.values():
        run()
    started = time.perf_counter()
    for run in runs.values():
        watch.seconds(run)
    rounds = min(max(int(seconds / (time.perf_counter() - started)), ROUNDS[0]), ROUNDS[1])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(watch.seconds(run))
    quantiles = {name: statistics.quantiles(values, n=10) for name, values in times.items()}
    return {name: Timing(tenths[1], tenths[4], tenths[7]) for name, tenths in quantiles.items()}


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a device reads from its memory: the best of ten sums over 256 MB, or 4 GB on a GPU."""
    block = torch.ones((1 << 30) if device.type == "cuda" else (1 << 26), device=device)
    watch = Stopwatch(device, wall=False)
    return block.nbytes / min(watch.seconds(block.sum) for _ in range(10))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a device reads and writes in a copy: the best of ten of 256 MB, or 4 GB on a GPU."""
    block = torch.ones((1 << 30) if device.type == "cuda" else (1 << 26), device=device)
    copy, watch = torch.empty_like(block), Stopwatch(device, wall=False)
    return 2 * block.nbytes / min(watch.seconds(lambda: copy.copy_(block)) for _ in range(10))
