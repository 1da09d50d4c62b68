"""A decoder layer in PyTorch, composed of the references of the other ops: what `decoder.c` computes.

B batch, T tokens of the pass, S stored tokens with them, H query heads, G KV heads, D head_dim, E columns of biases.
"""

import torch
from torch.nn import functional

from ..attention.call import AttentionCall, Coded, PositionScores, Visibility
from ..attention.reference import attention_reference
from ..codec.reference import encode_reference, encode_token_reference
from ..linear.packed import Packed, unpack
from ..linear.packed_cpu import linear_packed_reference
from ..linear.reference import linear_w8a8_reference
from .call import GELU_TANH, DecoderLayer, DecoderPass, LayerLinear, LayerNorms


def layer_linear_reference(x: torch.Tensor, linear: LayerLinear) -> torch.Tensor:
    """A linear of a layer: float32 `[..., K] -> [..., N]`."""
    if not linear.bits:
        return functional.linear(x, linear.codes.float(), linear.bias)
    packed = Packed(
        linear.codes, linear.scale, linear.zero, linear.bits, linear.out_features, linear.in_features
    )  # fmt: skip
    if linear.input_scale is None:
        return linear_packed_reference(x, packed, linear.bias)
    codes, scale, _ = unpack(packed)
    return linear_w8a8_reference(
        x, codes, linear.input_scale, linear.input_offset, linear.quant_bias, scale.view(-1)
    )  # fmt: skip


def _norm(x: torch.Tensor, weight: torch.Tensor | None, norms: LayerNorms) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` along the last dimension; x itself without a weight."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norms.eps) * (norms.offset + weight.float())


def _rotated(x: torch.Tensor, table: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    """`[B, *, T, D]` turned by RoPE: channel d with d + R / 2 of the first R."""
    if table is None:
        return x
    cos, sin = table[positions][:, None].chunk(2, dim=-1)
    turned = table.shape[1]
    first, second = x[..., :turned].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., turned:]), dim=-1)


def _hadamard_product(x: torch.Tensor) -> torch.Tensor:
    """Times the orthonormal Hadamard matrix of the largest power of two that divides D, block by block."""
    block = x.shape[-1] & -x.shape[-1]
    matrix = torch.ones((1, 1))
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return (x.unflatten(-1, (-1, block)) @ (matrix / block**0.5)).flatten(-2)


def _side_by_side(x: torch.Tensor, linears: tuple[LayerLinear, ...]) -> torch.Tensor:
    return torch.cat([layer_linear_reference(x, linear) for linear in linears if linear.codes is not None], dim=-1)


def _stored(side: Coded, values: torch.Tensor, at: int, is_dynamic: bool) -> Coded:
    """K or V with new tokens `[B, G, T, D]` encoded from row `at` on, as it is attended to."""
    stop = at + values.shape[2]
    codes = side.codes[:, :, at:stop]
    if side.scale is None:
        codes.copy_(values)
        return Coded(side.codes[:, :, :stop])
    if not is_dynamic:
        encode_reference(values, side.scale, side.zero, codes)
        return side._replace(codes=side.codes[:, :, :stop])
    parts = [None if part is None else part[:, :, at:stop] for part in (side.scale, side.zero)]
    encode_token_reference(values, codes, *parts)
    scale, zero = (None if part is None else part[:, :, :stop] for part in (side.scale, side.zero))
    return side._replace(codes=side.codes[:, :, :stop], scale=scale, zero=zero)


def _position_scores(call: DecoderPass, layer: DecoderLayer, query: torch.Tensor) -> PositionScores:
    """What the folded bias of k adds: with q of head h and b of its KV head, by rotary pair (d, d + D / 2),
    `q1 b1 + q2 b2` times the cos of the position and `q2 b1 - q1 b2` times its sin."""
    biases = layer.biases
    if biases.key is None:
        return PositionScores()
    bias = biases.key.view(layer.kv_heads, 1, -1).repeat_interleave(layer.heads // layer.kv_heads, dim=0)
    (q1, q2), (b1, b2) = query.chunk(2, dim=-1), bias.chunk(2, dim=-1)
    both = torch.cat((q1 * b1 + q2 * b2, q2 * b1 - q1 * b2), dim=-1)
    return PositionScores(both[..., biases.columns], biases.table, call.bias_start)


def _attended(call: DecoderPass, layer: DecoderLayer, projected: torch.Tensor, first: int) -> torch.Tensor:
    """Attention of q, k and v side by side, `[B, T, (H + 2 G) D]`, to all that is stored then: `[B, T, H, D]`."""
    heads = projected.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    query, key, value = heads.split((layer.heads, layer.kv_heads, layer.kv_heads), dim=1)
    query, key = _norm(query, layer.norms.query, layer.norms), _norm(key, layer.norms.key, layer.norms)
    query, key = (_rotated(part, layer.rotation, call.positions) for part in (query, key))
    position = _position_scores(call, layer, query)
    if layer.rotate_key:
        query, key = _hadamard_product(query), _hadamard_product(key)
    value = _hadamard_product(value) if layer.rotate_value else value
    at = call.stored - first
    keys = _stored(layer.key_codes, key, at, layer.is_key_dynamic)
    values = _stored(layer.value_codes, value, at, layer.is_value_dynamic)
    mask = call.windowed_mask if layer.window else call.mask
    visibility = Visibility(None if mask is None else mask[..., first:], True, None, layer.window)
    output = attention_reference(
        AttentionCall(query, keys, values, layer.scaling, layer.query_scale, visibility, position)
    )  # fmt: skip
    output = _hadamard_product(output) if layer.rotate_value else output
    if layer.biases.value is None:
        return output
    bias = layer.biases.value.view(layer.kv_heads, -1).repeat_interleave(layer.heads // layer.kv_heads, dim=0)
    return output + bias


def decoder_layer_reference(call: DecoderPass, layer: DecoderLayer, first: int = 0) -> torch.Tensor:
    """The states behind a layer; the tokens of the pass are encoded into its storage.

    Args:
        call: the pass; its `hidden` is left as it is.
        layer: the layer.
        first: tokens that its storage has forgotten.

    Returns:
        float32 `[B, T, C]`.
    """
    norms, linears, states = layer.norms, layer.linears, call.hidden
    projected = _side_by_side(_norm(states, norms.attention, norms), linears[:3])
    output = layer_linear_reference(_attended(call, layer, projected, first).flatten(2), linears.output)
    states = states + _norm(output, norms.attention_output, norms) * layer.residual_scale
    gate, up = _side_by_side(_norm(states, norms.mlp, norms), (linears.gate, linears.up)).chunk(2, dim=-1)
    gate = functional.gelu(gate, approximate="tanh") if layer.activation == GELU_TANH else functional.silu(gate)
    return (
        states + _norm(layer_linear_reference(gate * up, linears.down), norms.mlp_output, norms) * layer.residual_scale
    )
