"""Exact folds: biases of k and v that are left out of the cache and come back inside attention.

Qwen2's bias of k reaches 200 on single channels, next to which a scale per token or head loses everything else. With
R_n the rotation of position n, `q . R_n (W x + b) = q . R_n W x + q . R_n b`: the cache holds `R_n W x`, and the second
term, a sum over rotary pairs of `cos_n (q1 b1 + q2 b2) + sin_n (q2 b1 - q1 b2)`, enters the scores by position. Pairs
whose bias is no larger than the key without it stay as they are: they would cost time and gain nothing.
Weights of attention sum to 1, so that the bias of v is added once to the output.

B batch, Q query tokens, H query heads, G KV heads, D head_dim, P positions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...ops.attention.call import PositionScores
from ...ops.shared.registry import NAMESPACE
from ..errors import OctavoError
from .cache.views import FOLD
from .decoder import Decoder, attention_modules, decoder_layers, linear_of, stated_decoder
from .foldable_linear import FoldableLinear, changes_of
from .key_center import pair_products
from .quantized_linear import QuantizedLinear
from .rotary import is_rotated, partial_rotary_factor, positions_made_for, turned
from .schemes.kv_scheme import Scheme
from .sharding.ranks import Ranks

STEADY_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles do not change as a sequence grows."""
MOST_ANGLE_ERROR = 0.02
"""Largest difference of cos or sin between the angles of a model and those of its config, which float32 rounds."""
PADDING_POSITION = 1
"""Largest position that padding on the left is given."""


class RotaryTable:
    """cos and sin of a model's own rotary embedding for all positions up to one, made once for all layers.

    Args:
        rotary: the embedding.
        kind: what it is told beside positions, a type of layers or nothing.
    """

    def __init__(self, rotary: nn.Module, *kind: str) -> None:
        self._rotary, self._kind = rotary, kind
        self._rows: dict[torch.device, torch.Tensor] = {}
        self._checked: torch.Tensor | None = None
        self._needed = 0

    def rows(self, length: int, device: torch.device) -> torch.Tensor:
        """`[P, D]` float32 with P at least `length`: cos of the D / 2 rotary pairs and then their sin."""
        rows = self._rows.get(device)  # layers may lie on several
        if rows is None or rows.shape[0] < length:
            with torch.inference_mode(False), torch.no_grad():  # it outlives this pass, and may be read by another mode
                positions = torch.arange(positions_made_for(length), device=device)[None]
                cos, sin = self._rotary(torch.zeros(1, dtype=torch.float32, device=device), positions, *self._kind)
                half = cos.shape[-1] // 2
                rows = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).contiguous().to(device)
                self._rows[device] = rows
        return rows

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


