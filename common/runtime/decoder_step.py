"""Passes through all layers of a decoder in one call on the CPU, or in one between each two attentions.

`fused_pass` is what a decoder's forward computes, to within rounding, for what `ops/decoder` serves: no mask but
causality, windows and padding; no hooks on modules, no adapters, no outputs beside the last states. What it does not
serve goes module by module.

B batch, T tokens of the pass, S stored tokens, C hidden size, H query heads, G KV heads, D head_dim.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...ops.decoder.call import DecoderPass
from ...ops.decoder.cpu import decoder_between_cpu, decoder_layers_cpu, pack_layers
from ...ops.shared.operands import FLOAT_KINDS
from ...ops.shared.registry import NAMESPACE, note_way
from .attention import SlidingWindow, quantized_attention
from .cache.quantized_cache import QuantizedCache
from .cache.quantized_layer import QuantizedLayer
from .compatibility import CACHE_ARGUMENTS, OF_GENERATION
from .decoder import scaled_states
from .fused_cache import advance, fused_cache, packed_layer
from .fused_decoder import FusedDecoder, fused_decoder
from .fused_layers import NotFused, layer_biases
from .gradients import refuse_gradient

FLOAT_TOKENS = 8
"""Tokens of a pass up to which weights in float are multiplied here; beyond, PyTorch's products are quicker."""
_HARMLESS = (
    "use_cache", "cache_position", "return_dict", "output_attentions", "output_hidden_states", *OF_GENERATION
)  # fmt: skip
_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", *CACHE_ARGUMENTS)


