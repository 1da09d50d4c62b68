"""What a float model computes around its decoder layers, found by running it with stand-ins for them.

B = 1. S tokens, E hidden size, D head_dim.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...runtime.decoder import capped_logits, scaled_states, stated_decoder
from ...runtime.experts import PROBE_TOLERANCE
from ...runtime.model_sizes import head_dim_of
from ...runtime.passes import whole_passes
from ...runtime.rotary import rope_constants, rotated_by_slot

PROBE_TOKENS = 5


class _Recorder(nn.Module):
    """Stands in for a decoder layer, and keeps what it is called with."""

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments, self.hidden = arguments, hidden_states
        return hidden_states


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[_Recorder]]:
    """Within it, recorders stand in for the layers of a stated model, and nothing for the norm behind them."""
    decoder, facts = model.base_model, stated_decoder(model)
    recorders = nn.ModuleList(_Recorder() for _ in decoder.get_submodule(facts.layers))
    stand_ins = {facts.layers: recorders, facts.norm: nn.Identity()}
    kept = {name: decoder.get_submodule(name) for name in stand_ins}
    try:
        for name, module in stand_ins.items():
            decoder.set_submodule(name, module)
        with whole_passes(decoder):
            yield list(recorders)
    finally:
        for name, module in kept.items():
            decoder.set_submodule(name, module)


def layer_arguments(model: nn.Module, hidden: torch.Tensor, **arguments: Any) -> list[dict[str, Any]]:
    """What a decoder calls each of its layers with: masks, rotary embedding, positions.

    Args:
        model: a stated causal language model; only its rotary embedding need be in memory.
        hidden: `[1, S, E]`, whose shape, dtype and device matter.
        arguments: of the decoder, as `attention_mask`.
    """
    with _recorded(model) as recorders:
        model.base_model(inputs_embeds=hidden, **arguments)
    return [recorder.arguments for recorder in recorders]


def ends_fault(model: nn.Module, device: torch.device) -> str | None:
    """What a model computes before its first layer or behind its last linear that is not stated; None if nothing.

    Args:
        model: a stated causal language model; only its rotary embedding need be in memory.
        device: that it lies on.
    """
    facts, config, head = stated_decoder(model), model.config, model.get_submodule(stated_decoder(model).head)
    probe = torch.linspace(-3, 3, PROBE_TOKENS * config.hidden_size, device=device).view(1, PROBE_TOKENS, -1)
    with _recorded(model) as recorders:
        model.set_submodule(facts.head, nn.Identity())
        try:
            logits = model(inputs_embeds=probe, use_cache=False).logits
        finally:
            model.set_submodule(facts.head, head)
    first = recorders[0].hidden
    if not torch.allclose(first, scaled_states(facts, config, probe), atol=PROBE_TOLERANCE):
        return f"{facts.layers}.0: is not given embeddings as they are stated to be (states_scale)"
    if not torch.allclose(logits, capped_logits(facts, config, first), atol=PROBE_TOLERANCE):
        return f"{facts.head}: logits are not what it makes, as they are stated to be (logits_divisor, caps_logits)"
    return None


def rope_fault(model: nn.Module, device: torch.device) -> str | None:
    """The first layer in which RoPE does not turn channel d with the one half of the turned channels further.

    What the layer's own module turns by the angles that it is given is held against `rotated_by_slot`. None if all is
    as stated.

    Args:
        model, device: as of `ends_fault`.
    """
    facts, config, head_dim = stated_decoder(model), model.config, head_dim_of(model.config)
    hidden = torch.zeros((1, PROBE_TOKENS, config.hidden_size), device=device)
    x = torch.linspace(-1, 1, PROBE_TOKENS * head_dim, device=device).view(1, 1, PROBE_TOKENS, head_dim)
    layers = model.base_model.get_submodule(facts.layers)
    for index, arguments in enumerate(layer_arguments(model, hidden, use_cache=False)):
        frequencies, factor = rope_constants(config, head_dim, index)
        if not len(frequencies):
            continue
        attention = layers[index].get_submodule(facts.attention.name)
        rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        turned = torch.full((head_dim,), 1.0, device=device)
        turned[: 2 * len(frequencies)] = factor
        expected = rotated_by_slot(x, frequencies.to(device), 0) * turned
        cos, sin = arguments["position_embeddings"]
        if rotate is None or not torch.allclose(rotate(x, x, cos, sin)[1], expected, atol=PROBE_TOLERANCE):
            return f"{facts.layers}.{index}.{facts.attention.name}: RoPE does not pair channels by halves of a head"
    return None
