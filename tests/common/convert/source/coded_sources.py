"""Tiny checkpoints in codes, packed here word by word, or by the library that a format belongs to.

N output channels, K input channels, G groups of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from ....support import edit_json, save_source, tiny_llama

GROUP = 32
FP8_MAX = 448.0


@dataclass
class Coded:
    """A linear in codes.

    Attributes:
        codes, zero: signed, `[N, K]` and `[N, G]` or None.
        scale: float32 `[N, G]`, `[N, 1]`, `[1, 1]` or of blocks.
        stored: the tensors of it, by the ends of their names.
        weight: what it stands for, float32 `[N, K]`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    stored: dict[str, torch.Tensor]
    weight: torch.Tensor


@dataclass
class Layout:
    """A way to write a checkpoint: what is made of a weight, `quantization_config`, and sizes of the model."""

    code: Callable[[torch.Tensor], Coded]
    config: dict[str, Any]
    label: str | None = None
    flags: tuple[str, ...] = field(default=())
    sizes: dict[str, float] = field(default_factory=dict)


def integers(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signed codes `[N, K]`, scales `[N, G]` that float16 holds, and zeros `[N, G]` above the lowest code."""
    half, grouped = 2 ** (bits - 1), weight.unflatten(1, (-1, group))
    if symmetric:
        scale, zero = grouped.abs().amax(-1) / max(half - 1, 1), torch.zeros(grouped.shape[:2])
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / (2 * half - 1)
        zero = (-half - (low / scale).round()).clamp(1 - half, half - 1)
    scale = scale.half().float()
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(-half, half - 1)
    return codes.flatten(1).to(torch.int8), scale, zero


def decoded(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, order: Any = None) -> torch.Tensor:
    """What integer codes stand for, channel by channel."""
    group = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1]) if order is None else order
    zeros = torch.zeros_like(scale) if zero is None else zero
    return (codes.float() - zeros[:, group]) * scale[:, group]


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers `[..., n]` from 0 as int32 `[..., n * bits / 32]`: a sum for each 32 of them."""
    places = 2 ** torch.arange(bits)
    stream = (values.long()[..., None] // places % 2).flatten(-2).unflatten(-1, (-1, 32))
    found = (stream * 2 ** torch.arange(32)).sum(-1)
    return torch.where(found >= 2**31, found - 2**32, found).int()


def awq(weight: torch.Tensor) -> Coded:
    """AutoAWQ's "gemm"."""
    codes, scale, zero = integers(weight, 4, GROUP, symmetric=False)

    def packed(values: torch.Tensor) -> torch.Tensor:
        fields = values.T.long().unflatten(-1, (-1, 8)) + 8
        return words(torch.stack([fields[..., place] for place in (0, 2, 4, 6, 1, 3, 5, 7)], dim=-1).flatten(-2), 4)

    stored = {"qweight": packed(codes), "qzeros": packed(zero), "scales": scale.T.half().contiguous()}
    return Coded(codes, scale, zero, stored, decoded(codes, scale, zero))


def gptq(
    weight: torch.Tensor, bits: int = 4, symmetric: bool = True, less: int = 1, order: torch.Tensor | None = None
) -> Coded:
    """GPTQ; stored zeros are less by 1 in the first version. `order` is the group of each channel."""
    codes, scale, zero = integers(weight, bits, GROUP, symmetric)
    half = 2 ** (bits - 1)
    plain = torch.arange(weight.shape[1]) // GROUP
    stored = {
        "qweight": words((codes.long() + half), bits).T.contiguous(),
        "qzeros": words(zero.T.long() + half - less, bits),
        "scales": scale.T.half().contiguous(),
        "g_idx": (plain if order is None else order(weight.shape[1])).int(),
    }
    where = None if order is None else order(weight.shape[1])
    return Coded(codes, scale, zero, stored, decoded(codes, scale, zero, where))


def mixed(in_features: int) -> torch.Tensor:
    """Groups that act-order mixed up."""
    return (torch.arange(in_features) // GROUP)[torch.randperm(in_features, generator=torch.Generator().manual_seed(3))]


def uneven(in_features: int) -> torch.Tensor:
    """Groups of which one has a channel more than another."""
    return mixed(in_features).index_fill(0, torch.tensor(int((mixed(in_features) == 1).nonzero()[0])), 0)


def packed_ct(weight: torch.Tensor, bits: int = 4, symmetric: bool = True, group: int = GROUP) -> Coded:
    """pack-quantized of compressed-tensors, by its own packing."""
    codes, scale, zero = integers(weight, bits, group or weight.shape[1], symmetric)
    stored = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_shape": torch.tensor(weight.shape),
        "weight_scale": scale.half(),
    }
    if not symmetric:
        stored["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), bits, packed_dim=0)
    return Coded(codes, scale, zero, stored, decoded(codes, scale, zero))


def packed_in_order(weight: torch.Tensor) -> Coded:
    """pack-quantized with actorder "group"."""
    coded, order = packed_ct(weight), mixed(weight.shape[1])
    weight = decoded(coded.codes, coded.scale, coded.zero, order)
    return Coded(coded.codes, coded.scale, coded.zero, coded.stored | {"weight_g_idx": order.int()}, weight)


def plain_ct(weight: torch.Tensor, inputs: dict[str, torch.Tensor] | None = None) -> Coded:
    """int-quantized of compressed-tensors."""
    codes, scale, zero = integers(weight, 8, weight.shape[1])
    stored = {"weight": codes, "weight_scale": scale.bfloat16(), **(inputs or {})}
    scale = scale.bfloat16().float()
    return Coded(codes, scale, zero, stored, decoded(codes, scale, zero))


def fp8(weight: torch.Tensor, per_tensor: bool = False, name: str = "weight_scale", **inputs: torch.Tensor) -> Coded:
    """fp8 with a scale per output channel, or for the whole weight."""
    scale = (weight.abs().max().view(1, 1) if per_tensor else weight.abs().amax(1, keepdim=True)) / FP8_MAX
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, name: scale.view(()) if per_tensor else scale, **inputs}
    return Coded(codes, scale, None, stored, codes.float() * scale)


def fp8_blocks(weight: torch.Tensor, block: int = 128, name: str = "weight_scale_inv") -> Coded:
    """DeepSeek's fp8, whose last blocks may be smaller."""
    padded = torch.zeros([-(-size // block) * block for size in weight.shape])
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).abs().amax((1, 3)) / FP8_MAX
    spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: weight.shape[0], : weight.shape[1]]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return Coded(codes, scale, None, {"weight": codes, name: scale}, codes.float() * spread)


def ct_config(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group}, **more,
    }  # fmt: skip


def args(bits: int, kind: str, strategy: str, symmetric: bool = True, dynamic: bool = False, **more: Any) -> dict:
    """`QuantizationArgs` of compressed-tensors."""
    return {
        "num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": dynamic,
        "group_size": GROUP if strategy == "group" else None, **more,
    }  # fmt: skip


def write_coded(
    directory: Path, layout: Layout, head: bool = False, **changes: Any
) -> tuple[dict[str, Coded], LlamaForCausalLM]:
    """Write a tiny Llama whose linears are in codes; returns these, and the model that they stand for.

    Args:
        head: whether the last linear is in codes, too.
        changes: of the tiny model's config.
    """
    model = tiny_llama(**layout.sizes, **changes)
    save_source(directory, model)
    tensors, linears = {name: tensor.clone() for name, tensor in model.state_dict().items()}, {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or (name == "lm_head" and not head):
            continue
        linears[name] = layout.code(module.weight.detach())
        module.weight.data = linears[name].weight
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{end}": tensor.clone() for end, tensor in linears[name].stored.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_json(directory / "config.json", quantization_config=layout.config)
    return linears, model.eval()
