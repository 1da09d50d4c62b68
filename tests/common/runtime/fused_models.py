"""Tiny models of every kind of architecture, whose passes are compared module by module and in one call."""

from typing import Any

import torch
import transformers

from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.fused_decoder import IS_ZOO
from octavo.common.stock_model import prepare

from ...support import with_cache
from ...tolerances import TOLERANCES

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral, sliding": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM",
                {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 8}),
    "dynamic RoPE": ("LlamaConfig", "LlamaForCausalLM", {
        "max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
}  # fmt: skip
CUTS = (5, 1, 1, 7, 1, 8)


def model_of(kind: str, **more: Any) -> transformers.PreTrainedModel:
    """A tiny random model, ready for a quantized cache, whose norms and biases differ from their defaults.

    `more` are entries of its config.
    """
    torch.manual_seed(0)
    config, model, changes = KINDS[kind]
    changes = {**changes, **more}
    model = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * (1.0 if name.endswith("bias") else 0.2))
            else:
                weight.mul_(3)
    return prepare(model)


def states(model: torch.nn.Module, cache: QuantizedCache, is_fused: bool, batch: int, **more: Any) -> torch.Tensor:
    """Last hidden states over passes of several lengths."""
    base, parts = model.base_model, []
    setattr(base, IS_ZOO, is_fused)
    ids = torch.randint(0, 64, (batch, sum(CUTS)), generator=torch.Generator().manual_seed(1))
    stop = 0
    for part in ids.split(CUTS, dim=1):
        stop += part.shape[1]
        arguments = {name: value[:, :stop] for name, value in more.items()}
        with torch.no_grad():
            parts.append(base(input_ids=part, use_cache=True, **with_cache(cache), **arguments).last_hidden_state)
    setattr(base, IS_ZOO, True)
    return torch.cat(parts, dim=1)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).norm() < TOLERANCES["decoder layer"] * wanted.norm()
