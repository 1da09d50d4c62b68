"""SmolLM3: every checkpoint of model_type "smollm3"."""

from ...common.architecture import Architecture
from .modeling_smollm3_fa3 import SmolLM3ForCausalLM

ARCHITECTURE = Architecture("smollm3", "smollm3", SmolLM3ForCausalLM)
