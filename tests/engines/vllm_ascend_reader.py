"""vllm-ascend's own parsing, schemes and adapters, run on a directory in a process of their own.

    python vllm_ascend_reader.py PACKAGE DIRECTORY LAYERS DTYPE OUT

PACKAGE is where the wheel was unpacked. Importing vllm-ascend whole needs vLLM of the same number, torch_npu and CANN,
so that its `quantization` package alone is imported, function by function; stand-ins take the place of what else it
imports: modules whose classes are empty and whose functions return nothing. What vLLM does is written out here: the
names of a Llama's linears, `load_weights` of its models, and the weight loaders of fused linears. OUT gets every
parameter that was loaded, and what each linear computes of the inputs that lie in DIRECTORY.inputs.
"""

import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from stand_ins import nothing, stand_in
from torch import nn

REAL = ("vllm_ascend", "vllm_ascend.quantization")
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def _decorator(*_: Any, **__: Any) -> Any:
    return lambda decorated: decorated


def _set_weight_attrs(parameter: nn.Parameter, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(parameter, name, value)


class PerTensorScale(nn.Parameter):
    """vLLM's parameter of a scale for a whole tensor, which has no `output_dim`."""

    def __new__(cls, data: torch.Tensor, weight_loader: Any = None) -> "PerTensorScale":
        return super().__new__(cls, data, requires_grad=False)


class WeightsMapper:
    """vLLM's new names by the ends of old ones."""

    def __init__(self, orig_to_new_suffix: dict[str, str]) -> None:
        self.orig_to_new_suffix = orig_to_new_suffix

    def __or__(self, other: "WeightsMapper") -> "WeightsMapper":
        return WeightsMapper(self.orig_to_new_suffix | other.orig_to_new_suffix)

    def renamed(self, name: str) -> str:
        """The new name of a tensor."""
        for old, new in self.orig_to_new_suffix.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name


class QuantizationConfig:
    """vLLM's base class, which renames the scales of fp8 caches alone."""

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """No names."""
        return WeightsMapper({})


VLLM_CONFIG = types.SimpleNamespace(
    kv_transfer_config=None,
    quant_config=None,
    model_config=types.SimpleNamespace(hf_config=types.SimpleNamespace(model_type="llama")),
)
KNOWN = {
    "WeightsMapper": WeightsMapper,
    "QuantizationConfig": QuantizationConfig,
    "register_quantization_config": _decorator,
    "set_weight_attrs": _set_weight_attrs,
    "PerTensorScaleParameter": PerTensorScale,
    "get_current_vllm_config": lambda: VLLM_CONFIG,
    "get_tensor_model_parallel_rank": lambda: 0,
    "get_tensor_model_parallel_world_size": lambda: 1,
    "vllm_version_is": lambda version: version == "0.23.0",
    "maybe_trans_nz": lambda weight: weight,
    "COMPRESSED_TENSORS_METHOD": "compressed-tensors",
    "ASCEND_QUANTIZATION_METHOD": "ascend",
    "ACL_FORMAT_FRACTAL_NZ": 29,
}


def _is_real(name: str) -> bool:
    return name in REAL or name.startswith("vllm_ascend.quantization.")


# What the operators compute, as torch_npu documents them.


def npu_quantize(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`round(x / scale) + offset` as int8."""
    return ((x.float() / scale.float()).round() + offset.float()).clamp(-128, 127).to(torch.int8)


def npu_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`(x @ weight + bias) * scale`; a scale in int64 has the bits of a float32."""
    factor = scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale.float()
    product = x.double() @ weight.double()
    if pertoken_scale is None:
        product = product + (0 if bias is None else bias.double())
        return (product * factor.double()).to(output_dtype)
    product = product * factor.double() * pertoken_scale.double()[:, None]
    return (product + (0 if bias is None else bias.double())).to(output_dtype)


def npu_dynamic_quant(x: torch.Tensor, dst_type: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a scale for each token."""
    scale = x.float().abs().amax(dim=-1) / 127
    return (x.float() / scale[:, None]).round().to(dst_type), scale


def npu_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ ((weight + offset) * scale) + bias`."""
    decoded = (weight.double() + antiquant_offset.double()) * antiquant_scale.double()
    return (x.double() @ decoded + (0 if bias is None else bias.double())).to(x.dtype)


def _install(package: str) -> None:
    stand_in(package, ("vllm", "vllm_ascend", "torch_npu"), _is_real, KNOWN)
    import torch_npu

    for operator in (npu_quant_matmul, npu_dynamic_quant, npu_weight_quant_batchmatmul):
        setattr(torch_npu, operator.__name__, operator)
    prefetch = types.SimpleNamespace(
        maybe_prefetch_attn_weight_preprocess=nothing, maybe_prefetch_attn_weight_postprocess=nothing
    )
    KNOWN["get_weight_prefetch_method"] = lambda: prefetch
    torch.ops.vllm = types.SimpleNamespace(
        quantize=lambda x, scale, reciprocal, offset: npu_quantize(x, scale[: x.shape[-1]], offset[: x.shape[-1]])
    )


class Model(nn.Module):
    """The parameters of a Llama as vLLM's class of it names them, where vllm-ascend is asked for those of linears."""

    def __init__(self, config: Any, tensors: dict[str, torch.Tensor], layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
        from vllm.model_executor.layers.linear import LinearBase

        self.methods: dict[str, tuple[nn.Module, Any]] = {}
        self.placed: dict[str, nn.Parameter] = {}
        for layer in range(layers):
            for part in LINEARS:
                name = f"model.layers.{layer}.{part}"
                linear = type("Linear", (LinearBase, nn.Module), {})()
                nn.Module.__init__(linear)
                linear.params_dtype, linear.prefix = dtype, name
                self._make(config, linear, name, self._sizes(name, tensors), dtype)
            name = f"model.layers.{layer}.self_attn.attn"
            attention = type("Attention", (AttentionLayerBase, nn.Module), {})()
            nn.Module.__init__(attention)
            method = config.get_quant_method(attention, name)
            if method is not None:
                method.create_weights(attention)
                self.methods[name] = attention, method
                self.placed |= {f"{name}.{part}": parameter for part, parameter in attention.named_parameters()}

    @staticmethod
    def _sizes(name: str, tensors: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
        parent, _, part = name.rpartition(".")
        return [tuple(tensors[f"{parent}.{shard}.weight"].shape) for shard in FUSED.get(part, [part])]

    def _make(
        self, config: Any, linear: nn.Module, name: str, sizes: list[tuple[int, int]], dtype: torch.dtype
    ) -> None:
        method = config.get_quant_method(linear, name)
        if not hasattr(method, "quant_method"):  # in float, by a method of vLLM's
            shape = sum(rows for rows, _ in sizes), sizes[0][1]
            linear.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            linear.weight.output_dim = 0
        else:
            rows = [rows for rows, _ in sizes]
            method.create_weights(linear, sizes[0][1], rows, sizes[0][1], sum(rows), dtype, weight_loader=None)
            self.methods[name] = linear, method
        self.placed |= {f"{name}.{part}": parameter for part, parameter in linear.named_parameters()}
        for parameter in linear.parameters():
            parameter.rows = [rows for rows, _ in sizes]

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """As `LlamaModel.load_weights` of vLLM 0.23: fused linears get their parts; biases without a place are skipped.

        Raises:
            KeyError: a tensor has no place.
        """
        for name, tensor in tensors.items():
            parent, _, part = name.rpartition(".")
            owner, _, shard = parent.rpartition(".")
            fused = next((whole for whole, parts in FUSED.items() if shard in parts), None)
            target = name if fused is None or name in self.placed else f"{owner}.{fused}.{part}"
            is_outer = ".layers." not in name or parent.endswith("norm")
            if target not in self.placed and (is_outer or name.endswith(".bias")):
                continue
            parameter = self.placed[target]
            if hasattr(parameter, "weight_loader") and ".attn." in target:
                parameter.weight_loader(parameter, tensor)
            elif fused is None or not hasattr(parameter, "output_dim"):
                assert parameter.shape == tensor.shape, (name, parameter.shape, tensor.shape)
                parameter.data.copy_(tensor)
            else:
                index = FUSED[fused].index(shard)
                first = sum(parameter.rows[:index])
                place = parameter.data.narrow(0, first, parameter.rows[index])
                assert place.shape == tensor.shape, (name, place.shape, tensor.shape)
                place.copy_(tensor)


def main(package: str, directory: str, layers: str, dtype: str, out: str) -> None:
    """See the module."""
    _install(package)
    from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig

    model_dtype = getattr(torch, dtype)
    config = AscendModelSlimConfig()
    config.packed_modules_mapping = FUSED
    config.maybe_update_config(directory)
    VLLM_CONFIG.quant_config = config
    (file,) = Path(directory).glob("*.safetensors")
    mapper = config.get_cache_scale_mapper()  # which vLLM's AutoWeightsLoader goes by
    tensors = {mapper.renamed(name): tensor for name, tensor in load_file(file).items()}
    torch.set_default_dtype(model_dtype)
    model = Model(config, tensors, int(layers), model_dtype)
    model.load(tensors)
    found = {name: parameter.data.clone() for name, parameter in model.placed.items()}
    inputs = load_file(f"{directory}.inputs")
    for name, (module, method) in model.methods.items():
        method.process_weights_after_loading(module)
        if name.rpartition(".")[2] != "attn":
            found[f"{name} output"] = method.quant_method.apply(module, inputs[name].to(model_dtype), None)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
