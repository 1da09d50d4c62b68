"""Exact folds: biases of k and v that are left out of the cache and come back inside attention.

Qwen2's k_proj.bias reaches 200 on single channels, next to which a scale per token or head loses everything else. With
R_n the rotation of position n, `q . R_n (W x + b) = q . R_n W x + q . R_n b`: the cache holds `R_n W x`, and the second
term, a sum over rotary pairs of `cos_n (q1 b1 + q2 b2) + sin_n (q2 b1 - q1 b2)`, enters the scores by position. Pairs
whose bias is no larger than the key without it stay as they are: they would cost time and gain nothing.
Weights of attention sum to 1, so that the bias of v is added once to the output.

B batch, Q query tokens, H query heads, G KV heads, D head_dim, P positions.
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...ops.shared.registry import NAMESPACE
from ..errors import OctavoError, first_line
from .attention import register_attention
from .cache.views import FOLD, PositionTerms
from .checkpoint.ascend import attention_modules
from .quantized_linear import FoldableLinear, QuantizedLinear
from .schemes.kv_scheme import Scheme

STEADY_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles do not change as a sequence grows."""
SMALLEST_TABLE = 2048
PADDING_POSITION = 1
"""Largest position that padding on the left is given."""


class RotaryTable:
    """cos and sin of a model's own rotary embedding for all positions up to one, made once for all layers."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._rows: torch.Tensor | None = None
        self._checked: torch.Tensor | None = None
        self._needed = 0

    def rows(self, length: int, device: torch.device) -> torch.Tensor:
        """`[P, D]` float32 with P at least `length`: cos of the D / 2 rotary pairs and then their sin."""
        if self._rows is None or self._rows.shape[0] < length or self._rows.device != device:
            size = max(SMALLEST_TABLE, 1 << (length - 1).bit_length())
            with torch.inference_mode(False), torch.no_grad():  # it outlives this pass, and may be read by another mode
                positions = torch.arange(size, device=device)[None]
                cos, sin = self._rotary(torch.zeros(1, dtype=torch.float32, device=device), positions)
                half = cos.shape[-1] // 2
                self._rows = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).contiguous()
        return self._rows

    def length_for(self, position_ids: torch.Tensor, tokens: int) -> int:
        """Rows that a pass needs, asked for by every layer and worked out by the first.

        Raises:
            OctavoError: positions do not follow one another, so that they do not tell those of the stored tokens.
        """
        if position_ids is not self._checked and not torch.compiler.is_compiling():
            last = position_ids[:, -1:]
            expected = last - torch.arange(position_ids.shape[1] - 1, -1, -1, device=position_ids.device)
            is_padding = (expected < 0) & (position_ids <= PADDING_POSITION)
            if bool(((position_ids != expected) & ~is_padding).any()):
                raise OctavoError(
                    "position_ids do not follow one another, as with packed sequences, which folded biases do not "
                    "serve; give sequences one by one, or a scheme with fold_bias=False"
                )
            self._checked, self._needed = position_ids, int(last.max()) + 1
        return max(self._needed, tokens)


def large_key_bias(linear: nn.Module, norm: nn.Module | None, width: int) -> torch.Tensor:
    """The bias of a k_proj `[N]` in those rotary pairs where it exceeds the usual size of the key, and 0 elsewhere.

    That size is what the weights make of an input of unit variance, times the weights of the norm before it: the root
    mean square over the channels of `sqrt(sum_j (W_dj g_j)^2)`. What a pair of one KV head needs, all heads leave out.

    Args:
        linear: k_proj, float or quantized.
        norm: RMSNorm before it; None, or one that is elsewhere just now, counts as ones.
        width: D.
    """
    bias = linear.bias.detach().float().view(-1, 2, width // 2)
    weight = linear.float_weight() if isinstance(linear, QuantizedLinear) else linear.weight.detach().float()
    gains = getattr(norm, "weight", None)
    if gains is not None and not gains.is_meta:
        weight = weight * gains.detach().float()
    usual = weight.square().sum(dim=1).mean().sqrt()
    is_large = (bias.square().sum(dim=1) > usual.square()).any(dim=0)
    return (bias * is_large).reshape(-1).to(linear.bias.dtype)


class BiasFold:
    """The folded biases of one attention module."""

    def __init__(self, attention: nn.Module, table: RotaryTable | None, has_value: bool) -> None:
        self._key = attention.k_proj if table is not None else None
        self._value = attention.v_proj if has_value else None
        self._width = attention.head_dim
        self._table = table
        self._bias: torch.Tensor | None = None  # what self._columns and self._rows are for
        self._columns: torch.Tensor | None = None
        self._rows: tuple[torch.Tensor | None, torch.Tensor | None] = None, None

    def _chosen_columns(self) -> torch.Tensor:
        """Columns of a table of cos and sin that belong to pairs whose bias is left out."""
        if self._bias is not self._key.left_out:
            self._bias = self._key.left_out
            with torch.inference_mode(False):
                pairs = self._bias.view(-1, 2, self._width // 2).ne(0).any(dim=1).any(dim=0).nonzero()[:, 0]
                self._columns, self._rows = torch.cat((pairs, pairs + self._width // 2)), (None, None)
        return self._columns

    def terms(
        self, query: torch.Tensor, position_ids: torch.Tensor | None, tokens: int, length: torch.Tensor | None
    ) -> PositionTerms | None:
        """What the bias of k adds to the scores; None where it adds nothing.

        Args:
            query: `[B, H, Q, D]` after RoPE.
            position_ids: int64 `[B or 1, Q]`, those of the queries.
            tokens: stored tokens, this pass's included, or the size of storage where `length` says how many.
            length: int64 `[1]`, or None.

        Raises:
            OctavoError: positions are missing, or do not follow one another.
        """
        if self._key is None or not len(columns := self._chosen_columns()):
            return None
        if position_ids is None:
            raise OctavoError("attention is given no position_ids, which folded biases need; use fold_bias=False")
        table = self._table.rows(self._table.length_for(position_ids, tokens), query.device)
        if self._rows[0] is not table:
            with torch.inference_mode(False):
                self._rows = table, table[:, columns].contiguous()
        bias = (
            self._bias.float()
            .view(-1, self._width)
            .repeat_interleave(query.shape[1] * self._width // len(self._bias), 0)
        )
        (q1, q2), (b1, b2) = query.float().chunk(2, dim=-1), bias[:, None].chunk(2, dim=-1)
        both = torch.cat((q1 * b1 + q2 * b2, q2 * b1 - q1 * b2), dim=-1)
        newest = tokens if length is None else length
        return PositionTerms(both[..., columns], self._rows[1], position_ids[:, -1] - (newest - 1))

    def with_value_bias(self, output: torch.Tensor) -> torch.Tensor:
        """Attention's `[B, Q, H, D]` with the bias of v added."""
        if self._value is None:
            return output
        bias = self._value.left_out.to(output.dtype).view(-1, self._width)
        return output + bias.repeat_interleave(output.shape[2] // bias.shape[0], dim=0)


def _is_foldable(linear: nn.Module) -> bool:
    is_known = type(linear) is nn.Linear or isinstance(linear, QuantizedLinear)
    return is_known and linear.bias is not None


def _leave_bias(linear: nn.Module, choose: Callable[[nn.Module], torch.Tensor] | None) -> None:
    if type(linear) is nn.Linear:
        linear.__class__ = FoldableLinear
    linear.fold_bias(choose)


def _refuse_other_attention(decoder: nn.Module, *_: Any) -> None:
    if decoder.config._attn_implementation != NAMESPACE:
        raise OctavoError(
            f"attn_implementation {decoder.config._attn_implementation!r} knows nothing of the biases that are folded "
            f"in this model; call set_attn_implementation({NAMESPACE!r}), or load the model anew"
        )


def norm_before(model: nn.Module, attention: str) -> nn.Module | None:
    """The norm whose output goes into an attention module, by the module's name."""
    return getattr(model.get_submodule(attention.rpartition(".")[0]), "input_layernorm", None)


def folds_key_bias(model: nn.Module) -> bool:
    """Whether K is the rotation of `W x + b`, by angles that stay, so that a bias of k can be folded.

    Not where angles change with the length (dynamic scaling, LongRoPE), and not where k is normed behind k_proj.
    """
    decoder = model.base_model
    parameters = getattr(decoder.config, "rope_parameters", None) or {}
    if parameters.get("rope_type", "default") not in STEADY_ROPE_TYPES or not hasattr(decoder, "rotary_emb"):
        return False
    return not any(
        "norm" in name for _, attention in attention_modules(model) for name, _ in attention.named_children()
    )


def _turns_halves(model: nn.Module) -> bool:
    """Whether a model's own RoPE turns channel d with d + D / 2, all of them, as `folds.py` takes it to."""
    attention = attention_modules(model)[0][1]
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    x = torch.arange(1.0, attention.head_dim + 1, device=model.device).view(1, 1, 1, -1)
    try:
        cos, sin = model.base_model.rotary_emb(x[0], torch.tensor([[3]], device=model.device))
        found = rotate(x, x, cos, sin)[1]
    except (TypeError, RuntimeError, AttributeError):
        return False
    (first, second), half = x.chunk(2, dim=-1), cos.shape[-1] // 2
    c, s = cos[..., :half], sin[..., :half]
    if 2 * c.shape[-1] != x.shape[-1]:
        return False
    return torch.allclose(found, torch.cat((first * c - second * s, second * c + first * s), dim=-1), atol=1e-4)


def fold_biases(model: nn.Module, scheme: Scheme | None = None, has_keys: bool = True) -> int:
    """Fold the biases of k and v of a decoder that has any, in place; return how many there were.

    Those of k stay where `folds_key_bias` says so, or without `has_keys`. With `scheme`, only layers are folded in
    which it says `fold_bias`.

    Raises:
        OctavoError: another library has put its own forward in the place of a projection's.
    """
    decoder = model.base_model
    table = RotaryTable(decoder.rotary_emb) if has_keys and folds_key_bias(model) else None
    count = 0
    for name, attention in attention_modules(model):
        has_key, has_value = table is not None and _is_foldable(attention.k_proj), _is_foldable(attention.v_proj)
        is_wanted = scheme is None or scheme.of_layer(attention.layer_idx).fold_bias
        if hasattr(attention, FOLD) or not (is_wanted and (has_key or has_value)):
            continue
        setattr(attention, FOLD, BiasFold(attention, table if has_key else None, has_value))
        key_part = partial(large_key_bias, norm=norm_before(model, name), width=attention.head_dim)
        for linear, is_folded in ((attention.k_proj, has_key), (attention.v_proj, has_value)):
            if is_folded and "forward" in vars(linear):
                raise OctavoError(
                    f"{name}: another library wraps the forward of a projection whose bias is to be folded; call "
                    "prepare before (of a model with device_map, that is not possible: use set_attn_implementation)"
                )
            if is_folded:
                _leave_bias(linear, key_part if linear is attention.k_proj else None)
                count += 1
    if count:
        decoder.register_forward_pre_hook(_refuse_other_attention)
    return count


def _bias_left_in(model: nn.Module) -> str | None:
    """The first projection whose bias goes into the cache, by name; None if there is none."""
    attentions = attention_modules(model)
    for name, attention in attentions:
        for part in ("k_proj", "v_proj"):
            linear = getattr(attention, part)
            if getattr(linear, "bias", None) is not None and not getattr(linear, "folds_bias", False):
                return f"{name}.{part}"
    if attentions:
        return None
    fused = [f"{name}.{child}" for name, module in model.named_modules() if hasattr(module, "layer_idx")
             for child, linear in module.named_children() if getattr(linear, "bias", None) is not None
             and "norm" not in child]  # fmt: skip
    return next(iter(fused), None)


def prepare(model: nn.Module) -> nn.Module:
    """Make a stock model of transformers ready for a `QuantizedCache`: its attention reads codes, biases are folded.

    A bias of k or v that cannot be folded stays in the cache, and a warning says so; so does that of a projection
    which makes q, k and v in one.

    Raises:
        OctavoError: the model's attention is its own and not transformers' `AttentionInterface`; see `fold_biases`.
    """
    register_attention()
    try:
        model.set_attn_implementation(NAMESPACE)
    except (ValueError, AttributeError) as error:
        raise OctavoError(f"{type(model).__name__} is not served: {first_line(error)}") from None
    decoder = model.base_model
    if decoder.config.get_text_config(decoder=True)._attn_implementation != NAMESPACE:
        raise OctavoError(
            f"{type(model).__name__} is not served: its attention is its own code and not that of transformers' "
            "AttentionInterface, so that it cannot read codes"
        )
    if attention_modules(model):
        fold_biases(model, has_keys=_turns_halves(model))
    left = _bias_left_in(model)
    if left is not None:
        kind = type(model.get_submodule(left)).__name__
        warnings.warn(
            f"{left}: the bias of a {kind} stays in the cache, where it may cost much; "
            "schemes whose K is per channel, as octavo-8 and octavo-4, bear it best",
            stacklevel=2,
        )
    return model
