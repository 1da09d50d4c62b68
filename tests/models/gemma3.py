"""A tiny Gemma 3, and a simulation of quantized ones: transformers' own, with what is quantized rounded by formulas."""

from typing import Any

import torch
import transformers
from torch.nn import functional

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.checkpoint.buffers import read_scales
from octavo.common.runtime.decoder import attention_modules
from octavo.common.runtime.quantized_linear import QuantizedLinear
from octavo.common.runtime.rotary import hadamard
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.common.runtime.w8a8_linear import W8A8DynamicLinear, W8A8Linear
from octavo.models.gemma3.modeling_gemma3_fa3 import Gemma3ForCausalLM

from ..support import randomized, tiny_config

WINDOW = 8


def tiny_gemma(**changes: Any) -> transformers.Gemma3ForCausalLM:
    """Six layers, every third one full and the others sliding; 4 query heads on 2 KV heads, wider than states."""
    fields = tiny_config().to_diff_dict()
    known = {name: fields[name] for name in fields.keys() - {"model_type", "rope_parameters"}}
    own = {
        "num_hidden_layers": 6,
        "head_dim": 32,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 100,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return randomized(transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**known, **own, **changes})))


def rounded_linear(linear: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """What a quantized linear stands for."""
    if isinstance(linear, W8A8Linear):
        codes = (x / linear.input_scale + linear.input_offset).round().clamp(-128, 127)
        x = (codes - linear.input_offset) * linear.input_scale
    elif isinstance(linear, W8A8DynamicLinear):
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        x = (x / scale).round() * scale
    return functional.linear(x, linear.float_weight(), linear.bias)


def rounded_query(query: torch.Tensor, scale: torch.Tensor | None, codec: Codec | None) -> torch.Tensor:
    """q as attention reads it."""
    if codec is None:
        return query
    if codec.dtype == "int8":
        return (query / scale).round().clamp(-128, 127) * scale
    return (query / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class Simulation:
    """A quantized Gemma as the stock one, whose attention works out for every query what it sees.

    Only how K and V are coded is Octavo's; masks, windows, RoPE, norms and scales of scores are not.
    """

    def __init__(self, quantized: Gemma3ForCausalLM) -> None:
        config = transformers.Gemma3TextConfig(**{**quantized.config.to_dict(), "auto_map": None})
        self.model = transformers.Gemma3ForCausalLM(config).eval()
        wanted, stored = set(self.model.state_dict()), quantized.state_dict()
        for name, module in quantized.named_modules():
            if isinstance(module, QuantizedLinear):
                wanted.discard(f"{name}.weight")
                self.model.get_submodule(name).forward = lambda x, linear=module: rounded_linear(linear, x)
        self.model.load_state_dict({name: stored[name] for name in wanted}, strict=False)
        self.scheme = quantized.scheme
        self.scales = read_scales(attention_modules(quantized), self.scheme, quantized.octavo_decoder)
        transformers.AttentionInterface.register("simulation", self._attend)
        self.model.set_attn_implementation("simulation")

    def _seen(self, values: torch.Tensor, codec: Codec | None, store: CodeStore) -> torch.Tensor:
        """`[1, G, S, D]` as the newest query sees it: sinks and the newest tokens in 16 bits, the others as codes."""
        scheme, tokens = self.scheme, values.shape[2]
        if codec is None:
            return values.half().float() if scheme.is_segmented else values
        step = codec.token_group if not scheme.window else max(16, codec.token_group)
        first, last = 0, tokens
        if scheme.is_segmented:
            first = min(tokens, scheme.sinks)
            last = first + max(0, tokens - scheme.sinks - scheme.window) // step * step
        parts = [values[:, :, :first].half().float(), values[:, :, last:].half().float()]
        if last > first:
            body = values[:, :, first:last]
            store.clear()
            store.append(body.half().float() if scheme.window or step > 1 else body)
            parts.insert(1, store.decoded(0, last - first))
        return torch.cat(parts, dim=2)

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> Any:
        index = module.layer_idx
        scheme, scales = self.scheme.of_layer(index), self.scales[index]
        bias = module.v_proj.bias if scheme.fold_bias else None
        bias = 0.0 if bias is None else bias.view(-1, 1, value.shape[-1])
        frequencies = getattr(self.model.model.rotary_emb, f"{module.layer_type}_inv_freq")
        value = hadamard(value - bias) if scheme.rotate_value else value - bias
        query = rounded_query(query, scales.query, scheme.query)
        rows, sides = (
            [],
            (
                (
                    key,
                    scheme.key,
                    CodeStore(scheme.key, scales.key, None, scales.key_levels, frequencies, scheme.sinks),
                ),
                (value, scheme.value, CodeStore(scheme.value, scales.value, None, scales.value_levels)),
            ),
        )
        whole = None if scheme.is_segmented else [self._seen(*side) for side in sides]
        for row in range(query.shape[2]):
            if whole is None:
                keys, values = (self._seen(x[:, :, : row + 1], codec, store) for x, codec, store in sides)
            else:
                keys, values = (x[:, :, : row + 1] for x in whole)
            first = max(0, row + 1 - WINDOW) if module.layer_type == "sliding_attention" else 0
            repeats = query.shape[1] // keys.shape[1]
            keys, values = (x[:, :, first:].repeat_interleave(repeats, dim=1) for x in (keys, values))
            scores = query[:, :, row : row + 1] @ keys.mT * module.config.query_pre_attn_scalar**-0.5
            rows.append(scores.softmax(dim=-1) @ values)
        output = torch.cat(rows, dim=2)
        output = hadamard(output) if scheme.rotate_value else output
        if module.v_proj.bias is not None and scheme.fold_bias:
            output = output + bias.repeat_interleave(output.shape[1] // len(bias), dim=0)
        return output.transpose(1, 2).contiguous(), None


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std())


def outputs(model: torch.nn.Module, ids: torch.Tensor, given: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """What each layer makes, `[1, S, E]`, and the logits; `given` takes the place of what the layers before made."""
    found: list[torch.Tensor] = []

    def replace(layer: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args if given is None or not found else (given[len(found) - 1], *args[1:])

    hooks = [layer.register_forward_pre_hook(replace) for layer in (*model.model.layers, model.model.norm)]
    hooks += [layer.register_forward_hook(lambda _, __, output: found.append(output)) for layer in model.model.layers]
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return [*found, logits]
