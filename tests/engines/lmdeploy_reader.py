"""LMDeploy's own reading of config.json and of the tensors of linears, run on a directory in a process of its own.

    python lmdeploy_reader.py PACKAGE DIRECTORY OUT

PACKAGE is where the wheel was unpacked. Of TurboMind, whose library needs CUDA, the Python that reads a checkpoint is
imported as it is: `get_tm_config`, the checkpoint, the formats of weights and `_build_linear`. Stand-ins take the place
of the library and of what loads and runs a model. OUT gets `NAME.PART` of every linear as TurboMind gets it, weights
`[K, N]`, and `NAME.float`, which its own `dequant` makes of them; GPTQ's format has none, so that AWQ's does, which has
the same tensors by then.
"""

import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from stand_ins import stand_in

READERS = "lmdeploy.turbomind."
REAL = {
    "lmdeploy",
    "lmdeploy.version",
    "lmdeploy.turbomind",
    *(READERS + name for name in ("converter", "checkpoint", "weight_format", "builders", "builders.linear")),
}
NOT_READ = ("g_idx", "weight_shape")
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


class DataType:
    """TurboMind's dtypes, each by its name."""

    def __getattr__(self, name: str) -> str:
        return name


def _config(path: str, trust_remote_code: bool = False) -> tuple[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    return config.architectures[0], config


class Model:
    """What a class of a model keeps of its arguments."""

    def __init__(self, config: Any, *, resolver: Any) -> None:
        self.resolver = resolver


KNOWN: dict[str, Any] = {
    "DataType": DataType(),
    "get_model_arch": _config,
    "search_nested_config": lambda config, key: config.get(key),
    "source_model_config": lambda config: config,
    "_get_and_verify_max_len": lambda config, length: config.max_position_embeddings,
    "_torch_dtype_to_cpp": lambda dtype: {torch.float16: "TYPE_FP16", torch.bfloat16: "TYPE_BF16"}[dtype],
    "SUPPORTED_ARCHS": {"LlamaForCausalLM": "llama"},
    "INPUT_MODELS": {"llama": Model},
}


def _engine() -> Any:
    names = ["model_format", "hf_overrides", "session_len", "attn_tp_size", "attn_cp_size", "mlp_tp_size"]
    return types.SimpleNamespace(**dict.fromkeys(names), dtype="auto", devices=[0])


def main(package: str, directory: str, out: str) -> None:
    """See the module."""
    stand_in(package, ("lmdeploy",), lambda name: name in REAL, KNOWN)
    torch.Tensor.cuda = lambda tensor: tensor
    from lmdeploy.turbomind import converter
    from lmdeploy.turbomind.builders.linear import _build_linear
    from lmdeploy.turbomind.checkpoint import Prefix, create_checkpoint
    from lmdeploy.turbomind.weight_format import AWQFormat, WeightFormat

    converter._get_executable_dtypes = lambda formats, device: {"float16", "bfloat16"}
    model, path, _ = converter.get_tm_config(directory, _engine())
    checkpoint = create_checkpoint(path)
    found = {}
    for layer in range(_config(directory)[1].num_hidden_layers):
        for block, names in zip(("self_attn", "mlp"), PARTS, strict=True):
            for part in names:
                name = f"model.layers.{layer}.{block}.{part}"
                linear = _build_linear(*model.resolver.resolve(Prefix(checkpoint, name)))
                found |= {f"{name}.{kind}": tensor for kind, tensor in linear.tensors.items()}
                has_decoder = type(linear.weight_format).dequant is not WeightFormat.dequant
                decoder = linear.weight_format if has_decoder else AWQFormat(block_in=0)
                found[f"{name}.float"] = decoder.dequant(linear.tensors, torch.float32)["weight"]
    left = [key for key in checkpoint._data if "_proj." in key and key.rpartition(".")[2] not in NOT_READ]
    assert not left, left
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
