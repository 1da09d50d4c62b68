"""The modules and buffers in which a model holds a quantized checkpoint, as `ascend.py` names their tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import OctavoError
from ..decoder import Decoder, attention_modules, has_foldable_bias, stated_decoder, without_adapter
from ..linear_kinds import empty_linear
from ..linear_values import are_offsets, are_scales
from ..model_sizes import attention_sizes
from ..norm_bias import add_norm_bias
from ..quantized_embedding import QuantizedEmbedding, TiedLinear
from ..schemes.kv_scheme import Scheme
from ..schemes.linear_scheme import EMBEDDING, FP8_BLOCK, WEIGHT_ONLY
from ..static_scales import LayerScales, Scales
from ..statistics_checks import is_basis
from .ascend import C8_MODULES, DESCRIPTION_FILE, FA_PARTS, SCALAR_DTYPES, c8_place, is_c8, is_fa

MOST_VALUE = 2**24
"""No value of K or V is as large, and so none that a zero point stands for."""


class StaticScale(nn.Module):
    """`fa_q`, `fa_k` and `fa_v` of an attention module: one scale and one offset per head, `[heads, 1]`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty((heads, 1), dtype=torch.float32))
        self.register_buffer("offset", torch.empty((heads, 1), dtype=torch.int8))


class CacheConstants(nn.Module):
    """`octavo_cache` of an attention module: static scales, zeros, codebooks and bases of a layer, float32."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for part, shape in shapes.items():
            self.register_buffer(part, torch.empty(shape, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "CacheConstants":
        """They follow the model to another device, and stay what they are when it changes its dtype."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for part, tensor in before.items():
            if getattr(self, part).dtype != tensor.dtype:
                setattr(self, part, tensor.to(getattr(self, part).device))
        return self


def constant_shapes(scheme: Scheme, heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's `CacheConstants`: H query heads, G KV heads, D head_dim; empty where there are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, codec, count in (
        ("key", scheme.key, kv_heads),
        ("value", scheme.value, kv_heads),
        ("query", scheme.query, heads),
    ):
        if codec is None or not codec.is_calibrated:
            continue
        if not codec.dynamic:
            shape = {"tensor": (1, 1, 1), "head": (count, 1, 1), "channel": (count, 1, head_dim)}[codec.granularity]
            shapes[f"{part}_scale"] = shape
            if codec.has_zero:
                shapes[f"{part}_zero"] = shape
        if codec.levels == "calibrated":
            shapes[f"{part}_levels"] = (2**codec.bits,)
    if scheme.center_key:
        shapes["key_mean"] = (kv_heads, 1, head_dim)
    for part in ("key", "value"):
        if getattr(scheme, f"{part}_basis"):
            shapes[f"{part}_basis"] = (kv_heads, head_dim, head_dim)
    return shapes


def _named_module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise OctavoError(f"{DESCRIPTION_FILE} names {name}, which config.json gives the model no room for") from None


def _attach_embedding(model: nn.Module, name: str, embedding: nn.Module, layout: Mapping[str, Any]) -> None:
    """Put an embedding in int8 in the place of the float one, and of a last linear that is tied to it."""
    decoder = stated_decoder(model)
    outer = f"{model.base_model_prefix}.{decoder.embedding}"
    if name != outer or not isinstance(embedding, nn.Embedding):
        raise OctavoError(f"{DESCRIPTION_FILE}: {name} is labelled {EMBEDDING} and is not the embedding; convert again")
    count, width = embedding.num_embeddings, embedding.embedding_dim
    _, num_groups = layout.get("weight_scales", {}).get(name, (count, 1))
    if width % num_groups:
        raise OctavoError(f"{name}: {EMBEDDING} with {num_groups} scales for {width} channels; convert again")
    factor = None if decoder.embedding_scale is None else decoder.embedding_scale(model.config)
    layer = QuantizedEmbedding(count, width, num_groups, factor)
    layer.cpu_activations = layout.get("cpu_activations", "float")
    model.base_model.set_submodule(decoder.embedding, layer)
    if model.config.tie_word_embeddings:
        model.set_submodule(decoder.head, TiedLinear(layer))
        model._tied_weights_keys, model.all_tied_weights_keys = None, {}  # no tensor is shared, a module is


def _attach_linears(model: nn.Module, layout: Mapping[str, Any]) -> None:
    """Put quantized linear layers in the place of float ones."""
    scales, biases = layout.get("weight_scales", {}), set(layout.get("biases", ()))
    for name, label in layout.get("quantized_linears", {}).items():
        linear = _named_module(model, name)
        if label == EMBEDDING:
            _attach_embedding(model, name, linear, layout)
            continue
        if not isinstance(linear, nn.Linear):
            raise OctavoError(f"{DESCRIPTION_FILE}: {name} is labelled {label} and is no linear layer; convert again")
        out_features = linear.out_features
        in_features = linear.in_features + layout.get("extra_inputs", {}).get(name, 0)
        rows, num_groups = scales.get(name, (out_features, 1))
        has_groups = label in WEIGHT_ONLY or label == FP8_BLOCK
        if (not has_groups and num_groups > 1) or in_features % num_groups:
            raise OctavoError(
                f"{name}: {label} with {num_groups} scales for {in_features} input channels; convert again"
            )
        layer = empty_linear(
            label,
            in_features,
            out_features,
            linear.bias is not None or name in biases,
            num_groups=num_groups,
            per_tensor=rows == 1 < out_features,
            is_packed=name not in layout.get("unpacked", ()),
            deq_scale_dtype=SCALAR_DTYPES[layout.get("deq_scale", "F32")],
            cpu_activations=layout.get("cpu_activations", "float"),
        )
        if label in WEIGHT_ONLY:
            layer.adds_remainder = name == stated_decoder(model).head
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _attach_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Give float modules the biases that a checkpoint has and their architecture has not."""
    for name in names:
        module = _named_module(model, name)
        if getattr(module, "bias", None) is not None:
            continue
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(torch.empty_like(weight[:, 0]), requires_grad=False)
        elif weight is not None and weight.dim() == 1:
            add_norm_bias(module, torch.empty_like(weight))
        else:
            raise OctavoError(f"{DESCRIPTION_FILE} names a bias of {name}, which is no linear layer and no norm")


def _attach_c8(attention: nn.Module, channels: int, is_of_vllm: bool) -> None:
    """Give an attention module the buffers of scales of K and V per channel."""
    for part in C8_MODULES:
        for end in ("scale", "offset"):
            name, buffer = c8_place(part, end, is_of_vllm)
            if getattr(attention, name, None) is None:  # where one linear makes q, k and v, nothing has the name
                attention.add_module(name, nn.Module())
            attention.get_submodule(name).register_buffer(buffer, torch.empty(channels, dtype=torch.float32))


def _attach_scales(model: nn.Module, scheme: Scheme, is_of_vllm: bool) -> None:
    """Give attention modules the buffers of static scales."""
    heads, kv_heads, head_dim = attention_sizes(model.config)
    for _, attention in attention_modules(model):
        layer_scheme = scheme.of_layer(attention.layer_idx)
        if is_c8(layer_scheme):
            _attach_c8(attention, kv_heads * head_dim, is_of_vllm)
        elif is_fa(layer_scheme):
            attention.fa_q = StaticScale(heads)
            attention.fa_k, attention.fa_v = StaticScale(kv_heads), StaticScale(kv_heads)
        elif shapes := constant_shapes(layer_scheme, heads, kv_heads, head_dim):
            attention.octavo_cache = CacheConstants(shapes)


def attach_buffers(model: nn.Module, scheme: Scheme, layout: Mapping[str, Any]) -> None:
    """Give a float model the modules and buffers that hold a quantized checkpoint, empty.

    Args:
        model: a decoder as transformers builds it, changed in place.
        scheme: what attention and cache store; its static scales get buffers.
        layout: of the linear layers, see `linear_layout`; what it leaves out is as W8A8 has it.

    Raises:
        OctavoError: the layout names modules or shapes that the model has no room for.
    """
    _attach_linears(model, layout)
    _attach_biases(model, layout.get("biases", ()))
    _attach_scales(model, scheme, layout.get("is_of_vllm", False))


def _scale_and_zero(
    name: str, scale: torch.Tensor, offset: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scale and offset as `[heads, 1, D or 1]` float32; no zero where every offset is 0."""
    if not are_scales(scale):
        raise OctavoError(f"checkpoint: {name} holds a scale that is not a positive number; convert the model again")
    if not are_offsets(offset):
        raise OctavoError(
            f"checkpoint: {name} holds an offset that is no whole number from -128 to 127; convert the model again"
        )
    zero = offset.float().view(heads, 1, -1) if bool((offset != 0).any()) else None
    return scale.float().view(heads, 1, -1), zero


