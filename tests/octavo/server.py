"""`octavo serve` in a process of its own, at a free port of this machine."""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS = 120


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


@contextmanager
def serving(
    octavo: Sequence[str | Path], *words: str | Path, cwd: Path | None = None
) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that is up, and the lines that it says, more of them as they come.

    Args:
        octavo: how the command is run.
        words: what stands behind `serve`.
    """
    port, lines, is_up = free_port(), [], threading.Event()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    child = subprocess.Popen(
        [*octavo, "serve", *words, "--host", "127.0.0.1", "--port", str(port)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=cwd, env=environment,
    )  # fmt: skip

    def listen() -> None:
        for line in child.stderr:
            lines.append(line)
            if "Uvicorn running on" in line:
                is_up.set()
        is_up.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert is_up.wait(SECONDS) and child.poll() is None, "".join(lines)
        yield f"http://127.0.0.1:{port}/v1", lines
    finally:
        child.terminate()
        child.wait(SECONDS)
