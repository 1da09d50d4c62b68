"""Qwen3 with experts: every checkpoint of model_type "qwen3_moe"."""

from ...common.architecture import Architecture
from .modeling_qwen3_moe_fa3 import Qwen3MoeForCausalLM

ARCHITECTURE = Architecture("qwen3_moe", "qwen3_moe", Qwen3MoeForCausalLM)
