"""One case of `memory.py`, in a process of its own: from its start to the first token, or through a long prompt.

Nothing heavy is imported before its import is timed. What was found is printed as one line of JSON.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

MEGA = 1e6
SHORT_PROMPT = "The capital of France is"


def seconds_alive() -> float:
    """Since this process was started, to a hundredth."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def resident() -> dict[str, float]:
    """MB of this process in memory: the most there ever were, and now, anonymous and of mapped files."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {name: int(value.split()[0]) for name, _, value in lines if value.endswith(" kB")}
    parts = {"peak": "VmHWM", "now": "VmRSS", "anonymous": "RssAnon", "file": "RssFile"}
    return {name: kilobytes[field] * 1024 / MEGA for name, field in parts.items()}


class Watch:
    """Seconds by step of what happens between the start of the process and the first token."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"python": seconds_alive()}

    def lap(self, name: str) -> None:
        """What happened since the last lap was this."""
        self.seconds[name] = seconds_alive() - sum(self.seconds.values())


def load(flags: argparse.Namespace) -> tuple[Any, Any]:
    """The model, and what makes an empty cache for it."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    if flags.converted:
        model = AutoModelForCausalLM.from_pretrained(flags.model_path, trust_remote_code=True).eval()
        return model, model.new_cache
    model = AutoModelForCausalLM.from_pretrained(flags.model_path, dtype=getattr(torch, flags.dtype)).eval()
    if not flags.scheme:
        return model, lambda: DynamicCache(config=model.config)
    from octavo import QuantizedCache, prepare

    return prepare(model), lambda: QuantizedCache(model.config, flags.scheme)


def cache_bytes(cache: Any) -> int:
    """Bytes allocated for keys and values."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def generated(model: Any, ids: Any, cache: Any, tokens: int) -> Any:
    """As a user generates, but for the end of a text, which does not end it."""
    import inspect

    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model.generate(ids, **{name: cache}, max_new_tokens=tokens, do_sample=False, eos_token_id=None)


def first_token(flags: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """Load tokenizer and model, and generate the first token of a short prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(flags.model_path)
    watch.lap("tokenizer")
    model, new_cache = load(flags)
    watch.lap("load")
    generated(model, tokenizer(SHORT_PROMPT, return_tensors="pt")["input_ids"], new_cache(), 1)
    watch.lap("first pass")
    return {"seconds": watch.seconds}


def long_prompt(flags: argparse.Namespace) -> dict[str, Any]:
    """Load a model, and generate behind a long prompt, whose ids are given: no tokenizer is counted in."""
    import torch

    ids = torch.tensor([json.loads(flags.ids.read_text(encoding="utf-8"))])
    model, new_cache = load(flags)
    loaded, cache = resident(), new_cache()
    generated(model, ids, cache, flags.new)
    return {"loaded": loaded, "end": resident(), "cache": cache_bytes(cache) / MEGA, "threads": torch.get_num_threads()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--converted", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scheme", default="")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--ids", type=Path, help="of a long prompt, as JSON; without it, a short one is timed")
    parser.add_argument("--new", type=int, default=0)
    flags = parser.parse_args()
    watch = Watch()
    import torch

    torch.set_num_threads(flags.threads)
    watch.lap("torch")
    of_torch = resident()["now"]
    from transformers import AutoModelForCausalLM  # noqa: F401, which transformers imports when it is asked for

    watch.lap("transformers")
    warnings.simplefilter("ignore")
    found = long_prompt(flags) if flags.ids else first_token(flags, watch)
    print(json.dumps({"of_torch": of_torch, **found}))


if __name__ == "__main__":
    main()
