"""The load of a checkpoint by one of several ranks: config, headers and tensors of its share."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import OctavoError
from ..checkpoint.ascend import linear_layout
from ..checkpoint.files import TensorHeader
from .ranks import Ranks
from .shares import Shares, shared_tensors


@dataclass(frozen=True)
class Shared:
    """What a rank loads.

    Attributes:
        ranks: all of them, and which this is.
        shares: the parts of each tensor.
        stored: headers of the whole tensors, by name.
        headers: those of the parts.
        extra_inputs: see `Shares.extra_inputs`.
    """

    ranks: Ranks
    shares: Shares
    stored: Mapping[str, TensorHeader]
    headers: Mapping[str, TensorHeader]
    extra_inputs: dict[str, int]


def shared_checkpoint(
    ranks: Ranks, model_class: Any, config: Any, source: str, stored: Mapping[str, TensorHeader]
) -> tuple[Any, Shared]:
    """The config of a rank's model, and what it loads.

    Args:
        ranks: all of them, and which this is.
        model_class: of the zoo.
        config: of the whole model, with what `describe_checkpoint` put there.
        source: local directory or hub id.
        stored: headers of all tensors by name.

    Raises:
        OctavoError: the model cannot be shared among so many ranks, or is not in safetensors.
    """
    if not stored:
        raise OctavoError(f"{source}: tp_plan reads shares of safetensors files, and there are none; save it as such")
    config = copy.deepcopy(config)
    recipe = getattr(config, "octavo", None) or {}
    labels = recipe.get("quantized_linears", {})
    shares = Shares(ranks, model_class.octavo_decoder, config, model_class.base_model_prefix, labels)
    headers = {}
    for name, header in stored.items():
        share = shares.of(name, stored)
        headers[name] = header if share is None else TensorHeader(header.dtype, share.shape_of(header.shape))
    extra = shares.extra_inputs(stored)
    shared = Shared(ranks, shares, stored, headers, extra)
    config = shares.config()
    if labels:
        config.octavo = {**recipe, **linear_layout(labels, headers), "extra_inputs": extra}
    return config, shared


def shared_state(shared: Shared, files: Any) -> dict[str, Any]:
    """What a rank loads of the tensors of some files, by name, each read when it is asked for."""
    return shared_tensors(shared.shares, shared.stored, list(files))
