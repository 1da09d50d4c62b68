"""Qwen2 and Qwen2.5 (not their MoE, VL and audio kin): every checkpoint of model_type "qwen2"."""

from typing import Any

import torch

from ...common.architecture import Architecture
from .modeling_qwen2_fa3 import Qwen2ForCausalLM


def float_linears(config: Any, dtype: torch.dtype) -> list[str]:
    """Globs of the linear layers that stay in float (MindIE-LLM, qwen/convert_quant_weights_72b.py)."""
    return ["*.mlp.down_proj", "lm_head"]


ARCHITECTURE = Architecture("qwen2", "qwen2", Qwen2ForCausalLM, float_linears)
