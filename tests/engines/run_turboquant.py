"""Runs in vLLM's environment, in Triton's interpreter: what its TurboQuant kernels store of k and v, and decode."""

import json
import math
import sys
import types

import torch


def _with_triton() -> None:
    """Let vLLM for CPUs, which leaves Triton alone, take it."""
    import triton
    import triton.language
    import vllm  # noqa: F401

    module = types.ModuleType("vllm.triton_utils")
    module.triton, module.tl, module.HAS_TRITON = triton, triton.language, True
    module.__getattr__ = lambda name: None
    sys.modules[module.__name__] = module


def through_vllm(dtype: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """K as it is stored, rotated unless in fp8, and V of `[G, S, D]`, float16 `[1, G, S, D]`; bytes of a slot."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
    from vllm.v1.attention.ops.triton_turboquant_decode import _tq_full_dequant_kv
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    heads, tokens, width = key.shape
    config = TurboQuantConfig.from_cache_dtype(dtype, width)
    levels = get_centroids(width, config.centroid_bits)
    cache = torch.zeros((1, tokens, heads, config.slot_size_aligned), dtype=torch.uint8)
    triton_turboquant_store(
        key.transpose(0, 1).contiguous(),
        value.transpose(0, 1).contiguous(),
        cache,
        torch.arange(tokens, dtype=torch.int32),
        _build_hadamard(width, "cpu"),
        (levels[1:] + levels[:-1]) / 2,
        config.mse_bits,
        config.key_packed_size,
        config.value_quant_bits,
        config.key_fp8,
    )
    found = [torch.empty((1, heads, tokens, width), dtype=torch.float16) for _ in range(2)]
    table = torch.zeros((1, 1), dtype=torch.int32)
    strides = [stride for part in found for stride in part.stride()[:3]]
    _tq_full_dequant_kv[(tokens, heads)](
        cache, table, levels, *found, *strides, *cache.stride()[:3], table.stride(0),
        HEAD_DIM=width, BLOCK_SIZE=tokens, NUM_KV_HEADS=heads, MSE_BYTES=math.ceil(width * config.key_mse_bits / 8),
        KPS=config.key_packed_size, VQB=config.value_quant_bits,
        VAL_DATA_BYTES=math.ceil(width * config.value_quant_bits / 8), MSE_BITS=config.mse_bits,
        KEY_FP8=int(config.key_fp8), BLOCK_D=width, NORM_CORRECTION=int(config.norm_correction),
    )  # fmt: skip
    return *found, config.slot_size


def skipped_layers(count: int) -> list[int]:
    """Layers of a dense model that it leaves in float."""
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    text = types.SimpleNamespace(num_hidden_layers=count)
    model = types.SimpleNamespace(is_hybrid=False, hf_text_config=text)
    return [int(index) for index in TurboQuantConfig.get_boundary_skip_layers(model)]


def main(folder: str, layers: str, *dtypes: str) -> None:
    """Of `key.pt` and `value.pt` of a folder: `DTYPE.pt` for each of vLLM's names, and sizes on stdout, as JSON."""
    _with_triton()
    key, value = (torch.load(f"{folder}/{part}.pt") for part in ("key", "value"))
    sizes = {}
    for dtype in dtypes:
        *parts, sizes[dtype] = through_vllm(dtype, key, value)
        torch.save(parts, f"{folder}/{dtype}.pt")
    print("\n" + json.dumps({"bytes": sizes, "float_layers": skipped_layers(int(layers))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
