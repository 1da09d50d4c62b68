"""Loads of converted directories by transformers, in a process that cannot import Octavo."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..support import random_ids, run_python

LOAD = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
result = {}
for name, source, expected in json.loads(sys.argv[2]):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    with torch.inference_mode():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    from safetensors.torch import load_file
    wanted = load_file(expected)
    result[name] = [
        torch.equal(logits, wanted["logits"]),
        torch.equal(tokens, wanted["tokens"]),
        type(model).__module__.startswith("transformers_modules."),
        str(model.dtype),
    ]
print(json.dumps(result))
"""


def environment(cache: Path) -> dict[str, str]:
    """Of a process that is offline and keeps its modules and snapshots in `cache`."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "OMP_NUM_THREADS": "1",
    }


def save_expected(model: torch.nn.Module, file: Path) -> None:
    """Keep what a load of the same directory has to compute: logits, and tokens that are generated."""
    ids = random_ids(2, 33)
    with torch.inference_mode():
        logits = model.eval()(ids).logits
    save_file({"logits": logits, "tokens": model.generate(ids, max_new_tokens=8, do_sample=False)}, file)


def load_without_octavo(rows: list[tuple[str, str, str]], cache: Path) -> dict[str, list[Any]]:
    """Load each (name, source, file of what is expected) in a process that cannot import Octavo."""
    return run_python(LOAD, json.dumps(random_ids(2, 33).tolist()), json.dumps(rows), environment=environment(cache))