def _read_c8(name: str, attention: nn.Module, part: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero per channel of K or V, of whichever name."""
    places = (c8_place(part, end, hasattr(attention, "attn")) for end in ("scale", "offset"))
    scale, offset = (getattr(without_adapter(attention.get_submodule(module)), buffer) for module, buffer in places)
    return _scale_and_zero(f"{name}.{part}", scale, offset, scale.numel() // attention.head_dim)


def read_scales(attentions: Iterable[tuple[str, nn.Module]], scheme: Scheme, decoder: Decoder) -> Scales:
    """The static scales out of the buffers that `attach_buffers` made and a checkpoint filled.

    Args:
        attentions: names and modules, as `attention_modules` gives them.
        scheme: of the model.
        decoder: what the modules are.
    """
    result = []
    for name, attention in attentions:
        layer_scheme = scheme.of_layer(attention.layer_idx)
        if is_c8(layer_scheme):
            result.append(LayerScales(*(_read_c8(name, attention, part) for part in C8_MODULES)))
        elif is_fa(layer_scheme):
            stored = {part: getattr(attention, f"fa_{part}") for part in FA_PARTS}
            q, k, v = (
                _scale_and_zero(f"{name}.fa_{part}", m.scale, m.offset, m.scale.shape[0]) for part, m in stored.items()
            )
            if q[1] is not None:
                raise OctavoError(f"checkpoint: {name}.fa_q has an offset, which int8 attention does not serve")
            result.append(LayerScales(k, v, q[0]))
        else:
            folds = layer_scheme.fold_bias and has_foldable_bias(decoder, attention)
            result.append(_read_constants(name, attention, folds))
    return result


def _read_constants(name: str, attention: nn.Module, is_folded: bool) -> LayerScales:
    """The scales of a layer out of its `CacheConstants`, if it has any; see `LayerScales` of `is_folded`."""
    if not hasattr(attention, "octavo_cache"):
        return LayerScales()
    found = dict(attention.octavo_cache.named_buffers())
    for part, tensor in found.items():
        if not (are_scales(tensor) if part.endswith("scale") else torch.isfinite(tensor).all()):
            raise OctavoError(f"checkpoint: {name}.octavo_cache.{part} is no positive number; convert the model again")
        if part.endswith("basis") and not is_basis(tensor):
            raise OctavoError(f"checkpoint: {name}.octavo_cache.{part} cannot be undone; convert the model again")
        if part.endswith("levels") and not (tensor.diff() >= 0).all():
            raise OctavoError(f"checkpoint: {name}.octavo_cache.{part} do not ascend; convert the model again")
        if part.endswith("zero") and bool((tensor.abs() * found[part.replace("zero", "scale")] > MOST_VALUE).any()):
            raise OctavoError(f"checkpoint: {name}.octavo_cache.{part} is out of all range; convert the model again")
    key, value = (
        (found[f"{part}_scale"], found.get(f"{part}_zero")) if f"{part}_scale" in found else None
        for part in ("key", "value")
    )
    return LayerScales(
        key, value, found.get("query_scale"), found.get("key_levels"), found.get("value_levels"), is_folded,
        found.get("key_mean"), found.get("key_basis"), found.get("value_basis"),
    )  # fmt: skip
