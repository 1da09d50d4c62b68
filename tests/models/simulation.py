"""Converted models of any architecture as float models whose numbers go through quantize and dequantize.

transformers' own class in float64, with hooks: inputs and weights of linears, and q, K and V, are what their codes
stand for, and everything is computed with these floats. Weights, scales and biases are those that the converted model
holds; K and V are coded by its own cache, of which the tests of the cache say that it codes right.
"""

from typing import Any

import torch
import transformers
from torch import nn

from octavo.common.runtime.bias_fold import folds_key_bias
from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.cache.quantized_cache import QuantizedLayer
from octavo.common.runtime.cache.segment_store import SegmentStore
from octavo.common.runtime.cache.views import Codes, Segments, as_segments
from octavo.common.runtime.decoder import attention_modules, linear_of, stated_decoder
from octavo.common.runtime.norm_bias import add_norm_bias
from octavo.common.runtime.quantized_linear import QuantizedLinear
from octavo.common.runtime.rotary import hadamard, rope_constants, rotated_by_slot
from octavo.common.runtime.schemes.linear_scheme import W8A8, W8A8_DYNAMIC, WEIGHT_ONLY

SIMULATION = "octavo_simulation"


def coded_input(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """What the codes of inputs `[..., K]` stand for."""
    if layer.LABEL in WEIGHT_ONLY:
        if layer.cpu_activations == "float":
            return x
        grouped = x.float().unflatten(-1, (layer.weight_scale.shape[1], -1))  # as the op takes it
        scale = grouped.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
        return ((grouped / scale).round().clamp(-128, 127).double() * scale).flatten(-2)
    if layer.LABEL == W8A8_DYNAMIC:
        x = x.float()  # as the op takes it
        scale, offset = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127, 0.0
    else:
        assert layer.LABEL == W8A8
        scale, offset = layer.input_scale.double(), layer.input_offset.double()
    return ((x / scale + offset).round().clamp(-128, 127) - offset).double() * scale


def added_bias(layer: QuantizedLinear) -> torch.Tensor | None:
    """The bias of a linear, float64 `[N]`, which static W8A8 holds in units of its products."""
    if layer.LABEL != W8A8:
        return None if layer.bias is None else layer.bias.double()
    units = layer.quant_bias.double() + layer.input_offset.double() * layer.weight.double().sum(dim=1)
    return units * layer.input_scale.double() * layer.weight_scale.double().squeeze(1)


def coded_query(layer: QuantizedLayer, query: torch.Tensor) -> torch.Tensor:
    """What the codes of q `[B, H, S, D]` stand for."""
    if layer.query_scale is None:
        return query
    scaled = query / layer.query_scale
    coded = scaled.round().clamp(-127, 127) if layer.scheme.query.dtype == "int8" else scaled.to(torch.float8_e4m3fn)
    return coded.double() * layer.query_scale


def stored(store: CodeStore | SegmentStore, handle: Codes | Segments) -> torch.Tensor:
    """All that is stored of K or V, as the newest query sees it: `[B, G, S, D]`."""
    side, body = as_segments(handle), getattr(store, "body", store)
    first, last = side.edges(side.total)
    parts = [body.decoded(0, last - first)] if last > first else []
    if first:
        parts.insert(0, side.floats(0, first).float())
    if last < side.total:
        parts.append(side.floats(last, side.total).float())
    values = torch.cat(parts, dim=2).double()
    if handle.dual is not None:
        values = values @ handle.dual.double()
    if handle.center is not None:
        values = values - handle.center.left_out(torch.zeros_like(values), 0)
    return hadamard(values) if handle.rotated else values


class Simulation:
    """The logits of a converted model, simulated.

    Args:
        native: the float model of transformers, which is changed.
        quantized: what was converted from it; it has run, so that it knows which biases it folds.
    """

    def __init__(self, native: nn.Module, quantized: nn.Module) -> None:
        self.quantized, self.native = quantized, native.double()
        self.attentions = [attention for _, attention in attention_modules(quantized)]
        self.decoder = stated_decoder(quantized)
        for name, module in quantized.named_modules():
            if isinstance(module, QuantizedLinear):
                self._replace(native.get_submodule(name), module)
            elif getattr(module, "bias", None) is not None and module.bias.dim() == module.weight.dim() == 1:
                add_norm_bias(native.get_submodule(name), module.bias.double())
        states = native.state_dict()
        floats = {n: t for n, t in quantized.state_dict().items() if n in states and t.is_floating_point()}
        coded = {n for n, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
        native.load_state_dict({n: t for n, t in floats.items() if n.rpartition(".")[0] not in coded}, strict=False)
        transformers.AttentionInterface.register(SIMULATION, self._attend)
        transformers.AttentionMaskInterface.register(SIMULATION, transformers.masking_utils.eager_mask)
        native.set_attn_implementation(SIMULATION)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Float64 `[B, S, V]` of ids `[B, S]`."""
        return self.native(ids, use_cache=False).logits

    @staticmethod
    def _replace(linear: nn.Linear, layer: QuantizedLinear) -> None:
        linear.weight = nn.Parameter(layer.float_weight().double(), requires_grad=False)
        bias = added_bias(layer)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        linear.register_forward_pre_hook(lambda _, args: coded_input(layer, args[0]))

    def _left_out(self, index: int, tokens: int) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """What the cache does not hold of K and of V, `[G, S, D]`: biases that come back in attention."""
        attention, scheme = self.attentions[index], self.quantized.scheme.of_layer(index)
        width, found = attention.head_dim, []
        for part in ("key", "value"):
            linear = linear_of(self.decoder, attention, part)
            is_folded = linear is not None and linear.bias is not None and scheme.fold_bias and scheme.is_quantized
            if not is_folded or (part == "key" and not folds_key_bias(self.quantized, index)):
                found.append(0.0)
                continue
            bias = linear.left_out.detach().float().view(1, -1, 1, width).expand(-1, -1, tokens, -1)
            if part == "key":
                frequencies, factor = rope_constants(self.quantized.config, width, index)
                bias = rotated_by_slot(bias, frequencies, 0) * factor
            found.append(bias.double())
        return found[0], found[1]

    def _weighed(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """The newest queries `[B, H, Q, D]` over K and V `[B, G, S, D]` as they see them: `[B, Q, H, D]`."""
        left_out = self._left_out(module.layer_idx, k.shape[2])
        layer = self.quantized.new_cache().layers[module.layer_idx]
        handles = layer.update(*((x - left).to(self.quantized.dtype) for x, left in zip((k, v), left_out, strict=True)))
        key, value = map(stored, (layer.key_store, layer.value_store), handles)
        heads = q.shape[1] // k.shape[1]
        key, value, bias = (
            (x + torch.zeros_like(k)).repeat_interleave(heads, dim=1) for x in (key, value + left_out[1], left_out[0])
        )
        scores = coded_query(layer, q) @ key.mT + q @ bias.mT  # what is folded is added by queries in float
        weights = (scores * scaling + mask[..., : k.shape[2]]).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).contiguous()

    def _attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        scheme = self.quantized.scheme.of_layer(module.layer_idx)
        if not any(scheme.is_delayed(codec) for codec in (scheme.key, scheme.value)):
            return self._weighed(module, q, k, v, mask, scaling), None
        rows = []  # tokens become codes later than they come, so that each query sees K and V of its own
        for row in range(q.shape[2]):
            stop = slice(row, row + 1), slice(0, row + 1)
            states = k[:, :, stop[1]], v[:, :, stop[1]]
            rows.append(self._weighed(module, q[:, :, stop[0]], *states, mask[:, :, stop[0]], scaling))
        return torch.cat(rows, dim=1), None
