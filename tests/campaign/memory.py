"""Resident memory and processor time of processes, out of /proc; elsewhere both count as 0, and nothing is limited."""

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _megabytes_of(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def peak_megabytes() -> float:
    """The most that was resident in this process since the last `reset_peak`."""
    return _megabytes_of("VmHWM")


def reset_peak() -> float:
    """Let the peak start anew; returns what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_megabytes()
    return _megabytes_of("VmRSS")


def resident_megabytes(process: int) -> float:
    """What is resident in a process now."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor_seconds(process: int) -> float:
    """Processor time that a process has used."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS
