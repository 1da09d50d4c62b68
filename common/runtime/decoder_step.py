"""Passes through all layers of a decoder in one call on the CPU, or in one between each two attentions.

`fused_pass` is what a decoder's forward computes, to within rounding, for what `ops/decoder` serves: no mask but
causality, windows and padding; no hooks on modules, no adapters, no outputs beside the last states. What it does not
serve goes module by module.

B batch, T tokens of the pass, S stored tokens, C hidden size, H query heads, G KV heads, D head_dim.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...ops.attention.call import Coded
from ...ops.decoder.call import DecoderLayer, DecoderPass
from ...ops.decoder.cpu import (
    DECODER_KERNEL,
    PackedLayer,
    decoder_between_cpu,
    decoder_layers_cpu,
    pack_layer,
    pack_layers,
)
from ...ops.shared.codes import FP8_DTYPES
from ...ops.shared.operands import FLOAT_KINDS
from ...ops.shared.registry import note_way
from ..errors import first_line
from .attention import SlidingWindow, quantized_attention
from .cache.code_store import CodeStore
from .cache.quantized_cache import QuantizedCache
from .cache.quantized_layer import QuantizedLayer
from .cache.sliding import sliding_windows
from .compatibility import CACHE_ARGUMENTS
from .decoder import scaled_states, stated_decoder
from .fused_layers import NotFused, Sources, layer_biases, norm_eps, plain_layer
from .gradients import refuse_gradient
from .layer_angles import LayerAngles

IS_ZOO = "octavo_is_stated"
"""Attribute of a decoder whose anatomy the zoo states, and which was checked."""
FLOAT_TOKENS = 8
"""Tokens of a pass up to which weights in float are multiplied here; beyond, PyTorch's products are quicker."""
_HARMLESS = ("use_cache", "cache_position", "return_dict", "output_attentions", "output_hidden_states")
_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", *CACHE_ARGUMENTS)


class FusedDecoder:
    """What is known of a decoder's layers from one pass to the next.

    Args:
        base: the decoder.

    Raises:
        NotFused: its layers cannot be run whole.
    """

    def __init__(self, base: nn.Module) -> None:
        decoder = stated_decoder(base)
        layers = base.get_submodule(decoder.layers)
        if any(decoder.experts_in(base.config, index) for index in range(len(layers))):
            raise NotFused("a layer has experts")
        if getattr(base.config, "sliding_window", None) == 1:
            raise NotFused("a window of one token")
        if any(part.device.type != "cpu" for part in layers.parameters()):
            raise NotFused("a layer is not on the CPU")
        if DECODER_KERNEL.supports() is not None:
            raise NotFused(f"there is no C kernel ({DECODER_KERNEL.supports()})")
        self.plain = [plain_layer(layer, decoder, base.config) for layer in layers]
        self.attentions = [layer.get_submodule(decoder.attention.name) for layer in layers]
        self.windows = sliding_windows(base.config)
        self.angles = LayerAngles(base.get_submodule(decoder.rotary), base.config)
        self.is_float = any(
            not linear.bits for layer in self.plain for linear in layer.linears if linear.codes is not None
        )
        self._norm = base.get_submodule(decoder.norm)
        self.decoder = decoder

    def last_norm(self) -> tuple[torch.Tensor, float, float]:
        """Weight, offset and epsilon of the norm behind the last layer."""
        return self._norm.weight.detach(), self.decoder.norm_offset, norm_eps(self._norm)


def _serves_store(store: Any) -> bool:
    """Whether the kernel encodes into a store."""
    if type(store) is not CodeStore:
        return False
    codec = store.codec
    if codec is None:
        return True
    is_plain = codec.rule == "range" and codec.levels == "uniform" and codec.bits in (8, 4) and not codec.outliers
    return is_plain and codec.token_group == 1 and not codec.before_rope


def serves_layer(layer: QuantizedLayer) -> bool:
    """Whether the kernel encodes and reads what a layer of a cache stores."""
    scheme = layer.scheme
    if (
        scheme.prefill == "float"
        or scheme.smooth_key
        or not all(map(_serves_store, (layer.key_store, layer.value_store)))
    ):
        return False
    is_fp8 = scheme.key is not None and scheme.key.stored_dtype in FP8_DTYPES
    return not (scheme.query is not None and is_fp8)


