"""The quantized model while it is made: what its tensors are on disk, and what its layers compute.

S tokens, E hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...architecture import Architecture
from ...runtime.cache.quantized_cache import QuantizedCache
from ...runtime.checkpoint.ascend import in_file_order
from ...runtime.checkpoint.buffers import read_scales
from ...runtime.checkpoint.files import TensorHeader
from ...runtime.compatibility import cache_argument
from ...runtime.decoder import decoder_layers
from ...runtime.quantized_linear import QuantizedLinear
from ...runtime.schemes.kv_scheme import Scheme
from ...runtime.schemes.linear_scheme import CPU_ACTIVATIONS, EMBEDDING
from ...runtime.static_scales import LayerScales, Scales
from ...runtime.weight_only_linear import WeightOnlyLinear
from ..calibration.streams import Stream
from ..plan import Plan, quantized_config
from ..source.layerwise import LayerwiseModel, assign_state, with_real_rotary
from ..source.probes import layer_arguments
from ..weights.embedding import embedding_parts, through_codes
from .shards import SAFETENSORS_DTYPES, header_of

ROWS_COPIED = 2**14


@contextmanager
def other_activations(module: nn.Module) -> Iterator[None]:
    """Within it, the weight-only linears of a module have the other of `cpu_activations`."""
    linears = [part for part in module.modules() if isinstance(part, WeightOnlyLinear)]
    kept = [linear.cpu_activations for linear in linears]
    try:
        for linear in linears:
            linear.cpu_activations = next(other for other in CPU_ACTIVATIONS if other != linear.cpu_activations)
        yield
    finally:
        for linear, own in zip(linears, kept, strict=True):
            linear.cpu_activations = own


class OutputModel:
    """The quantized model, of which one decoder layer is in memory at a time.

    Args:
        architecture: of the model.
        source: the float model.
        plan: what is made of it.
    """

    def __init__(self, architecture: Architecture, source: LayerwiseModel, plan: Plan) -> None:
        self._source, self._plan = source, plan
        self._config = quantized_config(source, plan)
        with torch.device("meta"):
            model = architecture.model_class(self._config)
        self._model = with_real_rotary(model, source.device)

    def module(self, name: str) -> nn.Module:
        """A module by its name; "" is the model itself."""
        return self._model.get_submodule(name)

    # What is written.

    def planned(self) -> dict[str, TensorHeader]:
        """Dtype and shape of every tensor of the output, in the order of the files."""
        tied = self.tied()
        found = {
            name: TensorHeader(self._stored_dtype(name, tensor), tuple(tensor.shape))
            for name, tensor in self._model.state_dict().items()
            if name not in tied
        }
        return in_file_order(self._model, found)

    def tied(self) -> list[str]:
        """Names of what the output shares with another tensor."""
        return sorted(self._source.tied) if self._config.tie_word_embeddings else []

    def tied_labels(self) -> dict[str, str]:
        """Label by name of the same."""
        return dict.fromkeys(self.tied(), EMBEDDING if self._plan.quantizes_embeddings else "FLOAT")

    def labels(self) -> dict[str, str]:
        """Label by name of what is quantized and stored: linears, and the embedding."""
        return self._plan.labels(self._source)

    def _stored_dtype(self, name: str, tensor: torch.Tensor) -> str:
        parent, _, part = name.rpartition(".")
        module = self.module(parent)
        if isinstance(module, QuantizedLinear):
            of_model = part in module.OF_MODEL
            return (self._source.source_dtype(name) or self._plan.dtype) if of_model else header_of(tensor).dtype
        is_added = part == "bias"
        return self._source.source_dtype(name) or (self._plan.dtype if is_added else header_of(tensor).dtype)

    def as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A float tensor in the dtype of the output; codes and scales as they are."""
        parent, _, part = name.rpartition(".")
        return tensor.to(SAFETENSORS_DTYPES[self._stored_dtype(name, self.module(parent).state_dict()[part])])

    def unchanged(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Tensors outside of the layers that stay as they are: name, rows, number of the first of them."""
        source, linears = self._source, self.labels()
        for name in self.planned():
            is_made = name == source.norm_name and source.facts.head in self._plan.linears
            if is_made or name.startswith(f"{source.layers_name}.") or name.rpartition(".")[0] in linears:
                continue
            yield from ((name, rows, first) for rows, first in self._rows(name))

    def _rows(self, name: str) -> Iterator[tuple[torch.Tensor, int]]:
        """A tensor of the source in parts: rows, number of the first of them."""
        source, file_name = self._source, self._source.file_name(name)
        count = source.files.placed[file_name].header.shape[0]
        for first in range(0, count, ROWS_COPIED):
            rows = source.files.rows(file_name, first, min(count, first + ROWS_COPIED))
            source.check_finite(name, rows)
            yield rows, first

    def embedding(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        """The tensors of an embedding in int8, as `unchanged` gives others; none of one in float."""
        name = self._source.embedding_name
        for rows, first in self._rows(f"{name}.weight") if self._plan.quantizes_embeddings else ():
            for part, tensor in embedding_parts(rows).items():
                yield f"{name}.{part}", tensor, first

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """`[1, S]` token ids to what the first layer is given, `[1, S, E]`."""
        rows = self._source.rows_of(ids)
        return self._source.states_of(through_codes(rows) if self._plan.quantizes_embeddings else rows)

    # What is computed.

    def computed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as a model in float32 holds it, on the device."""
        parent, _, part = name.rpartition(".")
        module = self.module(parent)
        of_linear = isinstance(module, QuantizedLinear) and part not in module.OF_MODEL
        keeps = of_linear or not tensor.is_floating_point()
        return tensor.to(self._source.device) if keeps else tensor.to(self._source.device).float()

    def loaded_layer(self, index: int, name: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
        """The layer that a load of the output gives, in float32.

        Args:
            name: of the layer.
            tensors: all of it, named for the file.
        """
        layer = decoder_layers(self._model)[index][1]
        assign_state(layer, {part.removeprefix(f"{name}."): self.computed(part, t) for part, t in tensors.items()})
        return layer

    def through(
        self, layer: nn.Module, index: int, stream: Stream, scheme: Scheme, most_tokens: int | None = None
    ) -> list[torch.Tensor]:
        """What a layer of it makes of the states of a stream, each text with a new cache of a scheme, `[1, S, E]` each.

        Args:
            most_tokens: that as many texts are taken of as have so many; None takes all.
        """
        stored: Scales = [LayerScales()] * len(self._source)
        if scheme.is_static:
            facts = self._source.facts
            attention = [(facts.attention.name, layer.get_submodule(facts.attention.name))]
            stored[index] = read_scales(attention, scheme, facts)[0]
        outputs, tokens = [], 0
        for state, mask in zip(stream.hidden, stream.masks, strict=True):
            if most_tokens is not None and tokens >= most_tokens:
                break
            tokens += state.shape[1]
            cache = QuantizedCache(self._config, scheme, scales=stored)
            given = {cache_argument(self._model.base_model): cache}
            arguments = layer_arguments(self._model, state, attention_mask=mask, **given)
            outputs.append(layer(state, **arguments[index]))
        return outputs
