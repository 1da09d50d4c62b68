"""What a decoder layer is to the op that runs it whole, and what a pass through all layers is.

B batch, T tokens of the pass, C hidden size, H query heads, G KV heads, D head_dim, N and K output and input channels.
`reference.py` says what they mean.
"""

from typing import NamedTuple

import torch

from ..attention.call import Coded
from ..shared.call_form import CallForm

SILU, GELU_TANH = 0, 1
"""Activations of an MLP."""


class LayerLinear(NamedTuple):
    """A linear of a layer, as its codes lie in memory. Without `codes` it is a part of the linear before it.

    Attributes:
        codes: panels of 16 output channels, uint8, as `ops/linear/packed.py` packs them for `bits` 8 and 4; or the
            weight itself, `[N, K]` in float32, bfloat16 or float16.
        scale, zero: `[N / 16, W, 16]`; None without codes of 8 or 4 bits, and a zero of None is 0.
        bias: float32 `[N]`, or None.
        quant_bias: int32 `[N]`, added to the sums of codes of static W8A8; None otherwise.
        input_scale, input_offset: float32 `[1]`, of inputs that are quantized by scales from calibration; None: by the
            largest value of each token and group.
        bits: 8, 4, or 0 of a weight in float, whose inputs stay in float.
        in_features, out_features: K and N.
        groups: W, those of a row of the weight, and of the input.
    """

    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    quant_bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_offset: torch.Tensor | None = None
    bits: int = 0
    in_features: int = 0
    out_features: int = 0
    groups: int = 1


class LayerLinears(NamedTuple):
    """The linears of a layer. Where one makes q, k and v, `query` holds it; where one makes gate and up, `gate`."""

    query: LayerLinear
    key: LayerLinear
    value: LayerLinear
    output: LayerLinear
    gate: LayerLinear
    up: LayerLinear
    down: LayerLinear


class LayerNorms(NamedTuple):
    """The RMSNorms of a layer, each the weight in any float dtype.

    Attributes:
        attention, mlp: `[C]`, before attention and before the MLP.
        attention_output, mlp_output: `[C]`, of what they add to the states; None where there is none.
        query, key: `[D]`, of each head before RoPE; None where there is none.
        offset: what is added to the weights.
        eps: what is added to the mean of squares.
    """

    attention: torch.Tensor
    mlp: torch.Tensor
    attention_output: torch.Tensor | None = None
    mlp_output: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    offset: float = 0.0
    eps: float = 1e-6


class LayerBiases(NamedTuple):
    """Biases of k and v that are no part of what is stored; `common/runtime/bias_fold.py` says why.

    Attributes:
        key: float32 `[G * D]`, those of rotary pairs in `columns`.
        columns: int64 `[E]`: columns of cos and then of sin of those pairs, d and D / 2 + d.
        table: float32 `[P, E]`, cos and sin by position.
        value: float32 `[G * D]`.
    """

    key: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    table: torch.Tensor | None = None
    value: torch.Tensor | None = None


class DecoderLayer(NamedTuple):
    """A decoder layer and its part of the cache.

    Attributes:
        norms, linears: see there.
        key_codes, value_codes: storage of all tokens that fit, `[B, G, capacity, D]`; see `Coded`.
        query_scale: as of an `AttentionCall`.
        biases: see there.
        rotation: float32 `[P, R]`, cos and then sin of the R / 2 rotary pairs by position; None without RoPE.
        heads, kv_heads, head_dim: H, G and D.
        scaling: of scores.
        residual_scale: by which what attention and MLP add is multiplied.
        window: tokens that a query sees; 0: all.
        activation: `SILU` or `GELU_TANH`.
        rotate_key, rotate_value: whether q and k, or v and the output, are rotated by a Hadamard matrix.
        is_key_dynamic, is_value_dynamic: whether scales are those of each token, which encoding works out.
    """

    norms: LayerNorms
    linears: LayerLinears
    key_codes: Coded
    value_codes: Coded
    query_scale: torch.Tensor | None
    biases: LayerBiases
    rotation: torch.Tensor | None
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    residual_scale: float = 1.0
    window: int = 0
    activation: int = SILU
    rotate_key: bool = False
    rotate_value: bool = False
    is_key_dynamic: bool = False
    is_value_dynamic: bool = False


class DecoderPass(NamedTuple):
    """What all layers of a pass share.

    Attributes:
        hidden: float32 `[B, T, C]`, dense: states before the first layer, and, when it is done, behind the last and the
            norm that follows it.
        positions: int64 `[B, T]`, rows of `rotation`.
        bias_start: int64 `[B]`: row of a table of biases that belongs to slot 0; None without such biases.
        mask: bool `[B or 1, 1, T, S]`, True where a query sees a slot; None: causality and the layer's window say it.
        windowed_mask: likewise of layers with a window.
        stored: tokens that came before this pass.
        norm: `[C]` in any float dtype, the weight of the norm behind the last layer.
        norm_offset, norm_eps: as in `LayerNorms`.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    bias_start: torch.Tensor | None
    mask: torch.Tensor | None
    windowed_mask: torch.Tensor | None
    stored: int
    norm: torch.Tensor | None = None
    norm_offset: float = 0.0
    norm_eps: float = 1e-6


DECODER_LAYER = CallForm(DecoderLayer)
DECODER_PASS = CallForm(DecoderPass)
