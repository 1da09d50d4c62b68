"""Phi-3, Phi-3.5 and Phi-4 of text, dense: every checkpoint of model_type "phi3"."""

from ...common.architecture import Architecture
from .modeling_phi3_fa3 import Phi3ForCausalLM

ARCHITECTURE = Architecture("phi3", "phi3", Phi3ForCausalLM)
