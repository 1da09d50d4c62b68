"""The two-line use: a stock model of transformers made ready for a `QuantizedCache`."""

import sys
import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from ..ops.shared.registry import NAMESPACE
from .architecture import known_decoders, stated_architectures, stated_or_known
from .errors import OctavoError, first_line
from .runtime.adapters import look_at_adapters
from .runtime.attention import register_attention
from .runtime.bias_fold import fold_biases
from .runtime.decoder import (
    Decoder,
    attention_modules,
    fits_attention,
    linear_of,
    state_decoder,
)
from .runtime.fused_decoder import IS_ZOO
from .runtime.generation_step import keeping_class
from .runtime.passes import chunk_passes


def _turns_halves(model: nn.Module, decoder: Decoder) -> bool:
    """Whether a model's own RoPE turns channel d with d + D / 2, all of them, as `bias_fold.py` takes it to."""
    attention = attention_modules(model)[0][1]
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    x = torch.arange(1.0, attention.head_dim + 1, device=model.device).view(1, 1, 1, -1)
    try:
        rotary = model.base_model.get_submodule(decoder.rotary)
        cos, sin = rotary(x[0], torch.tensor([[3]], device=model.device))
        found = rotate(x, x, cos, sin)[1]
    except (TypeError, RuntimeError, AttributeError):
        return False
    (first, second), half = x.chunk(2, dim=-1), cos.shape[-1] // 2
    c, s = cos[..., :half], sin[..., :half]
    if 2 * c.shape[-1] != x.shape[-1]:
        return False
    return torch.allclose(found, torch.cat((first * c - second * s, second * c + first * s), dim=-1), atol=1e-4)


def _bias_left_in(model: nn.Module, decoder: Decoder | None) -> str | None:
    """The first projection whose bias goes into the cache, by name; None if there is none."""
    if decoder is not None and not decoder.attention.is_fused:
        for name, attention in attention_modules(model):
            for part in ("key", "value"):
                linear = linear_of(decoder, attention, part)
                if getattr(linear, "bias", None) is not None and not getattr(linear, "folds_bias", False):
                    child = getattr(decoder.attention, part).removeprefix(f"{decoder.attention.name}.")
                    return f"{name}.{child}"
        return None
    # of what nobody has stated, any matrix of an attention with a bias may be the one
    for name, module in model.named_modules():
        for child, linear in module.named_children() if hasattr(module, "layer_idx") else ():
            weight = getattr(linear, "weight", None)
            if getattr(linear, "bias", None) is not None and weight is not None and weight.dim() == 2:
                return f"{name}.{child}"
    return None


def _stated(model: nn.Module) -> Decoder | None:
    """The anatomy of a model: as the zoo states it, or, of other model types, a statement whose attention it has.

    Raises:
        OctavoError: the zoo states one for this model type, and the model is not as stated.
    """
    if model.base_model.config.model_type in stated_architectures():
        return stated_or_known(model)
    return next((decoder for decoder in known_decoders() if fits_attention(model, decoder)), None)


def prepare(model: nn.Module) -> nn.Module:
    """Make a stock model of transformers ready for a `QuantizedCache`: its attention reads codes, biases are folded.

    Long passes are taken in chunks (`passes.py`), so that a prompt needs the memory of one chunk's activations.

    Adapters of PEFT may be in the model, also one that PEFT has wrapped, or come later.

    A bias of k or v that cannot be folded stays in the cache, and a warning says so; so does that of a projection
    which makes q, k and v in one.

    Raises:
        OctavoError: the model's attention is its own and not transformers' `AttentionInterface`; it is not what the
            zoo states of its model type; transformers shares it among ranks; an adapter in it reads biases that are
            folded (DoRA); see `fold_biases`.
    """
    if hasattr(model, "get_base_model"):  # PEFT's, around a model with adapters
        base = prepare(model.get_base_model())
        if model.base_model is not base:  # else what it learns are prompts, whose configs are in PEFT's model alone
            model.peft_config = base.peft_config
        return model
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise OctavoError(
            f"{type(model).__name__} is not served: transformers shares it among ranks; load it by the zoo's class of "
            "its architecture (octavo.models), which takes tp_plan='auto' as well"
        )
    facts = _stated(model) if isinstance(model, PreTrainedModel) else None  # a refused model stays as it is
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
    model.__class__ = keeping_class(type(model))
    if facts is not None:
        state_decoder(model, facts)
        look_at_adapters(model)
        fold_biases(model, has_keys=_turns_halves(model, facts))
    setattr(decoder, IS_ZOO, facts is not None and decoder.config.model_type in stated_architectures())
    chunk_passes(decoder)
    left = _bias_left_in(model, facts)
    if left is not None:
        kind = type(model.get_submodule(left)).__name__
        warnings.warn(
            f"{left}: the bias of a {kind} stays in the cache, where it may cost much; "
            "schemes whose K is per channel, as octavo-8 and octavo-4, bear it best",
            stacklevel=2,
        )
    return model
