"""Processes of torchrun on this machine, of which each loads its share of converted directories, without Octavo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORKER = """
import json, os, sys
sys.modules["octavo"] = None
rank, directory = os.environ["RANK"], sys.argv[2]
os.environ["HF_MODULES_CACHE"] = os.path.join(directory, "modules" + rank)  # not two that write one file
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)

def line(call):
    try:
        call()
    except ValueError as error:
        return str(error)

def run(source):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, tp_plan="auto").eval()
    ids = torch.load(os.path.join(directory, "ids.pt"))
    cache, name = model.new_cache(), model.base_model.octavo_cache_argument
    with torch.inference_mode():
        logits = model(ids, **{name: cache}).logits
        other = line(lambda: model(ids + int(rank)))
    tokens = model.generate(ids, max_new_tokens=16, do_sample=False)
    saved = os.path.join(directory, f"cache{rank}.safetensors")
    cache.save(saved)
    torch.distributed.barrier()
    size = int(os.environ["WORLD_SIZE"])
    far = os.path.join(directory, f"cache{(int(rank) + size // 2) % size}.safetensors")  # of other KV heads
    again = type(cache).load(saved, config=model.config)
    with torch.inference_mode():
        goes_on = [model(ids[:, -1:], **{name: one}).logits for one in (cache, again)]
    return {
        "logits": logits, "tokens": tokens, "heads": cache.layers[0].key_store._codes.shape[1],
        "model_bytes": sum(part.nbytes for part in [*model.parameters(), *model.buffers()]),
        "cache_bytes": cache.nbytes(), "config": model.config.num_key_value_heads,
        "errors": [
            other,
            line(lambda: model.save_pretrained(directory)),
            line(lambda: type(cache).load(far, config=model.config)),
        ],
        "comes_back": torch.equal(*goes_on),
    }

found = {name: run(source) for name, source in json.loads(sys.argv[1]).items()}
torch.save(found, os.path.join(directory, f"rank{rank}.pt"))
torch.distributed.destroy_process_group()
"""


def shared(sources: dict[str, Path], ids: torch.Tensor, ranks: int, directory: Path) -> list[dict[str, dict[str, Any]]]:
    """What each of several ranks finds of each directory by name: see `WORKER`.

    Args:
        ids: the prompt, int64 `[B, S]`.
        directory: an empty one, for files.
    """
    worker = directory / "worker.py"
    worker.write_text(WORKER)
    torch.save(ids, directory / "ids.pt")
    given = json.dumps({name: str(source) for name, source in sources.items()})
    # a port of this machine that is free, and no other interface
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--nnodes=1"]
    done = subprocess.run(
        [sys.executable, *launcher, "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}", str(worker), given,
         str(directory)],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(ranks)]