class FusedCache:
    """A decoder's layers together with their parts of a cache, packed for the kernel."""

    def __init__(self, cache: QuantizedCache) -> None:
        self.is_served = all(map(serves_layer, cache.layers))
        self._storage: list[Any] = []
        self._forgotten: list[int] = []
        self._others: tuple = ()
        self._layers: list[PackedLayer] = []
        self.packed = b""

    def refresh(self, fused: FusedDecoder, cache: QuantizedCache, tables: list, biases: list) -> None:
        """Pack again what has changed: storage that was moved, tables that have grown, tokens that were forgotten."""
        stores = [store for layer in cache.layers for store in (layer.key_store, layer.value_store)]
        storage = [store._codes for store in stores]
        forgotten = [layer.key_store.forgotten for layer in cache.layers]
        others = (fused, *tables, *[part for of_layer in biases for part in of_layer])
        is_same = _are(storage, self._storage) and _are(others, self._others)
        if not is_same:
            self._layers = []
            for index, layer in enumerate(cache.layers):
                self._layers.append(_packed(_with_cache(fused, index, layer, tables[index], biases[index])))
        if not is_same or forgotten != self._forgotten:
            self.packed = pack_layers(self._layers, forgotten)
        self._storage, self._others, self._forgotten = storage, others, forgotten


