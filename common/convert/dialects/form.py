"""What a dialect is asked to write, before a tensor is read: the model, its linears and its cache.

It is made of a converted directory, or of the plan of a conversion, so that what a format cannot say is refused before
anything is computed.
"""

from dataclasses import dataclass, replace
from typing import Any

from ...architecture import Architecture
from ...runtime.schemes.kv_scheme import Scheme


@dataclass(frozen=True)
class LinearForm:
    """A quantized linear layer, N x K.

    Attributes:
        label: one of `LINEAR_LABELS`.
        out_features, in_features: N and K.
        group_size: input channels that share a scale of the weight; 0 where an output channel has one.
        symmetric: whether the weight has no zero points.
        per_tensor: whether one scale is for the whole weight.
        has_bias: whether there is one.
        symmetric_inputs: whether static inputs have no zero point.
    """

    label: str
    out_features: int
    in_features: int
    group_size: int = 0
    symmetric: bool = True
    per_tensor: bool = False
    has_bias: bool = False
    symmetric_inputs: bool = True


@dataclass(frozen=True)
class Form:
    """A quantized model without its tensors.

    Attributes:
        architecture: of the model.
        config: as transformers reads it.
        scheme: of attention and cache, as its scales are meant.
        linears: by name, all that are in codes, the last one among them where it is.
        float_linears: names of those in float.
        has_coded_embedding: whether the embedding is in int8.
        added_biases: names of modules with a bias that the architecture itself has none for.
        folds: whether the scales are of K or V without the bias of their projection.
        dtype: of floats, as safetensors spells it.
        calibrates: whether a conversion is to make it, which finds static scales by itself.
    """

    architecture: Architecture
    config: Any
    scheme: Scheme
    linears: dict[str, LinearForm]
    float_linears: tuple[str, ...]
    has_coded_embedding: bool
    added_biases: tuple[str, ...]
    folds: bool
    dtype: str
    calibrates: bool = False

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    @property
    def head(self) -> str:
        """Name of the last linear."""
        return self.architecture.decoder.head

    @property
    def embedding(self) -> str:
        """Name of the embedding."""
        return f"{self.architecture.model_class.base_model_prefix}.{self.architecture.decoder.embedding}"

    def attention(self, index: int) -> str:
        """Name of the attention of a layer."""
        return f"{self.architecture.layer_name(index)}.{self.architecture.decoder.attention.name}"

    def schemes(self) -> list[Scheme]:
        """The scheme of each layer."""
        return [self.scheme.of_layer(index) for index in range(self.layers)]

    def float_layers(self) -> list[int]:
        """Layers whose attention and cache stay in float, of a model in which others do not."""
        floats = [index for index, scheme in enumerate(self.schemes()) if not scheme.is_quantized]
        return floats if len(floats) < self.layers else []


def as_engines_hold(scheme: Scheme) -> Scheme:
    """A scheme for K and V as the engines cache them: after RoPE, biases counted in, and not turned."""
    layers = {text: _plain(other) for text, other in scheme.layers}
    return replace(scheme, fold_bias=False, rotate_key=False, rotate_value=False, layers=tuple(layers.items()))


def _plain(fields: Any) -> Any:
    if isinstance(fields, str):
        return fields
    return {name: value for name, value in fields.items() if name not in ("fold_bias", "rotate_key", "rotate_value")}
