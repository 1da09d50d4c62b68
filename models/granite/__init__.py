"""Granite 3, dense: every checkpoint of model_type "granite" (not its MoE and hybrid kin)."""

from ...common.architecture import Architecture
from .modeling_granite_fa3 import GraniteForCausalLM

ARCHITECTURE = Architecture("granite", "granite", GraniteForCausalLM)
