"""The layers of a decoder as the op that runs them whole takes them: `ops/decoder/call.py`.

Only what a zoo's statement says is read, and what cannot be said in those terms is named: such a model, or such a
cache, goes module by module.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from ...ops.attention.call import Coded
from ...ops.decoder.call import (
    GELU_TANH,
    SILU,
    DecoderLayer,
    LayerBiases,
    LayerLinear,
    LayerLinears,
    LayerNorms,
)
from ...ops.linear.arguments import LARGEST_IN_FEATURES
from ...ops.shared.operands import FLOAT_KINDS
from .cache.views import FOLD
from .decoder import Decoder
from .foldable_linear import FoldableLinear
from .model_sizes import kv_heads_of
from .quantized_linear import QuantizedLinear

_NO_LINEAR = LayerLinear()


class NotFused(Exception):
    """Why layers go module by module; a phrase without a full stop."""


def _activation(name: Any) -> int:
    """The number of an activation that a config names, by what it computes.

    Raises:
        NotFused: it is none of those that the op has.
    """
    x = torch.linspace(-4, 4, 17)
    found = ACT2FN[name](x)
    for number, known in ((SILU, functional.silu(x)), (GELU_TANH, functional.gelu(x, approximate="tanh"))):
        if torch.allclose(found, known, atol=1e-6):
            return number
    raise NotFused(f"the activation {name} is neither SiLU nor GELU by tanh")


def _float_linear(name: str, module: nn.Linear) -> LayerLinear:
    weight = module.weight.detach()
    bias = module._added_bias() if isinstance(module, FoldableLinear) else module.bias
    if weight.dtype not in FLOAT_KINDS or not weight.is_contiguous():
        raise NotFused(f"{name} is a matrix {tuple(weight.shape)} of {weight.dtype}")
    bias = None if bias is None else bias.detach().float()
    return LayerLinear(weight, bias=bias, in_features=weight.shape[1], out_features=weight.shape[0])


def layer_linear(name: str, module: nn.Module) -> LayerLinear:
    """A linear as the op takes it.

    Raises:
        NotFused: it cannot.
    """
    if type(module) in (nn.Linear, FoldableLinear):
        return _float_linear(name, module)
    packed = module.packed() if isinstance(module, QuantizedLinear) else None
    if hasattr(module, "base_layer"):
        raise NotFused(f"{name} has an adapter")
    if packed is None:
        raise NotFused(f"{name} is a {type(module).__name__}")
    if packed.x_group * packed.groups != packed.in_features:
        raise NotFused(f"{name} quantizes groups of {packed.x_group} input channels and its weight others")
    if packed.x_group > LARGEST_IN_FEATURES:
        raise NotFused(f"{name} has groups of more than {LARGEST_IN_FEATURES} input channels")
    return LayerLinear(
        packed.codes, packed.scale, packed.zero, packed.bias, packed.quant_bias, packed.input_scale,
        packed.input_offset, packed.bits, packed.in_features, packed.out_features, packed.groups,
    )  # fmt: skip


def _input_form(linear: LayerLinear) -> tuple:
    """Linears of one input share its codes if these are equal."""
    scales = [None if part is None else float(part) for part in (linear.input_scale, linear.input_offset)]
    return (linear.in_features, linear.groups, *scales)


def _linears(layer: nn.Module, decoder: Decoder) -> LayerLinears:
    def of(names: tuple[str, ...]) -> list[LayerLinear]:
        found = [layer_linear(name, layer.get_submodule(name)) for name in dict.fromkeys(names)]
        coded = [linear for linear in found if linear.bits]
        if len({_input_form(linear) for linear in coded}) > 1 or (coded and not found[0].bits):
            raise NotFused(f"{names[0]} and its neighbours quantize their input differently")
        return found + [_NO_LINEAR] * (len(names) - len(found))

    attention, mlp = decoder.attention, decoder.mlp
    query, key, value = of((attention.query, attention.key, attention.value))
    (output,), (gate, up), (down,) = of((attention.output,)), of((mlp.gate, mlp.up)), of((mlp.down,))
    return LayerLinears(query, key, value, output, gate, up, down)


def norm_eps(norm: nn.Module) -> float:
    """What a norm adds to the mean of squares.

    Raises:
        NotFused: it says it by no name that is known.
    """
    found = [getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)]
    if not found:
        raise NotFused(f"{type(norm).__name__} has no epsilon by a name that is known")
    return float(found[0])


def _norms(layer: nn.Module, decoder: Decoder) -> LayerNorms:
    attention = decoder.attention
    outputs = (*decoder.output_norms, None, None)[:2]
    names = (decoder.attention_norm, decoder.mlp_norm, *outputs, attention.query_norm, attention.key_norm)
    modules = [None if name is None else layer.get_submodule(name) for name in names]
    present = [module for module in modules if module is not None]
    weights = [None if module is None else module.weight.detach() for module in modules]
    if len({norm_eps(module) for module in present}) > 1:
        raise NotFused("norms of a layer differ in their epsilon")
    if any(weight is not None and weight.dtype not in FLOAT_KINDS for weight in weights):
        raise NotFused("a norm is neither in float32, bfloat16 nor float16")
    if any(getattr(module, "bias", None) is not None for module in present):
        raise NotFused("a norm has a bias")
    return LayerNorms(*weights, decoder.norm_offset, norm_eps(present[0]))


def _check_sizes(norms: LayerNorms, linears: LayerLinears, head_dim: int) -> None:
    """Raise `NotFused` unless what one part of a layer makes is as wide as what the next one reads."""
    hidden = linears.output.out_features
    widths = {linears.query.in_features, linears.gate.in_features, linears.down.out_features, hidden}
    of_heads, others = (norms.query, norms.key), norms[:4]
    if len(widths) > 1 or any(weight is not None and weight.numel() != hidden for weight in others):
        raise NotFused("linears or norms of a layer differ in the hidden size")
    if any(weight is not None and weight.numel() != head_dim for weight in of_heads):
        raise NotFused("a norm of heads is not of one head")


def plain_layer(layer: nn.Module, decoder: Decoder, config: Any) -> DecoderLayer:
    """A layer without angles, biases that are folded, and a part of the cache.

    Raises:
        NotFused: it cannot be said in the op's terms.
    """
    attention = layer.get_submodule(decoder.attention.name)
    head_dim, kv_heads, linears = attention.head_dim, kv_heads_of(config), _linears(layer, decoder)
    heads, inner = linears.output.in_features // head_dim, linears.down.in_features
    if sum(linear.out_features for linear in linears[:3]) != (heads + 2 * kv_heads) * head_dim:
        raise NotFused("q, k and v are of other sizes than the heads")
    if linears.gate.out_features + linears.up.out_features != 2 * inner:
        raise NotFused("gate and up are of other sizes than down")
    norms = _norms(layer, decoder)
    _check_sizes(norms, linears, head_dim)
    factor = 1.0 if decoder.residual_scale is None else decoder.residual_scale(config)
    activation = _activation(getattr(config, decoder.activation))
    return DecoderLayer(
        norms, linears, Coded(_NOTHING), Coded(_NOTHING), None, LayerBiases(), None, heads, kv_heads,
        head_dim, float(attention.scaling), factor, 0, activation,
    )  # fmt: skip


_NOTHING = torch.empty((1, 1, 1, 1))
"""Storage of a layer that has no part in the cache."""


def layer_biases(attention: nn.Module, position_ids: torch.Tensor, tokens: int) -> LayerBiases:
    """The folded biases of a layer, for a pass after which so many tokens are stored.

    Raises:
        OctavoError: positions do not follow one another.
    """
    fold = getattr(attention, FOLD, None)
    return LayerBiases() if fold is None else LayerBiases(*fold.key_terms(position_ids, tokens), fold.value_bias())
