"""What the worker of every engine does: answer requests, one JSON object a line, until it is told to quit.

    {"do": "load", "directory": D, "tokens": N, "batch": B, "threads": T, ...}   a model, for B sequences of N tokens
    {"do": "measure", "prompts": [[ids]], "new": N}    seconds: {"first": s or null, "steps": [s]} of N steps behind it
    {"do": "logits", "ids": [ids], "prompt": P, "chunk": C, "into": FILE}    behind a prompt, .npy [S - P, vocabulary]
    {"do": "prepare", "source": D, "into": D, ...}     write the engine's own form of a checkpoint
    {"do": "quit"}

Each is answered by {"result": ..., "peak": BYTES} or {"error": LINE}. What an engine prints goes to stderr. This runs
in the environments of the engines, so that it imports nothing but Python's own.
"""

import json
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

OPERATIONS = ("load", "measure", "logits", "prepare")
QUIT = "quit"
STATUS = Path("/proc/self/status")


def peak_bytes() -> int | None:
    """The most bytes that were resident in this process; None where the system does not tell."""
    if not STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def chunks(ids: list[int], prompt: int, chunk: int) -> Iterator[list[int]]:
    """The prompt, and then what follows it in chunks."""
    yield ids[:prompt]
    for start in range(prompt, len(ids), chunk):
        yield ids[start : start + chunk]


def steps(times: list[float]) -> list[float]:
    """Seconds between readings of the clock."""
    return [after - before for before, after in pairwise(times)]


def _answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    do = request.pop("do")
    try:
        if do not in OPERATIONS:
            raise ValueError(f"no such request: {do}")
        return {"result": getattr(engine, do)(**request), "peak": peak_bytes()}
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


def serve(engine: Any) -> None:
    """Answer the requests on stdin."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == QUIT:
            break
        print(json.dumps(_answer(engine, request)), file=replies, flush=True)
    os._exit(0)  # engines that tear down threads of their own may hang
