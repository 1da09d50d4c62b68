"""LMDeploy's kernels of quant_policy 42 in Triton's interpreter: what they store of k and v, and decode.

    python run_lmdeploy_turboquant.py PACKAGE FOLDER

PACKAGE is where the wheel was unpacked; FOLDER has `key.pt` and `value.pt`, `[G, S, D]`, and gets `decoded.pt`: K and V
as they are stored, rotated, float32 `[G, S, D]`.
"""

import enum
import json
import sys

import torch
from stand_ins import stand_in

KERNELS = "lmdeploy.pytorch.kernels.cuda."
REAL = {KERNELS + name for name in ("fill_kv_cache", "flatten_kv_cache", "turbo_quant")}


class QuantPolicy(enum.IntEnum):
    """Those that the kernels are asked for, as lmdeploy/messages.py numbers them."""

    NONE, INT4, INT8, FP8, FP8_E5M2, TURBO_QUANT = 0, 4, 8, 16, 17, 42


def main(package: str, folder: str) -> None:
    """See the module."""
    stand_in(package, ("lmdeploy",), lambda name: name in REAL, {"QuantPolicy": QuantPolicy})
    from lmdeploy.pytorch.kernels.cuda.fill_kv_cache import fill_kv_cache
    from lmdeploy.pytorch.kernels.cuda.flatten_kv_cache import flatten_kv_cache

    key, value = (torch.load(f"{folder}/{part}.pt").transpose(0, 1).contiguous() for part in ("key", "value"))
    tokens, heads, width = key.shape
    caches = [torch.zeros((1, tokens, heads, width // share), dtype=torch.uint8) for share in (2, 4)]
    norms = [torch.zeros((1, tokens, heads, count), dtype=torch.float16) for count in (2, 1)]
    lengths, blocks = torch.tensor([tokens], dtype=torch.int32), torch.zeros((1, 1), dtype=torch.int32)
    start = torch.zeros(1, dtype=torch.int32)
    policy = QuantPolicy.TURBO_QUANT
    fill_kv_cache(key, value, *caches, start, lengths, lengths, tokens, blocks, *norms, quant_policy=policy)
    decoded = flatten_kv_cache(
        *caches, lengths, blocks, start, tokens, torch.float32, *norms, quant_policy=policy, flatten_kv_layout="hsd"
    )
    torch.save(list(decoded), f"{folder}/decoded.pt")
    print("\n" + json.dumps({"bytes": sum(part[0, 0, 0].nbytes for part in (*caches, *norms))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
