"""The attention function that transformers' models call, and the mask that goes with it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from ..ops import attention
from ..ops.library import NAMESPACE
from .errors import OctavoError

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass
class Codes:
    """What the cache hands to attention in place of K or V: views of the stored codes and what decodes them.

    Attributes:
        codes: `[B, G, S, D]` as `ops/codes.py` says, or float values where the scheme leaves them in float.
        scale, zero: as the attention op takes them; None where not used.
        length: int64 `[1]` on the device, where not all of the S tokens are in use; None where they are.
        query_scale: with K only, `[H, 1, 1]`: scale by which the queries are quantized; None leaves them in float.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None
    length: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """What another attention function runs into when it takes codes for a tensor."""
        raise AttributeError(
            f"a quantized cache hands out codes, which have no {name!r}; "
            f"call model.set_attn_implementation({NAMESPACE!r}) first"
        )


@dataclass(frozen=True)
class SlidingWindow:
    """In place of a mask tensor: a query sees the newest `size` of the keys that causality leaves it.

    `generate` makes the masks of compileable caches ahead of the model and takes each for a tensor `[B, 1, Q, S]`.
    """

    size: int
    ndim: ClassVar[int] = 4

    def contiguous(self) -> "SlidingWindow":
        """Itself, as of a tensor that is contiguous."""
        return self


def quantized_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Codes | torch.Tensor,
    value: Codes | torch.Tensor,
    attention_mask: torch.Tensor | SlidingWindow | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over what `QuantizedCache.update` returned, or over plain float keys and values.

    Args:
        module: the attention module, for its `is_causal`.
        query: `[B, H, Q, D]`.
        key, value: handles to `[B, G, S, D]`.
        attention_mask: True where a query sees a key, or additive; broadcastable to `[B, H, Q, S]`. What
            `causal_or_explicit_mask` made.

    Returns:
        `[B, Q, H, D]` and None in place of attention weights.

    Raises:
        OctavoError: an argument that the op does not serve, named.
    """
    if dropout or (module.training and torch.is_grad_enabled()):
        raise OctavoError("quantized attention is for inference and has no gradients: call model.eval()")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise OctavoError(f"quantized attention does not serve {name!r}, which this model's attention passes")
    if kwargs.get("output_attentions"):
        raise OctavoError("quantized attention returns no attention weights; leave output_attentions=False")
    # Not `isinstance(key, Codes)`: another copy of this very code, beside another checkpoint, has a class of its own.
    keys = Codes(key) if isinstance(key, torch.Tensor) else key
    values = Codes(value) if isinstance(value, torch.Tensor) else value
    window = attention_mask.size if isinstance(attention_mask, SlidingWindow) else 0
    mask = attention_mask[..., : keys.codes.shape[2]] if isinstance(attention_mask, torch.Tensor) else None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    output = attention(
        query,
        keys.codes,
        values.codes,
        keys.scale,
        keys.zero,
        values.scale,
        values.zero,
        keys.query_scale,
        mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal,
        length=keys.length,
        window=window,
    )
    return output, None


def _sliding_window(mask_function: Callable) -> int:
    """The window of what `sliding_window_causal_mask_function` of transformers returns; 0 for every other function."""
    if mask_function.__code__ is not sliding_window_causal_mask_function(1).__code__:
        return 0
    parts = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return 0
    is_overlay = parts[0].__code__ is sliding_window_overlay(1).__code__
    return inspect.getclosurevars(parts[0]).nonlocals["sliding_window"] if is_overlay else 0


def _hides_nothing(padding: torch.Tensor | None) -> bool:
    """Whether a padding mask is known to hide no token; what it holds is not known to a graph that is compiled."""
    return padding is None or (not torch.compiler.is_compiling() and bool(padding.all()))


def causal_or_explicit_mask(
    *args: Any,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | SlidingWindow | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | SlidingWindow | None:
    """No mask tensor where causality says it all, with a sliding window or without; otherwise SDPA's boolean one."""
    if isinstance(attention_mask, SlidingWindow):  # made ahead, and asked for again by a model of sliding layers alone
        return attention_mask
    if allow_is_causal_skip and _hides_nothing(attention_mask):
        if mask_function is causal_mask_function and local_size is None:
            return None
        # a graph cannot look into a function for its window
        if not torch.compiler.is_compiling() and (window := _sliding_window(mask_function)):
            return SlidingWindow(window)
    return sdpa_mask(
        *args,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def register_attention() -> None:
    """Make the attention function known to transformers under the name of this copy of the code."""
    AttentionInterface.register(NAMESPACE, quantized_attention)
    AttentionMaskInterface.register(NAMESPACE, causal_or_explicit_mask)
