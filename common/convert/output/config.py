"""The config.json of an output."""

from typing import Any

from ...architecture import Architecture
from ...runtime.checkpoint.loading import CONFIG_KEY, NATIVE_LOAD_HINT
from ..plan import Plan
from ..source.config import bearable


def output_config(
    source: dict[str, Any], architecture: Architecture, plan: Plan, ties_head: bool = True
) -> dict[str, Any]:
    """The config.json to write: the source's, with what loads the modeling file and says the scheme.

    Args:
        ties_head: whether the source's last linear is its embedding, if its config says so.
    """
    recipe: dict[str, Any] = {"scheme": plan.scheme.to_dict()}
    if plan.has_weight_only:
        recipe["cpu_activations"] = plan.cpu_activations
    config = {
        **bearable(source),
        "architectures": [architecture.model_class.__name__],
        "auto_map": architecture.auto_map,
        CONFIG_KEY: recipe,
        "transformers_weights": NATIVE_LOAD_HINT,
    }
    if architecture.decoder.head in plan.linears or not ties_head:
        config["tie_word_embeddings"] = False
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    if "rope_theta" in (config.get("rope_parameters") or {}):
        # Readers built on transformers 4, MindIE among them, look for it here and else take 10000 in silence.
        config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
    return config
