"""The worker of transformers and of Octavo."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer
from worker import chunks, serve, steps

from octavo import QuantizedCache, prepare
from octavo.common.architecture import load_architecture
from octavo.common.runtime.compatibility import cache_argument


class Clock(BaseStreamer):
    """Reads the clock at each token of `generate`, the prompt left out."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """See a token of each sequence."""
        self.calls.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back."""

    @property
    def times(self) -> list[float]:
        """The clock at each new token."""
        return self.calls[1:]


class TorchEngine:
    """A float model (neither argument), one with a cache of ours in two lines (`scheme`), or a directory of ours."""

    def load(
        self, directory: str, tokens: int, batch: int, threads: int, architecture: str = "", scheme: str = ""
    ) -> str:
        """Load, and say with what."""
        torch.set_num_threads(threads)
        if architecture:
            self.model = load_architecture(architecture).model_class.from_pretrained(directory).eval()
            self.new_cache = self.model.new_cache
        else:
            self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            self.new_cache = lambda: DynamicCache(config=self.model.config)
        if scheme:
            prepare(self.model)
            self.new_cache = lambda: QuantizedCache(self.model.config, scheme)
        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def measure(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Time `generate`, greedy."""
        ids, clock = torch.tensor(prompts), Clock()
        began = time.perf_counter()
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{cache_argument(self.model): self.new_cache()},
            max_new_tokens=new + 1,
            do_sample=False,
            eos_token_id=None,
            streamer=clock,
        )
        return {"first": clock.times[0] - began, "steps": steps(clock.times)}

    def _logits(self, ids: list[int], prompt: int, chunk: int) -> Iterator[np.ndarray]:
        cache = self.new_cache()
        for number, piece in enumerate(chunks(ids, prompt, chunk)):
            keep = {} if number else {"logits_to_keep": 1}
            output = self.model(torch.tensor([piece]), **{cache_argument(self.model): cache}, **keep)
            if number:
                yield output.logits[0].float().numpy()

    @torch.inference_mode()
    def logits(self, ids: list[int], prompt: int, chunk: int, into: str) -> None:
        """Write the logits behind a prompt."""
        np.save(into, np.concatenate(list(self._logits(ids, prompt, chunk))))


if __name__ == "__main__":
    serve(TorchEngine())