def _refused_arguments(base: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    """Why a pass is none for the op by what a forward was asked, or None."""
    for name, value in arguments.items():
        if name in _READ or value is None or value is False:
            continue
        if name not in _HARMLESS or name.startswith("output_"):
            return f"{name} is given"
    config = base.config
    if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
        return "the config asks for attentions or hidden states"
    if arguments.get("return_dict") is False or getattr(config, "return_dict", True) is False:
        return "return_dict is False"
    if (arguments.get("input_ids") is None) == (arguments.get("inputs_embeds") is None):
        return "neither or both of input_ids and inputs_embeds are given"
    return None


def _refused_state(base: nn.Module, cache: Any) -> str | None:
    """Why a pass is none for the op by what goes on around it, or None."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is compiled"
    if base.training:
        return "the model is in training"
    if base.config._attn_implementation != NAMESPACE:
        return f"attention is {base.config._attn_implementation!r}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are hooks on all modules"
    if not isinstance(cache, QuantizedCache) or any(type(layer) is not QuantizedLayer for layer in cache.layers):
        return "the cache is of another class"
    if cache.offloading:
        return "the cache is offloaded"
    return None


def _masks(
    padding: Any, fused: FusedDecoder, batch: int, tokens: int, past: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The masks `[B, 1, T, S]` of layers without a window and with one; None where causality and window say it all.

    Raises:
        NotFused: what is given is none of padding.
    """
    if padding is None:
        return None, None
    total = past + tokens
    is_padding = isinstance(padding, torch.Tensor) and padding.dim() == 2
    if isinstance(padding, SlidingWindow) or not is_padding or tuple(padding.shape) != (batch, total):
        raise NotFused("the mask is none of padding, of all tokens")
    if bool(padding.all()):
        return None, None
    slots = torch.arange(total, device=padding.device)
    queries = slots[past:, None]
    seen = (slots <= queries) & padding.bool()[:, None, None]
    windows = {window for window in fused.windows if window}
    if len(windows) > 1:
        raise NotFused("windows of several sizes beside padding")
    return seen, seen & (slots > queries - windows.pop()) if windows else None


def _positions(given: torch.Tensor | None, batch: int, tokens: int, past: int) -> torch.Tensor:
    """Positions int64 `[B or 1, T]`, those that follow the stored tokens unless others are given.

    Raises:
        NotFused: what is given are not those of so many tokens.
    """
    if given is None:
        return torch.arange(past, past + tokens, device="cpu")[None]
    if given.dim() != 2 or given.shape[0] not in (1, batch) or given.shape[1] != tokens or given.is_floating_point():
        raise NotFused("position_ids are not of all tokens, one each")
    return given.long()


class _Pass:
    """One pass through a decoder."""

    def __init__(self, base: nn.Module, arguments: Mapping[str, Any]) -> None:
        self.base = base
        self.cache_name = next((name for name in CACHE_ARGUMENTS if arguments.get(name) is not None), "")
        self.cache = arguments.get(self.cache_name)
        for refusal in (_refused_arguments(base, arguments), _refused_state(base, self.cache)):
            if refusal is not None:
                raise NotFused(refusal)
        self.fused = fused_decoder(base)
        self.ids, self.embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        given, dims = (self.ids, 2) if self.embeds is None else (self.embeds, 3)
        if given.device.type != "cpu" or given.dim() != dims or given.numel() == 0:
            raise NotFused("no tokens are given, or not on the CPU")
        self.batch, self.tokens = given.shape[:2]
        if self.fused.is_float and self.batch * self.tokens > FLOAT_TOKENS:
            raise NotFused(f"weights in float and more than {FLOAT_TOKENS} tokens at once")
        self.past = self.cache.get_seq_length()
        self.fused_cache = fused_cache(self.fused, self.cache)
        self.masks = _masks(arguments.get("attention_mask"), self.fused, self.batch, self.tokens, self.past)
        self.position_ids = _positions(arguments.get("position_ids"), self.batch, self.tokens, self.past)

    def states(self) -> torch.Tensor:
        """What the first layer is given, in the model's dtype."""
        decoder = self.fused.decoder
        embeds = self.base.get_submodule(decoder.embedding)(self.ids) if self.embeds is None else self.embeds
        return scaled_states(decoder, self.base.config, embeds)

    def run(self) -> torch.Tensor:
        """The last states `[B, T, C]`, behind the last norm."""
        embedded = self.states()
        if embedded.dtype not in FLOAT_KINDS:
            raise NotFused(f"states are in {embedded.dtype}")
        if embedded.shape != (self.batch, self.tokens, self.fused.hidden_size):
            raise NotFused(f"states are {tuple(embedded.shape)}")
        with torch.no_grad():
            hidden = embedded.detach().to(torch.float32, copy=True).contiguous()  # somebody may have kept the other
            rows, tables = self.fused.angles.tables(self.position_ids.expand(self.batch, -1))
            call = DecoderPass(hidden, rows.contiguous(), None, *self.masks, self.past, *self.fused.last_norm())
            if self.fused_cache.is_served:
                self._run_whole(call, tables)
            else:
                self._run_between(call, tables)
            output = hidden if hidden.dtype == embedded.dtype else hidden.to(embedded.dtype)
        if torch.is_grad_enabled() and (embedded.requires_grad or self.fused.wants_gradient()):
            anchor = embedded if embedded.requires_grad else None
            output = refuse_gradient(output, anchor, "a decoder layer on codes")
        return output

    def _run_whole(self, call: DecoderPass, tables: list) -> None:
        fused, cache, total = self.fused, self.cache, self.past + self.tokens
        first = fused.plain[0]
        like = torch.empty((self.batch, first.kv_heads, 0, first.head_dim), dtype=self._dtype(), device="cpu")
        biases = [layer_biases(attention, self.position_ids, total) for attention in fused.attentions]
        if any(of_layer.key is not None for of_layer in biases):
            if any(fused.windows):
                raise NotFused("biases of k in sliding layers")
            call = call._replace(bias_start=(self.position_ids[:, -1] - (total - 1)).expand(self.batch).contiguous())
        self.fused_cache.refresh(fused, cache, tables, biases, like, total)
        decoder_layers_cpu(call, self.fused_cache.packed, len(cache.layers))
        advance(cache, total)

    def _dtype(self) -> torch.dtype:
        return self.base.get_submodule(self.fused.decoder.norm).weight.dtype

    def _run_between(self, call: DecoderPass, tables: list) -> None:
        """The kernel between attentions, which are those of the cache and of `quantized_attention`."""
        fused, cache, dtype = self.fused, self.cache, self._dtype()
        layers = [
            packed_layer(layer._replace(rotation=table)) for layer, table in zip(fused.plain, tables, strict=True)
        ]  # fmt: skip
        plain = fused.plain[0]
        q, kv = plain.heads * plain.head_dim, plain.kv_heads * plain.head_dim
        projected = torch.empty((self.batch, self.tokens, q + 2 * kv), dtype=torch.float32, device="cpu")
        attended: torch.Tensor | None = None
        for index, attention in enumerate(fused.attentions):
            pair = layers[max(0, index - 1) : index + 1]
            decoder_between_cpu(call, pack_layers(pair, [0] * len(pair)), len(pair), projected, attended)
            query, key, value = (
                part.unflatten(-1, (-1, plain.head_dim)).transpose(1, 2).to(dtype)
                for part in projected.split((q, kv, kv), dim=-1)
            )
            keys, values = cache.update(key, value, index)
            window = fused.windows[index]
            mask = self.masks[1 if window else 0]
            if mask is None and window:
                mask = SlidingWindow(window)
            elif mask is not None and keys.first:
                mask = mask[..., keys.first :]
            attended = quantized_attention(
                attention, query, keys, values, mask, attention.scaling, position_ids=self.position_ids
            )[0]
            attended = attended.flatten(2).float().contiguous()
        decoder_between_cpu(call, pack_layers(layers[-1:], [0]), 1, None, attended)


def fused_pass(base: nn.Module, arguments: Mapping[str, Any]) -> BaseModelOutputWithPast | None:
    """What a decoder's forward returns for arguments by name, a cache of ours among them; None where it has to do it.

    `ops.report()` says which way passes went, and why not this one.

    Raises:
        OctavoError: as the forward would.
    """
    try:
        this = _Pass(base, arguments)
        output = this.run()
    except NotFused as reason:
        note_way("decoder_layers", "CPU", f"has gone module by module: {reason}")
        return None
    note_way("decoder_layers", "CPU", "has run")
    return BaseModelOutputWithPast(last_hidden_state=output, **{this.cache_name: this.cache})
