"""Tiny random checkpoints of every architecture, in fp32 and bf16, with tied and untied heads."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from ..support import randomized, save_source, tiny_config

SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 2}
"""Wide enough for the groups of every scheme."""
SLIDING: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 11,
    "layer_types": ["full_attention", "sliding_attention"],
}


def _large_key_biases(model: torch.nn.Module) -> None:
    """Biases of k that are large beside the keys, as of real Qwen2 checkpoints."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_(std=5)


def _outliers(model: torch.nn.Module) -> None:
    """Some channels of every norm that are far larger than the rest, for what smooths or sets outliers apart."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("layernorm.weight"):
                weight[::37] *= 8


@dataclass(frozen=True)
class Source:
    """A tiny checkpoint.

    Attributes:
        folder: of the architecture, under `models/`.
        classes: how transformers' config and model classes begin.
        changes: of the tiny config.
        dtype: of the weights.
        alter: what else is done to the weights.
    """

    folder: str
    classes: str
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    alter: Callable[[torch.nn.Module], None] = _outliers

    def build(self) -> torch.nn.Module:
        """The model, the same each time."""
        fields = {k: v for k, v in tiny_config(**SIZES).to_diff_dict().items() if k not in ("model_type", "dtype")}
        config = getattr(transformers, f"{self.classes}Config")(**{**fields, **self.changes})
        torch.manual_seed(0)
        model = randomized(getattr(transformers, f"{self.classes}ForCausalLM")(config))
        self.alter(model)
        return model.to(self.dtype)

    def save(self, directory: Path) -> None:
        """Write it as a Hugging Face checkpoint, with a config of generation that is not the default one."""
        model = self.build()
        model.generation_config.top_k = 7
        model.generation_config.do_sample = True
        save_source(directory, model)


SOURCES = {
    "llama": Source("llama3", "Llama"),
    "llama bf16 tied biased": Source(
        "llama3", "Llama", {"tie_word_embeddings": True, "attention_bias": True}, torch.bfloat16
    ),
    "llama fp16 odd": Source("llama3", "Llama", {"intermediate_size": 192, "vocab_size": 321}, torch.float16),
    "mistral": Source("mistral", "Mistral", {"sliding_window": 13}),
    "mistral bf16": Source("mistral", "Mistral", {"sliding_window": 13}, torch.bfloat16),
    "qwen2": Source("qwen2", "Qwen2", SLIDING, alter=_large_key_biases),
    "qwen2 bf16 tied": Source("qwen2", "Qwen2", {"tie_word_embeddings": True}, torch.bfloat16, _large_key_biases),
    "qwen3": Source("qwen3", "Qwen3", {"tie_word_embeddings": True}),
    "qwen3 bf16": Source("qwen3", "Qwen3", {"num_key_value_heads": 1}, torch.bfloat16),
}
