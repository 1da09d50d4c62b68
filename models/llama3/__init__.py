"""Llama, Llama 2, Llama 3 and their kin: every checkpoint of model_type "llama"."""

from typing import Any

import torch

from ...common.architecture import Architecture
from .modeling_llama_fa3 import LlamaForCausalLM

_LARGE_HIDDEN_SIZE = 8192
_LONG_CONTEXT = 131072
_OUTER_LAYERS = 5


def float_linears(config: Any, dtype: torch.dtype) -> list[str]:
    """Globs of the linear layers that Ascend's recipe leaves in float (MindIE-LLM, llama3/convert_quant_weights.py)."""
    is_large_fp16 = config.hidden_size == _LARGE_HIDDEN_SIZE and dtype == torch.float16
    if not is_large_fp16:
        return ["*.mlp.down_proj", "lm_head"]
    outer = [f"model.layers.{index}.*_proj" for index in range(_OUTER_LAYERS)]
    every_down = ["*.mlp.down_proj"] if config.max_position_embeddings == _LONG_CONTEXT else []
    return [*outer, *every_down, "lm_head"]


ARCHITECTURE = Architecture("llama3", "llama", LlamaForCausalLM, float_linears)
