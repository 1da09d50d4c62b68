"""Static scales of K, V and q that a quantized checkpoint keeps with its attentions, as engines load them.

`x = (code - zero) * scale`, of K after RoPE and with the biases of the projections. H query heads, G KV heads, D
head_dim.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ....errors import OctavoError
from ....runtime.checkpoint.buffers import constant_shapes
from ....runtime.linear_values import are_offsets, are_scales
from ....runtime.schemes.kv_scheme import Scheme
from ....runtime.static_scales import LayerScales
from ...dialects.layouts import compressed_tensors, fp8_block
from ...spelling import named

PARTS = tuple(f"{side}_{part}" for side in "kvq" for part in ("scale", "zero_point"))
"""Ends of the names, behind that of an attention or, as ModelOpt has them, of a projection of it."""
_SIDES = {"key": "k", "value": "v", "query": "q"}
_DTYPES = {("float", 8): "fp8_e4m3", ("int", 8): "int8"}

Read = Callable[[str], torch.Tensor]


def cache_dtype(config: Mapping[str, Any]) -> str | None:
    """What codes of K and V are in by a `quantization_config`, as a `Codec` says it; None where it does not say."""
    if config.get("quant_method") == fp8_block.METHOD:
        return "fp8_e4m3"
    if config.get("quant_method") != compressed_tensors.METHOD:
        return None
    groups = (config.get("config_groups") or {}).values()
    of_attention = (group.get("input_activations") for group in groups if _is_for_attention(group))
    stated = config.get("kv_cache_scheme") or next(of_attention, None) or {}
    return _DTYPES.get((stated.get("type"), stated.get("num_bits")))


def _is_for_attention(group: Mapping[str, Any]) -> bool:
    return any(str(target).endswith("Attention") for target in group.get("targets") or ())


def lacks_query(scheme: Scheme, found: Sequence[LayerScales]) -> bool:
    """Whether scales of `CacheScales.of_layers` leave that of a q out that a scheme quantizes by one of calibration."""
    layers = (scheme.of_layer(index) for index in range(len(found)))
    return any(
        layer.query is not None and layer.query.is_calibrated and kept.query is None
        for layer, kept in zip(layers, found, strict=True)
    )


def _field() -> str:
    return f"{named('kv_scales')} source"


class CacheScales:
    """The static scales that a checkpoint keeps.

    Args:
        names: of the tensors.
        dtype: as of `cache_dtype`.
        read: reads one.
    """

    def __init__(self, names: Sequence[str], dtype: str | None, read: Read) -> None:
        self.names, self.dtype, self._read = names, dtype, read

    def of_layers(
        self, scheme: Scheme, attentions: Sequence[str], prefix: str, sizes: tuple[int, int, int]
    ) -> tuple[LayerScales, ...]:
        """The scales of each layer as a scheme has them, the very numbers that are stored.

        Args:
            scheme: of attention and cache, in which K and V are as engines hold them.
            attentions: their names, layer by layer.
            prefix: of the decoder within the model, which names in the files may leave out.
            sizes: H, G and D.

        Returns:
            for each layer; `query` is None where the checkpoint keeps none.

        Raises:
            OctavoError: there are none, or not those that the scheme takes.
        """
        if not self.names:
            raise OctavoError(f"{_field()}: the source keeps no static scales of K and V; leave it out")
        found = []
        for index, attention in enumerate(attentions):
            layer = scheme.of_layer(index)
            shapes = constant_shapes(layer, *sizes)
            self._check_kind(layer)
            places = attention, attention.removeprefix(f"{prefix}.")
            pairs = {part: self._pair(places, part, layer, shapes) for part in _SIDES if f"{part}_scale" in shapes}
            query = pairs.get("query")
            found.append(LayerScales(pairs.get("key"), pairs.get("value"), None if query is None else query[0]))
        return tuple(found)

    def _check_kind(self, scheme: Scheme) -> None:
        """Raise an `OctavoError` unless codes of a layer are in what the scales of the checkpoint are for."""
        for part in _SIDES:
            codec = getattr(scheme, part)
            if codec is None or not codec.is_calibrated:
                continue
            if codec.levels == "calibrated" or codec.before_rope:
                raise OctavoError(
                    f"{_field()}: {part} of scheme {scheme.name} is of codebooks or before RoPE, which scales of a "
                    "checkpoint are not; leave it out"
                )
            if codec.dtype != self.dtype:
                raise OctavoError(
                    f"{_field()}: {self.names[0]} is for codes in {self.dtype or 'what is not said'}, and {part} of "
                    f"scheme {scheme.name} is in {codec.dtype}; choose another {named('scheme')}"
                )

    def _stored_name(self, places: Sequence[str], side: str, end: str) -> str | None:
        """The name of a tensor in the files, by the names that its attention may have."""
        modules = (f"{place}{inner}" for place in places for inner in ("", f".{side}_proj"))
        return next((name for module in modules if (name := f"{module}.{side}_{end}") in self.names), None)

    def _pair(
        self, places: Sequence[str], part: str, scheme: Scheme, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Scale and zero of K, V or q of a layer; None of a q that has none."""
        side, shape = _SIDES[part], shapes[f"{part}_scale"]
        name = self._stored_name(places, side, "scale")
        if name is None and part == "query":
            return None
        if name is None:
            raise OctavoError(f"{_field()}: the source has no {places[0]}.{side}_scale; leave it out")
        scale = self._shaped(name, shape, part, scheme)
        if not are_scales(scale):
            raise OctavoError(f"{name} is no positive number throughout; the checkpoint is damaged, or not calibrated")
        zero_name = self._stored_name(places, side, "zero_point")
        zero = torch.zeros(shape) if zero_name is None else self._shaped(zero_name, shape, part, scheme)
        if not are_offsets(zero):
            raise OctavoError(f"{zero_name} is no whole number from -128 to 127; the checkpoint is damaged")
        if f"{part}_zero" in shapes:
            return scale, zero
        if bool(zero.any()):
            raise OctavoError(
                f"{_field()}: {zero_name} is not 0, and {part} of scheme {scheme.name} has no zero "
                f"points; choose another {named('scheme')}"
            )
        return scale, None

    def _shaped(self, name: str, shape: tuple[int, ...], part: str, scheme: Scheme) -> torch.Tensor:
        found, granularity = self._read(name).float(), getattr(scheme, part).granularity
        if found.numel() != torch.Size(shape).numel():
            raise OctavoError(
                f"{_field()}: {name} holds {found.numel()} numbers, and {part} of scheme {scheme.name} takes "
                f"{torch.Size(shape).numel()}, per {granularity}; choose another {named('scheme')}"
            )
        return found.reshape(shape).contiguous()
