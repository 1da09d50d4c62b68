"""SGLang's own configs, schemes and loaders of weights, run on a directory in a process of their own.

    python sglang_reader.py PACKAGE DIRECTORY METHOD OUT

PACKAGE is where the wheel was unpacked. Importing SGLang whole needs CUDA and its kernels, so that of it the config of
quantization METHOD, the schemes, the linears, `RadixAttention` and `LlamaForCausalLM` with `load_weights` are imported
as they are; stand-ins take the place of the rest: classes that do nothing, and one rank of one. OUT gets every
parameter that was loaded, by SGLang's names.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from stand_ins import stand_in
from torch import nn

LAYERS = "sglang.srt.layers."
QUANTIZATION = LAYERS + "quantization."
REAL = {
    "sglang.srt.models.llama",
    "sglang.srt.model_loader.weight_utils",
    *(LAYERS + name for name in ("linear", "parameter", "radix_attention", "modelopt_utils")),
    *(QUANTIZATION + name for name in ("base_config", "base_scheme", "kv_cache", "utils", "unquant", "marlin_utils")),
}
WHOLE = tuple(QUANTIZATION + name for name in ("awq", "gptq", "compressed_tensors"))
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
CONFIGS = {
    "awq": ("awq.awq", "AWQMarlinConfig"),
    "gptq": ("gptq.gptq", "GPTQMarlinConfig"),
    "compressed-tensors": ("compressed_tensors.compressed_tensors", "CompressedTensorsConfig"),
}


class Part(nn.Module):
    """A part of a model that computes nothing here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def fuse_input_quant(self, *_: Any) -> None:
        """Nothing."""


class Weighted(Part):
    """A part with a weight of any shape."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.weight.weight_loader = lambda parameter, loaded, *_: setattr(parameter, "data", loaded)


def _set_weight_attrs(parameter: nn.Parameter, attributes: dict[str, Any] | None) -> None:
    for name, value in (attributes or {}).items():
        setattr(parameter, name, value)


def _layers(count: int, make: Any, prefix: str, **_: Any) -> tuple[nn.ModuleList, int, int]:
    return nn.ModuleList(make(idx=index, prefix=f"{prefix}.{index}") for index in range(count)), 0, count


GROUP = types.SimpleNamespace(is_first_rank=True, is_last_rank=True, rank_in_group=0, world_size=1)
PARALLEL = types.SimpleNamespace(
    pp_group=GROUP, tp_group=GROUP, attn_tp_group=GROUP, tp_size=1, tp_rank=0, attn_tp_size=1, attn_tp_rank=0,
    enable_dp_lm_head=False,
)  # fmt: skip


class Settings:
    """Environment variables, all unset."""

    def __getattr__(self, name: str) -> Any:
        return types.SimpleNamespace(get=lambda: False)


SCALARS = ("uint4", "uint8", "uint4b8", "uint8b128", "float8_e4m3fn", "float4_e2m1f")
KERNELS = ("AWQMarlinLinearKernel", "GPTQMarlinLinearKernel")
KNOWN: dict[str, Any] = {
    **dict.fromkeys(KERNELS, Part),
    "PoolingType": types.SimpleNamespace(LAST=None),
    "get_device_capability": lambda *_: (9, 0),
    "MarlinLinearLayerConfig": lambda **settings: types.SimpleNamespace(**settings),
    "wrap_method_with_debug_kernel_once": lambda *_, **__: None,
    **dict.fromkeys(("LogitsProcessor", "Pooler", "SiluAndMul", "DualGemm", "DenseSiluAndMulQuant"), Part),
    **dict.fromkeys(("RMSNorm", "VocabParallelEmbedding", "ParallelLMHead"), Weighted),
    "BaseFusedOp": nn.Module,
    "set_weight_attrs": _set_weight_attrs,
    "add_prefix": lambda name, prefix: f"{prefix}.{name}" if prefix else name,
    "make_pp_layers": _layers,
    "append_stages": lambda *stages: [None] * len(stages),
    "get_pp_indices": lambda count, rank, size: (0, count),
    "get_parallel": lambda: PARALLEL,
    "get_group_rank_size": lambda group: (0, 1),
    "divide": lambda whole, parts: whole // parts,
    "get_layer_id": lambda name: int(name.split(".")[2]) if ".layers." in name else None,
    "register_custom_op": lambda *_, **__: lambda function: function,
    "register_fake_if_exists": lambda *_, **__: lambda function: function,
    "envs": Settings(),
    "scalar_types": types.SimpleNamespace(**{name: name for name in SCALARS}),
}


def main(package: str, place: str, method: str, out: str) -> None:
    """See the module."""
    stand_in(package, ("sglang", "sgl_kernel"), lambda name: name in REAL or name.startswith(WHOLE), KNOWN)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    import importlib

    from sglang.srt.models.llama import LlamaForCausalLM
    from transformers import AutoConfig

    directory = Path(place)
    module, name = CONFIGS[method]
    config = getattr(importlib.import_module(QUANTIZATION + module), name).from_config(
        json.loads((directory / "config.json").read_text())["quantization_config"] | {"packed_modules_mapping": FUSED}
    )
    config.packed_modules_mapping = FUSED
    torch.set_default_dtype(torch.float16)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(directory), config)
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model.load_weights(tensors.items())
    save_file({name: tensor.data.contiguous() for name, tensor in model.named_parameters()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
