"""Qwen3, dense (not its MoE kin): every checkpoint of model_type "qwen3"."""

from typing import Any

import torch

from ...common.architecture import Architecture
from .modeling_qwen3_fa3 import Qwen3ForCausalLM


def float_linears(config: Any, dtype: torch.dtype) -> list[str]:
    """Globs of the linear layers that stay in float (msmodelslim's recipes for Qwen2 and Qwen3)."""
    return ["*.mlp.down_proj", "lm_head"]


ARCHITECTURE = Architecture("qwen3", "qwen3", Qwen3ForCausalLM, float_linears)