def _are(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(map(lambda one, other: one is other, some, others))


def _packed(layer: DecoderLayer) -> PackedLayer:
    packed = pack_layer(layer)
    if packed is None:
        raise NotFused("a tensor is of a dtype that the kernel does not load")
    return packed


def _coded_store(store: CodeStore) -> Coded:
    """All of a store's room."""
    scale = store._static_scale if store._scale is None else store._scale
    zero = store._static_zero if store._scale is None else store._zero
    return Coded(store._codes, scale, zero)


def _with_cache(
    fused: FusedDecoder, index: int, layer: QuantizedLayer, table: torch.Tensor | None, biases: Any
) -> DecoderLayer:
    scheme = layer.scheme
    return fused.plain[index]._replace(
        key_codes=_coded_store(layer.key_store),
        value_codes=_coded_store(layer.value_store),
        query_scale=layer.query_scale,
        biases=biases,
        rotation=table,
        window=fused.windows[index] or 0,
        rotate_key=scheme.rotate_key,
        rotate_value=scheme.rotate_value,
        is_key_dynamic=scheme.key is not None and scheme.key.dynamic,
        is_value_dynamic=scheme.value is not None and scheme.value.dynamic,
    )


class _Known(NamedTuple):
    """What was found out of a decoder, and of which modules."""

    sources: Sources
    fused: FusedDecoder | None
    refusal: str = ""


_FUSED: "WeakKeyDictionary[nn.Module, _Known]" = WeakKeyDictionary()
_FUSED_CACHES: "WeakKeyDictionary[QuantizedCache, FusedCache]" = WeakKeyDictionary()


def _known(base: nn.Module) -> _Known:
    decoder = stated_decoder(base)
    try:
        fused, refusal = FusedDecoder(base), ""
    except NotFused as reason:
        fused, refusal = None, str(reason)
    except AttributeError as error:  # another module in the place of a layer
        fused, refusal = None, f"the layers are not those that are stated ({first_line(error)})"
    parts = dict(base.named_children())  # what was packed on the way is of them
    layers, norm = parts.get(decoder.layers), parts.get(decoder.norm)
    return _Known(Sources([base, *layers.modules(), norm], fused is not None), fused, refusal)


def fused_decoder(base: nn.Module) -> FusedDecoder:
    """What is known of a decoder, worked out once and again when its modules have changed.

    Raises:
        NotFused: its layers cannot be run whole.
    """
    if not getattr(base, IS_ZOO, False):
        raise NotFused(f"the zoo states no anatomy of {type(base).__name__}")
    known = _FUSED.get(base)
    if known is None or not known.sources.are_same():
        known = _FUSED[base] = _known(base)
    refusal = known.refusal or known.sources.change()
    if refusal:
        raise NotFused(refusal)
    return known.fused


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
    slots, queries = torch.arange(total), torch.arange(past, total)[:, None]
    seen = (slots <= queries) & padding.bool()[:, None, None]
    windows = {window for window in fused.windows if window}
    if len(windows) > 1:
        raise NotFused("windows of several sizes beside padding")
    return seen, seen & (slots > queries - windows.pop()) if windows else None


def _room(cache: QuantizedCache, like: torch.Tensor, tokens: int) -> None:
    """Let every layer have room for `tokens` tokens in all.

    Raises:
        OctavoError: they do not fit, or are of another batch or of other heads than those that are stored.
    """
    for layer in cache.layers:
        if not layer.is_initialized:
            layer.lazy_initialization(like, like)
        for store in (layer.key_store, layer.value_store):
            codes = store._codes
            if codes is None or tokens - store.forgotten > codes.shape[2] or codes.shape[0] != like.shape[0]:
                store.allocate(like, tokens)


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
        given = self.ids if self.embeds is None else self.embeds
        self.batch, self.tokens = given.shape[:2]
        if given.device.type != "cpu" or self.tokens == 0:
            raise NotFused("no tokens are given, or not on the CPU")
        if self.fused.is_float and self.batch * self.tokens > FLOAT_TOKENS:
            raise NotFused(f"weights in float and more than {FLOAT_TOKENS} tokens at once")
        self.past = self.cache.get_seq_length()
        self.masks = _masks(arguments.get("attention_mask"), self.fused, self.batch, self.tokens, self.past)
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(self.past, self.past + self.tokens)[None]
        self.position_ids = positions

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
        with torch.no_grad():
            hidden = embedded.detach().to(torch.float32, copy=self.embeds is not None).contiguous()
            positions = self.position_ids.expand(self.batch, -1)
            rows, tables = self.fused.angles.tables(positions, int(positions.max()))
            call = DecoderPass(hidden, rows.contiguous(), None, *self.masks, self.past, *self.fused.last_norm())
            fused_cache = _FUSED_CACHES.get(self.cache)
            if fused_cache is None:
                fused_cache = _FUSED_CACHES[self.cache] = FusedCache(self.cache)
            if fused_cache.is_served:
                self._run_whole(call, fused_cache, tables)
            else:
                self._run_between(call, tables)
            output = hidden if hidden.dtype == embedded.dtype else hidden.to(embedded.dtype)
        if torch.is_grad_enabled() and embedded.requires_grad:
            output = refuse_gradient(output, embedded, "a decoder layer on codes")
        return output

    def _run_whole(self, call: DecoderPass, fused_cache: FusedCache, tables: list) -> None:
        fused, cache, total = self.fused, self.cache, self.past + self.tokens
        first = fused.plain[0]
        like = torch.empty((self.batch, first.kv_heads, 0, first.head_dim), dtype=self._dtype())
        _room(cache, like, total)
        biases = [layer_biases(attention, self.position_ids, total) for attention in fused.attentions]
        if any(of_layer.key is not None for of_layer in biases):
            if any(fused.windows):
                raise NotFused("biases of k in sliding layers")
            call = call._replace(bias_start=(self.position_ids[:, -1] - (total - 1)).expand(self.batch).contiguous())
        fused_cache.refresh(fused, cache, tables, biases)
        decoder_layers_cpu(call, fused_cache.packed, len(cache.layers))
        for layer in cache.layers:
            for store in (layer.key_store, layer.value_store):
                store.length = total
                if store.sliding is not None:
                    store.trim()

    def _dtype(self) -> torch.dtype:
        return self.base.get_submodule(self.fused.decoder.norm).weight.dtype

    def _run_between(self, call: DecoderPass, tables: list) -> None:
        """The kernel between attentions, which are those of the cache and of `quantized_attention`."""
        fused, cache, dtype = self.fused, self.cache, self._dtype()
        layers = [
            _packed(layer._replace(rotation=table)) for layer, table in zip(fused.plain, tables, strict=True)
        ]  # fmt: skip
        plain = fused.plain[0]
        q, kv = plain.heads * plain.head_dim, plain.kv_heads * plain.head_dim
        projected = torch.empty((self.batch, self.tokens, q + 2 * kv))
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
