"""A worker without an engine, which speaks the protocol of `benchmarks/engines/worker.py`."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "engines"))
from worker import chunks, serve, steps

VOCABULARY = 11


class FakeEngine:
    """Takes a millisecond a step, and two a prompt; `how` makes it fail."""

    def prepare(self, source: str, into: str, how: str) -> None:
        """A file that says how."""
        if how == "refuses":
            raise ValueError("cannot be prepared\nfor a reason")
        Path(into).mkdir()
        Path(into, "how").write_text(how, encoding="utf-8")

    def load(self, directory: str, tokens: int, batch: int, threads: int) -> str:
        """Read that file."""
        print("words that are no part of the protocol")
        self.how = Path(directory, "how").read_text(encoding="utf-8")
        return "fake 1.0"

    def measure(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Sleep."""
        if self.how == "dies":
            os._exit(3)
        if self.how == "hangs":
            time.sleep(60)
        times = [0.001 * step for step in range(new + 1)]
        return {"first": 0.001 * len(prompts[0]), "steps": steps(times)}

    def logits(self, ids: list[int], prompt: int, chunk: int, into: str) -> None:
        """Logits that depend on the tokens alone, or are flat."""
        behind = [token for piece in list(chunks(ids, prompt, chunk))[1:] for token in piece]
        table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
        np.save(into, table[behind] * (0 if self.how == "flat" else 1))


if __name__ == "__main__":
    serve(FakeEngine())
