"""The attention function that transformers' models call, and the mask that goes with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..ops import attention
from ..ops.library import NAMESPACE
from .errors import OctavoError

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass
class Codes:
    """What the cache hands to attention in place of K or V: views of the stored codes and what decodes them.

    Attributes:
        codes: `[B, G, S, D]`, int8 codes, or float values where the scheme leaves them in float.
        scale, zero: as the attention op takes them; None where not used.
        query_scale: with K only, `[H, 1, 1]`: scale by which the queries are quantized; None leaves them in float.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None


def quantized_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Codes | torch.Tensor,
    value: Codes | torch.Tensor,
    attention_mask: torch.Tensor | None,
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
        attention_mask: True where a query sees a key, or additive; broadcastable to `[B, H, Q, S]`.

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
    if attention_mask is not None:
        attention_mask = attention_mask[..., : keys.codes.shape[2]]
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
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal,
    )
    return output, None


def causal_or_explicit_mask(
    *args: Any,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask where plain causality says it all, for any number of queries; otherwise the boolean mask of SDPA."""
    is_plain = allow_is_causal_skip and local_size is None and mask_function is causal_mask_function
    if is_plain and (attention_mask is None or bool(attention_mask.all())):
        return None
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
