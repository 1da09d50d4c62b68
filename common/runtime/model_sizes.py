"""Sizes that a config.json states: whether they can be true, before anything is built or allocated by them."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import OctavoError

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Sizes of tensors, by their names in a config; none is larger than the largest tensor is wide."""
COUNTS = ("num_experts", "num_local_experts", "num_experts_per_tok")
"""Numbers of modules in a layer, by their names in a config."""
EPSILONS = ("_eps", "_epsilon")
"""Endings of what norms add to a variance."""
_STATES_ROPE = "5."
"""Versions of transformers that write `rope_parameters` into every config.json."""
KV_SHARE = "octavo_kv_share"
"""Of the config of one rank's model: which of the KV heads these are, in words; a whole model's has none."""
MOST_LAYERS = MOST_EXPERTS = 4096
MOST_SIZE = 2**24
MOST_TOKENS = 2**40


def head_dim_of(config: Any) -> int:
    """D of a model: what its config says, or the hidden size shared among the query heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads_of(config: Any) -> int:
    """G of a model: what its config says, or a KV head for each query head."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def attention_sizes(config: Any) -> tuple[int, int, int]:
    """H, G and D of a model."""
    return config.num_attention_heads, kv_heads_of(config), head_dim_of(config)


def check_cache_sizes(config: Any) -> None:
    """Raise an `OctavoError` if a config states sizes by which no cache can be made."""
    for name, bound in (("num_hidden_layers", MOST_LAYERS), ("hidden_size", MOST_SIZE), ("head_dim", MOST_SIZE)):
        value = getattr(config, name, None)
        if value is not None and (type(value) is not int or not 0 < value <= bound):
            raise OctavoError(f"config: {name} is {value!r}, no integer from 1 to {bound}; mend it")


def check_sizes(where: str, settings: Mapping[str, Any]) -> None:
    """Raise an `OctavoError` that names the first size of a config.json that no model has.

    Args:
        where: the file, for the message.
        settings: what it holds; sizes may be missing or None.
    """
    most = {"num_hidden_layers": MOST_LAYERS, **dict.fromkeys(SIZES, MOST_SIZE), **dict.fromkeys(COUNTS, MOST_EXPERTS)}
    most["max_position_embeddings"] = MOST_TOKENS
    for name, bound in most.items():
        value = settings.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= bound):
            raise OctavoError(f"{where}: {name} is {value!r}, no integer from 1 to {bound}; copy it again")
    for name, value in settings.items():
        if not _is_finite_data(value):
            raise OctavoError(f"{where}: {name} holds NaN or Infinity; copy it again")
        if name.endswith(EPSILONS) and type(value) in (int, float) and value <= 0:
            raise OctavoError(f"{where}: {name} is {value}, and a norm adds a positive number; copy it again")


def _is_finite_data(data: Any) -> bool:
    """Whether all numbers of plain data are finite."""
    if isinstance(data, (dict, list)):
        return all(map(_is_finite_data, data.values() if isinstance(data, dict) else data))
    return not isinstance(data, float) or math.isfinite(data)


def check_stated(where: str, settings: Mapping[str, Any]) -> None:
    """Raise an `OctavoError` if config.json leaves out what transformers would put a number of its own for.

    Args:
        where: the file, for the message.
        settings: what it holds.
    """
    if settings.get("rms_norm_eps") is None:
        raise OctavoError(f"{where}: rms_norm_eps is missing, and what takes its place need not be right; add it")
    written_by, parameters = str(settings.get("transformers_version")), settings.get("rope_parameters")
    parts = parameters.values() if isinstance(parameters, dict) else ()
    of_layers = [part for part in parts if isinstance(part, dict)]  # by kind of layer, where they differ
    has_base = any(isinstance(part, dict) and "rope_theta" in part for part in (settings, parameters))
    if of_layers:
        has_base = all("rope_theta" in part for part in of_layers)
    if written_by.startswith(_STATES_ROPE) and not has_base:
        raise OctavoError(
            f"{where}: rope_theta is missing in rope_parameters, where transformers {written_by} writes it; add it"
        )


def check_sizes_stored(where: str, settings: Mapping[str, Any], layers: int, largest: int) -> None:
    """Raise an `OctavoError` if a config states sizes that its weights cannot have.

    Args:
        where, settings: as of `check_sizes`.
        layers: decoder layers that the names of the weights tell of.
        largest: of the dimensions of all stored tensors, where what is packed counts unpacked.
    """
    stated = settings.get("num_hidden_layers")
    if stated is not None and stated != layers:
        raise OctavoError(
            f"{where}: num_hidden_layers is {stated}, and the weights are those of {layers} layers; copy the directory "
            "again"
        )
    for name in SIZES:
        value = settings.get(name)
        if value is not None and value > largest:
            raise OctavoError(
                f"{where}: {name} is {value}, and no stored tensor is wider than {largest}; copy the directory again"
            )
