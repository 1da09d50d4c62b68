"""Qwen3, dense (not its MoE kin): every checkpoint of model_type "qwen3"."""

from ...common.architecture import Architecture
from .modeling_qwen3_fa3 import Qwen3ForCausalLM

ARCHITECTURE = Architecture("qwen3", "qwen3", Qwen3ForCausalLM)
