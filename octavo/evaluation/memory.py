"""The most memory that a part of a run takes: on an accelerator what is allocated there, else what is resident."""

from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """From when it is made until it is asked."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_known = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _RESET.write_text("5")  # the kernel forgets the peak
        except OSError:
            self._is_known = False

    def nbytes(self) -> int | None:
        """Bytes, with the weights and all else that the process holds; None where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._is_known or self._device.type != "cpu":
            return None
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
