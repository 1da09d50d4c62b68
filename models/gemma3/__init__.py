"""Gemma 3, text: every checkpoint of model_type "gemma3_text" (not the multimodal "gemma3" around one)."""

from ...common.architecture import Architecture
from .modeling_gemma3_fa3 import Gemma3ForCausalLM

ARCHITECTURE = Architecture("gemma3", "gemma3_text", Gemma3ForCausalLM, inside="gemma3")
