"""The config.json of an output."""

from typing import Any

import torch

from ...architecture import Architecture
from ...runtime.checkpoint.loading import CONFIG_KEY, NATIVE_LOAD_HINT, rope_scaling
from ...runtime.version import VERSION
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
    recipe["version"] = VERSION
    config = {
        **bearable(source),
        "architectures": [architecture.model_class.__name__],
        "auto_map": architecture.auto_map,
        CONFIG_KEY: recipe,
        "transformers_weights": NATIVE_LOAD_HINT,
    }
    if architecture.decoder.head in plan.linears or not ties_head:
        config["tie_word_embeddings"] = False
    return {**config, **for_older_readers(config, plan.engine_dtype)}


def for_older_readers(config: dict[str, Any], engine_dtype: torch.dtype) -> dict[str, Any]:
    """What readers built on transformers 4, MindIE among them, look for under other names, or else do without.

    Args:
        config: what config.json holds besides.
        engine_dtype: of the model where engines run it.
    """
    found: dict[str, Any] = {}
    stated = config.get("dtype") or config.get("torch_dtype")
    if stated is not None:
        # transformers 5 reads the first; engines have no float32, and scales are as theirs of bfloat16 have to be
        found |= {"dtype": stated, "torch_dtype": str(engine_dtype).removeprefix("torch.")}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        found["rope_theta"] = config.get("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            # transformers 5 takes it in the place of rope_parameters, so that it holds the same
            found["rope_scaling"] = config.get("rope_scaling") or rope_scaling(rope)
    return found
