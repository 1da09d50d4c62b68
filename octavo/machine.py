"""The machine that something is measured on."""

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Name of the processor, as the system gives it."""
    if device.type != "cpu":
        return getattr(torch, device.type).get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def finish(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
