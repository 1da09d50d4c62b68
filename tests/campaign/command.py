"""Runs a campaign: prepares what is damaged, has workers make the tries, and prints what came of them."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .kinds import KINDS
from .outcomes import BAD, GOOD, Result
from .pool import Worker, run_all
from .report import extremes, failure_line, table
from .sanitized import Apart
from .trial import Room, drawn, run_try


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other tries (default 0)")
    parser.add_argument(
        "--only", type=int, nargs="+", metavar="N", help="the tries of these numbers, and what they say"
    )
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), help="of these alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--show", nargs="+", choices=GOOD, default=(), help="print tries of these good ends too")
    return parser.parse_args(argv)


def _quiet_libraries() -> None:
    """One thread per process, no bars, no network: read by the libraries when they are imported."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _prepare(folder: Path) -> Path:
    """Import what tries need and make what they damage; returns its folder."""
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    import torch
    from transformers.utils import logging

    from .bases import build

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bases = folder / "bases"
    bases.mkdir()
    build(bases)
    return bases


def _tries(numbers: Sequence[int], flags: argparse.Namespace, folder: Path) -> Iterator[Result]:
    """Make the tries of numbers that no sanitizer is for."""
    if not numbers:
        return
    bases = _prepare(folder)

    def work(number: int, scratch: Path, say: Callable[[str], None]) -> Result:
        return run_try(number, flags.seed, Room(bases, scratch), say)

    yield from run_all(numbers, work, folder, flags.workers, lambda number: drawn(number, flags.seed)[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if there is a failure."""
    flags = _arguments(argv)
    _quiet_libraries()
    kinds = {number: drawn(number, flags.seed)[0] for number in flags.only or range(flags.tries)}
    numbers = [number for number, kind in kinds.items() if kind in flags.kinds]
    apart = [number for number in numbers if KINDS[kinds[number]].sanitized]
    others = [number for number in numbers if not KINDS[kinds[number]].sanitized]
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="octavo-campaign-") as name,
        tqdm(total=len(numbers), unit="try", disable=None) as bar,
    ):
        folder = Path(name)
        sanitized = Apart(apart, flags.seed, folder)
        for result in _and_then(_tries(others, flags, folder), sanitized.results()):
            results.append(result)
            bar.update()
            if result.end in (*BAD, *flags.show):
                bar.write(failure_line(result, flags.seed), file=sys.stderr)
        if flags.only:
            _show(results, folder)
    if sanitized.reason:
        print(f"ops sanitized: {len(apart)} tries left out: {sanitized.reason}")
    print(table(results))
    print(extremes(results))
    return int(any(not result.is_good for result in results))


def _and_then(*parts: Iterator[Result]) -> Iterator[Result]:
    for part in parts:
        yield from part


def _show(results: Sequence[Result], folder: Path) -> None:
    """All that tries said: their ends, and what their workers wrote on stderr."""
    for result in results:
        print(f"try {result.number}: {result.kind}: {result.what}\n{result.end}: {result.detail}")
    for log in sorted(folder.glob(f"**/{Worker.LOG}")):
        print(log.read_text(errors="replace"), end="")
