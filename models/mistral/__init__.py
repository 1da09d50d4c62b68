"""Mistral: every checkpoint of model_type "mistral"."""

from typing import Any

import torch

from ...common.architecture import Architecture
from .modeling_mistral_fa3 import MistralForCausalLM


def float_linears(config: Any, dtype: torch.dtype) -> list[str]:
    """Globs of the linear layers that stay in float (MindIE-LLM, llama3/convert_quant_weights.py)."""
    return ["*.mlp.down_proj", "lm_head"]


ARCHITECTURE = Architecture("mistral", "mistral", MistralForCausalLM, float_linears)
