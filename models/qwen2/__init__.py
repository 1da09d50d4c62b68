"""Qwen2 and Qwen2.5 (not their MoE, VL and audio kin): every checkpoint of model_type "qwen2"."""

from ...common.architecture import Architecture
from .modeling_qwen2_fa3 import Qwen2ForCausalLM

ARCHITECTURE = Architecture("qwen2", "qwen2", Qwen2ForCausalLM)