def large_key_bias(
    linear: nn.Module, norm: nn.Module | None, head_dim: int, norm_offset: float = 0.0, ranks: Ranks | None = None
) -> torch.Tensor:
    """The bias of k `[N]` in those rotary pairs where it exceeds the usual size of the key, and 0 elsewhere.

    That size is what the weights make of an input of unit variance, times the weights of the norm before it: the root
    mean square over the channels of `sqrt(sum_j (W_dj g_j)^2)`. What a pair of one KV head needs, all heads leave out.

    Args:
        linear: the projection of k, float or quantized.
        norm: RMSNorm before it; None, or one that is elsewhere just now, counts as ones.
        head_dim: D.
        norm_offset: what the norm adds to its weight.
        ranks: those that share the heads, if any, which decide as one.
    """
    bias = linear.bias.detach().float().view(-1, 2, head_dim // 2)
    weight = linear.float_weight() if isinstance(linear, QuantizedLinear) else linear.weight.detach().float()
    gains = getattr(norm, "weight", None)
    if gains is not None and not gains.is_meta:
        weight = weight * (gains.detach().float() + norm_offset)
    usual = weight.square().sum(dim=1).mean()
    if ranks is not None:
        usual = ranks.sum(usual) / ranks.size
    is_large = (bias.square().sum(dim=1) > usual.sqrt().square()).any(dim=0)
    if ranks is not None:
        is_large = ranks.largest(is_large.to(torch.uint8)).bool()
    return (bias * is_large).reshape(-1).to(linear.bias.dtype)


class BiasFold:
    """The folded biases of one attention module.

    Args:
        key, value: the projections whose biases are folded, or None.
        head_dim: D.
        table: of the rotary embedding; None without `key`.
    """

    def __init__(
        self, key: nn.Module | None, value: nn.Module | None, head_dim: int, table: RotaryTable | None
    ) -> None:
        self._key = key
        self._value = value
        self._width = head_dim
        self._table = table
        self._bias: torch.Tensor | None = None  # what self._columns and self._rows are for
        self._columns: torch.Tensor | None = None
        self._rows: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        self._compared: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        self._floats: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def _left_out(self, name: str, linear: nn.Module) -> torch.Tensor:
        """What a projection leaves out, in float32; the same tensor as long as that is the same."""
        if linear.left_out is None:
            linear._added_bias()
        left, known = linear.left_out, self._floats.get(name)
        version = changes_of(left)
        if known is None or known[0] is not left or known[1] != version:
            with torch.inference_mode(False):
                known = self._floats[name] = left, version, left.detach().float()
        return known[2]

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
    ) -> PositionScores:
        """What the bias of k adds to the scores, in float32; without tensors where it adds nothing.

        Args:
            query: `[B, H, Q, D]` after RoPE.
            position_ids: int64 `[B or 1, Q]`, those of the queries.
            tokens: stored tokens, this pass's included, or the size of storage where `length` says how many.
            length: int64 `[1]`, or None.

        Raises:
            OctavoError: positions are missing, or do not follow one another.
        """
        if self._key is None or not len(columns := self._chosen_columns()):
            return PositionScores()
        if position_ids is None:
            raise OctavoError("attention is given no position_ids, which folded biases need; use fold_bias=False")
        table = self._table.rows(self._table.length_for(position_ids, tokens), query.device)
        rows = self._columns_of(table)
        bias = (
            self._bias.float()
            .view(-1, self._width)
            .repeat_interleave(query.shape[1] * self._width // len(self._bias), 0)
        )
        both = pair_products(query.float(), bias[:, None])
        newest = tokens if length is None else length
        return PositionScores(both[..., columns], rows, position_ids[:, -1] - (newest - 1))

    def key_bias_by_slot(
        self, position_ids: torch.Tensor | None, tokens: int, slots: torch.Tensor
    ) -> torch.Tensor | None:
        """The folded bias of k, turned as it is at the position of slot 0: float32 `[B or 1, G, D]`; None without one.

        Args:
            slots: cos and sin by slot, `[P, D]`, by which it is turned from there on.

        Raises:
            OctavoError: as `terms`, and where the model turns by other angles than those of its config.
        """
        if self._key is None or not len(self._chosen_columns()):
            return None
        if position_ids is None:
            raise OctavoError("attention is given no position_ids, which folded biases need; use fold_bias=False")
        table = self._table.rows(self._table.length_for(position_ids, tokens), slots.device)
        self._check_angles(table, slots)
        start = position_ids[:, -1] - (tokens - 1)
        rows = table[start.abs()]
        half = rows.shape[-1] // 2
        rows = torch.cat((rows[:, :half], rows[:, half:] * start.sign()[:, None]), dim=-1)
        return turned(self._left_out("key", self._key).view(-1, self._width), rows[:, None])

    def _check_angles(self, table: torch.Tensor, slots: torch.Tensor) -> None:
        """Raise an `OctavoError` unless both tables are of the same angles, but for the factor of cos and sin."""
        if self._compared[0] is table and self._compared[1] is slots:
            return
        rows = min(len(table), len(slots))
        if bool(((table[:rows] - slots[:rows] * table[0, 0]).abs() > MOST_ANGLE_ERROR).any()):
            raise OctavoError(
                "the rotary embedding of this model turns by other angles than its config says, as after "
                "model.to(torch.bfloat16); load it with from_pretrained(..., dtype=torch.bfloat16), or give a scheme "
                "without 'center_key'"
            )
        self._compared = table, slots

    def key_terms(
        self, position_ids: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Of what `terms` adds to the scores, all but the queries: the bias, float32 `[G * D]`, the columns of cos and
        sin that count, and these by position, `[P, E]`. None where the bias adds nothing.

        Raises:
            OctavoError: positions do not follow one another.
        """
        if self._key is None:
            return None, None, None
        bias, columns = self._left_out("key", self._key), self._chosen_columns()
        if not len(columns):
            return None, None, None
        table = self._table.rows(self._table.length_for(position_ids, tokens), columns.device)
        return bias, columns, self._columns_of(table)

    def _columns_of(self, table: torch.Tensor) -> torch.Tensor:
        """The columns of a table that count, made once for each table."""
        if self._rows[0] is not table:
            with torch.inference_mode(False):
                self._rows = table, table[:, self._columns].contiguous()
        return self._rows[1]

    def value_bias(self) -> torch.Tensor | None:
        """The bias of v that the output is given back, float32 `[G * D]`, or None."""
        return None if self._value is None else self._left_out("value", self._value)

    def with_value_bias(self, output: torch.Tensor) -> torch.Tensor:
        """Attention's `[B, Q, H, D]` with the bias of v added."""
        if self._value is None:
            return output
        bias = self._value.left_out.to(output.dtype).view(-1, self._width)
        return output + bias.repeat_interleave(output.shape[2] // bias.shape[0], dim=0)


def _is_foldable(linear: nn.Module | None) -> bool:
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


def can_fold_key_bias(config: Any, decoder: Decoder, index: int = 0) -> bool:
    """Whether K of a layer is the rotation of `W x + b`, by angles that stay, so that a bias of k can be folded.

    Not where angles change with the length (dynamic scaling, LongRoPE) or with the kind of layer, where RoPE turns a
    part of the channels or none, and not where k is made with q and v in one, or normed behind its projection.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    is_one = not any(isinstance(part, dict) for part in parameters.values())
    is_steady = is_one and parameters.get("rope_type", "default") in STEADY_ROPE_TYPES
    is_whole = is_rotated(config, index) and partial_rotary_factor(config, index) == 1.0
    return is_steady and is_whole and not decoder.attention.is_fused and decoder.attention.key_norm is None


def folds_key_bias(model: nn.Module, index: int = 0) -> bool:
    """`can_fold_key_bias` of a stated model."""
    return can_fold_key_bias(model.base_model.config, stated_decoder(model), index)


def fold_biases(
    model: nn.Module, scheme: Scheme | None = None, has_keys: bool = True, ranks: Ranks | None = None
) -> int:
    """Fold the biases of k and v of a stated decoder that has any, in place; return how many there were.

    Those of k stay where `folds_key_bias` says so, or without `has_keys`. With `scheme`, only layers are folded in
    which it says `fold_bias`. `ranks` are those that share the heads of the model, if any.

    Raises:
        OctavoError: another library has put its own forward in the place of a projection's.
    """
    decoder, facts = model.base_model, stated_decoder(model)
    table = RotaryTable(decoder.get_submodule(facts.rotary)) if has_keys else None
    scheme = None if scheme is None else scheme.counted(model.config.num_hidden_layers)
    count = 0
    for (_, layer), (name, attention) in zip(decoder_layers(model), attention_modules(model), strict=True):
        index = attention.layer_idx
        key, value = (linear_of(facts, attention, part) for part in ("key", "value"))
        key = key if has_keys and folds_key_bias(model, index) and _is_foldable(key) else None
        value = value if _is_foldable(value) else None
        is_wanted = scheme is None or scheme.of_layer(index).fold_bias
        if hasattr(attention, FOLD) or not is_wanted or (key is None and value is None):
            continue
        setattr(attention, FOLD, BiasFold(key, value, attention.head_dim, table if key is not None else None))
        norm, offset = dict(layer.named_children()).get(facts.attention_norm), facts.norm_offset
        key_part = partial(large_key_bias, norm=norm, head_dim=attention.head_dim, norm_offset=offset, ranks=ranks)
        for linear in (key, value):
            if linear is None:
                continue
            if "forward" in vars(linear):
                raise OctavoError(
                    f"{name}: another library wraps the forward of a projection whose bias is to be folded; call "
                    "prepare before (of a model with device_map, that is not possible: use set_attn_implementation)"
                )
            _leave_bias(linear, key_part if linear is key else None)
            count += 1
    if count:
        decoder.register_forward_pre_hook(_refuse_other_attention)
    return count
