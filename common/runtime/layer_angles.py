"""cos and sin of RoPE for all layers of a decoder, by position, from its own rotary embedding."""

from typing import Any

import torch
from torch import nn

from .bias_fold import STEADY_ROPE_TYPES, RotaryTable
from .rotary import is_rotated, layer_type_of, rope_type

LARGEST_TABLE = 1 << 17
"""Positions of a table that is kept, at most."""


class LayerAngles:
    """The tables of a decoder's layers.

    Those whose angles change with the length are made anew for each pass, and so is what lies beyond a table.

    Args:
        rotary: the decoder's rotary embedding.
        config: its config.
    """

    def __init__(self, rotary: nn.Module, config: Any) -> None:
        self._rotary = rotary
        count = config.num_hidden_layers
        self._kinds = [layer_type_of(config, index) if is_rotated(config, index) else None for index in range(count)]
        self.is_steady = all(rope_type(config, index) in STEADY_ROPE_TYPES for index in range(count))
        self._tables = {kind: RotaryTable(rotary, *kind) for kind in self._kinds if kind is not None}

    def tables(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Rows of the tables for tokens at `[B, T]`, and for each layer its table `[P, R]`; None without RoPE."""
        least, most = map(int, position_ids.aminmax())
        if self.is_steady and least >= 0 and most < LARGEST_TABLE:
            found = {kind: table.rows(most + 1, position_ids.device) for kind, table in self._tables.items()}
            return position_ids, [None if kind is None else found[kind] for kind in self._kinds]
        found = {kind: self._rows_at(position_ids, kind) for kind in self._tables}
        rows = torch.arange(position_ids.numel(), device=position_ids.device).view(position_ids.shape)
        return rows, [None if kind is None else found[kind] for kind in self._kinds]

    def _rows_at(self, position_ids: torch.Tensor, kind: tuple[str, ...]) -> torch.Tensor:
        cos, sin = self._rotary(torch.zeros(1, dtype=torch.float32, device=position_ids.device), position_ids, *kind)
        half = cos.shape[-1] // 2
        return torch.cat((cos[..., :half], sin[..., :half]), dim=-1).flatten(0, 1).float().contiguous()
