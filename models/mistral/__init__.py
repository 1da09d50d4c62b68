"""Mistral: every checkpoint of model_type "mistral"."""

from ...common.architecture import Architecture
from .modeling_mistral_fa3 import MistralForCausalLM

ARCHITECTURE = Architecture("mistral", "mistral", MistralForCausalLM)
