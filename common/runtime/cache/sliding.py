"""Layers whose mask hides old tokens: which these are, and which tokens they need not keep.

B batch, G KV heads, S tokens, D head_dim. Slots count the tokens of a sequence from 0, padding included.
"""

from dataclasses import dataclass
from typing import Any

SMALLEST_CHUNK = 64
"""Tokens that a sliding layer forgets at a time, at least."""
CHUNKS_OF_WINDOW = 16
"""So many chunks make a window, where that is more tokens."""
STORAGE_STEP = 32
"""Storage is a multiple of it: the pages in which an Ascend NPU reads int8 codes are."""


@dataclass(frozen=True)
class Sliding:
    """What a layer keeps whose queries see the newest `window` tokens, their own included.

    Codes lie in the order of their slots in storage of `window + crop_room` tokens and a chunk. When it is full, the
    tokens that no query will see are dropped and the others move to its front: a decode step copies a window once per
    chunk, of which each step reads all, and what attention is handed are contiguous views, as of a layer that keeps
    all. In a ring the newest tokens would lie before the oldest, so that causality, positions and groups of tokens
    would have to be told to every kernel. A pass of more tokens than a chunk, a prompt say, has storage of its own,
    of which the newest tokens are kept.

    Attributes:
        window: tokens that a query sees.
        crop_room: how many of the newest tokens can always be cropped.
        step: tokens that become codes at a time, of K or V, whichever is more; so many are forgotten at a time.
    """

    window: int
    crop_room: int
    step: int = 1

    def first_needed(self, tokens: int) -> int:
        """The slot of the oldest token that is needed once `tokens` are stored, by a crop within the room as well."""
        return min(max(0, tokens + 1 - self.window - self.crop_room), tokens) // self.step * self.step

    def shortest(self, first: int) -> int:
        """The length from which on each can be cropped to, where `first` is the oldest slot kept; 0 always can be."""
        return first + self.window - 1 if first else 0

    @property
    def capacity(self) -> int:
        """Tokens that storage holds between passes, at most."""
        chunk = max(SMALLEST_CHUNK, self.step, self.window // CHUNKS_OF_WINDOW)
        tokens = max(0, self.window - 1 + self.crop_room) + self.step - 1 + chunk
        unit = STORAGE_STEP if STORAGE_STEP % self.step == 0 else self.step
        return -(-tokens // unit) * unit


def sliding_windows(config: Any) -> list[int | None]:
    """The window of each layer of a decoder's config, as transformers' `DynamicCache` finds them; None: sees all.

    Layers slide that `layer_types` says do, or without such a list all, if there is a `sliding_window`. A window of one
    token, of which transformers' own cache keeps all, is none.
    """
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    has_window = isinstance(window, int) and window > 1
    kinds = types[: config.num_hidden_layers]  # of a model that was made shorter, the list may not be
    return [window if has_window and kind == "sliding_attention" else None for kind in kinds]
