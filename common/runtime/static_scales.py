"""What calibration leaves, saved once: every static scheme and every dialect derives its scales from it.

Tensors, for decoder layer `i` (H query heads, G KV heads, D head_dim), all float32:

    layers.{i}.{q,k}.radius       [H or G, D/2]  largest sqrt(x_d^2 + x_{d+D/2}^2) of each rotary pair; where
                                                 RoPE turns R channels alone, [H or G, D - R/2]: those, and then the
                                                 largest |x| of each other channel
    layers.{i}.v.{low,high}       [G, D]         smallest and largest x of each channel
    layers.{i}.k.folded.radius, layers.{i}.v.folded.{low,high}: the same without the bias of the projection, if any
    layers.{i}.k.before.{low,high}  [G, D]       ends of the codebook of each channel before RoPE (`codebooks.py`)
    layers.{i}.{k,v}.levels.{bits}  [2**bits]    codebooks (`codebooks.py`)
    layers.{i}.k.mean, layers.{i}.k.folded.mean  [G, D]  mean before RoPE, with and without the bias (`bases.py`)
    layers.{i}.k.balanced, layers.{i}.{k,v}.oscar  [G, D, D]  bases: x becomes x M (`bases.py`)
    layers.{i}.k.sharpness        [1]            what errors of K cost where a text repeats itself (`sharpness.py`)
    linears.{name}.{low,high,mean_abs,mean_square}  [K]  of each input channel of a linear layer

Files of earlier versions hold `layers.{i}.{q,k}.max`, too, which nothing is derived from.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...ops.shared.codes import INT8_MAX, SMALLEST_SCALE
from ..errors import OctavoError, first_line
from .schemes.kv_scheme import Scheme
from .schemes.tensor_codec import Codec
from .statistics_checks import check_statistics, check_statistics_of, layer_count

STATISTICS_FORMAT = "octavo-statistics-2"


@dataclass(frozen=True)
class LayerScales:
    """The static scales of one layer's attention.

    Attributes:
        key, value: scale and zero, each broadcastable to `[G, 1, D]`, float32; zero is None where symmetric. The
            pair is None where the codec is dynamic or none.
        query: `[H or 1, 1, 1]` float32, or None.
        key_levels, value_levels: codebooks, float32 `[2**bits]`, where the levels are calibrated.
        folded: whether key and value are for states without the biases of their projections.
        key_mean: float32 `[G, 1, D]`, of K before RoPE, where it is stored less that.
        key_basis, value_basis: float32 `[G, D, D]`, of which x M is stored.
        is_sharp: whether K has the wider codes of a scheme that leaves it to calibration in which layers it has; None
            of other schemes.
    """

    key: tuple[torch.Tensor, torch.Tensor | None] | None = None
    value: tuple[torch.Tensor, torch.Tensor | None] | None = None
    query: torch.Tensor | None = None
    key_levels: torch.Tensor | None = None
    value_levels: torch.Tensor | None = None
    folded: bool = False
    key_mean: torch.Tensor | None = None
    key_basis: torch.Tensor | None = None
    value_basis: torch.Tensor | None = None
    is_sharp: bool | None = None


Scales = list[LayerScales]


@dataclass(frozen=True)
class Statistics:
    """Named tensors (see the module) and where they come from.

    Attributes:
        tensors: name to tensor.
        metadata: `model_type`, `num_hidden_layers`, `tokens` calibrated on, as text.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return layer_count(self.metadata)

    def check_finite(self) -> None:
        """Raise an `OctavoError` that names the first tensor with a NaN or Inf."""
        for name, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                raise OctavoError(
                    f"calibration statistics: {name} holds NaN or Inf; the model overflows on the calibration text"
                )

    def check_model(self, config: Any) -> None:
        """Raise an `OctavoError` that names what is not of the model of a config: type, layers, heads, head_dim."""
        check_statistics_of(self.tensors, self.metadata, config)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            OctavoError: it cannot be written.
        """
        try:
            save_file(self.tensors, file, metadata={**self.metadata, "format": STATISTICS_FORMAT})
        except (OSError, SafetensorError) as error:
            raise OctavoError(f"statistics file {file}: cannot be written ({first_line(error)})") from None


def statistics_facts(config: Any, tokens: int) -> dict[str, str]:
    """The metadata of the statistics of a model calibrated on so many tokens."""
    facts = {"model_type": config.model_type, "num_hidden_layers": config.num_hidden_layers, "tokens": tokens}
    return {name: str(value) for name, value in facts.items()}


def load_statistics(file: str | Path) -> Statistics:
    """Read what `Statistics.save` wrote.

    Raises:
        OctavoError: the file is missing, no statistics file or damaged: a tensor, named, that no statistics hold, of
            another shape, out of range, or missing.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError) as error:
        raise OctavoError(
            f"statistics file {file}: cannot be read ({error}); write it with --save_statistics"
        ) from None
    if metadata.get("format") != STATISTICS_FORMAT:
        raise OctavoError(f"statistics file {file}: no Octavo statistics; write it with --save_statistics")
    statistics = Statistics(tensors, metadata)
    statistics.check_finite()
    check_statistics(tensors, metadata)
    return statistics


def rotary_radius(x: torch.Tensor, pairs: int | None = None) -> torch.Tensor:
    """The length of each rotary pair, `[..., D] -> [..., D / 2]`, which RoPE leaves the same at every position.

    Args:
        pairs: R / 2, where RoPE turns the first R channels only; the others, as they are turned by nothing, follow with
            their sizes: `[..., D - R / 2]`.
    """
    turned = x.shape[-1] if pairs is None else 2 * pairs
    first, second = x[..., :turned].chunk(2, dim=-1)
    radius = torch.hypot(first, second)
    return radius if turned == x.shape[-1] else torch.cat((radius, x[..., turned:].abs()), dim=-1)


def of_channels(radius: torch.Tensor, head_dim: int) -> torch.Tensor:
    """What `rotary_radius` found of each of D = `head_dim` channels: `[..., D - R / 2] -> [..., D]`."""
    pairs = head_dim - radius.shape[-1]
    return torch.cat((radius[..., :pairs], radius[..., :pairs], radius[..., pairs:]), dim=-1)


def symmetric_scale(largest: torch.Tensor, most: float = INT8_MAX) -> torch.Tensor:
    """The scale at which `largest` becomes `most` units of codes."""
    return (largest.float() / most).clamp_min(SMALLEST_SCALE)


def _shared(codec: Codec, bound: torch.Tensor, largest: bool = True) -> torch.Tensor:
    """Bounds of each channel `[heads, D]` as those of what shares a scale: `[heads or 1, 1, D or 1]`."""
    if codec.granularity == "channel":
        return bound[:, None]
    dims = (0, 1) if codec.granularity == "tensor" else (1,)
    return (bound.amax(dim=dims) if largest else bound.amin(dim=dims)).view(-1, 1, 1)


def static_scale(
    codec: Codec | None, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Scale and zero of a codec from the smallest and largest value of each channel, `[heads, D]`.

    Affine: the middle of the range is code 0 and its head_dim 255 steps (LMDeploy's zp = (min + max) / 2 and
    scale = (max - min) / 255, the zero point in units of codes), or with a codebook 2, from -1 to 1.
    """
    if codec is None or codec.dynamic or codec.fixed_scale:
        return None
    if codec.symmetric:
        return symmetric_scale(_shared(codec, torch.maximum(-low, high)), codec.most), None
    least, most = _shared(codec, low, largest=False), _shared(codec, high)
    first, last = codec.ends
    scale = ((most - least) / (last - first)).clamp_min(SMALLEST_SCALE)
    return scale, -(most + least) / 2 / scale


def _levels(codec: Codec | None, statistics: Statistics, name: str) -> torch.Tensor | None:
    if codec is None or codec.levels != "calibrated":
        return None
    found = statistics.tensors.get(f"{name}.levels.{codec.bits}")
    if found is None:
        raise OctavoError("these statistics hold no codebooks; convert again with a kvquant scheme to make them")
    return found


def _bound(parts: torch.Tensor, head_dim: int, is_turned: bool) -> torch.Tensor:
    """What no channel exceeds, `[heads, D]`, from the largest of each part of a head, as `rotary_radius` gives them.

    After a rotation that is no more than the length of all parts together. For fp8, whose codes are floats, a bound
    that is hardly reached costs nothing; int8 loses bits to it.
    """
    return of_channels(parts.norm(dim=-1, keepdim=True).expand_as(parts) if is_turned else parts, head_dim)


def scales_of_layer(scheme: Scheme, statistics: Statistics, index: int) -> LayerScales:
    """Derive the static scales of a scheme for one layer.

    K and q take the radius of each rotary pair as the bound of both its channels: a range observed after RoPE holds
    only for the positions that were observed, since RoPE turns one channel of a pair into the other as they grow.

    Raises:
        OctavoError: the statistics lack what the scheme needs.
    """
    tensors = statistics.tensors
    part, name = scheme.of_layer(index), f"layers.{index}"
    folded = part.fold_bias and any(f"{name}.{side}" in tensors for side in ("k.folded.radius", "v.folded.low"))
    of_key, of_value = (
        f"{name}.{side}.folded" if folded and f"{name}.{side}.folded.{kind}" in tensors else f"{name}.{side}"
        for side, kind in (("k", "radius"), ("v", "low"))
    )
    key_levels, value_levels = (
        _levels(part.key, statistics, f"{name}.k"),
        _levels(part.value, statistics, f"{name}.v"),
    )
    if key_levels is not None and f"{name}.k.folded.radius" in tensors and not folded:
        raise OctavoError(f"scheme {part.name}: codebooks are for K without its bias; leave 'fold_bias' at true")
    low, high = tensors[f"{of_value}.low"], tensors[f"{of_value}.high"]
    bound, query_bound, value_bound = (
        _bound(tensors[f"{of_key}.radius"], low.shape[-1], part.rotate_key),
        _bound(tensors[f"{name}.q.radius"], low.shape[-1], part.rotate_key),
        _bound(torch.maximum(-low, high), low.shape[-1], part.rotate_value),
    )
    key_range = (-bound, bound)
    if key_levels is not None:
        key_range = tensors[f"{name}.k.before.low"], tensors[f"{name}.k.before.high"]
    value_range = (-value_bound, value_bound) if part.rotate_value else (low, high)
    query = static_scale(part.query, -query_bound, query_bound)
    value = static_scale(part.value, *value_range)
    is_folded = folded and part.is_static
    return LayerScales(
        static_scale(part.key, *key_range), value, query[0] if query else None, key_levels, value_levels, is_folded,
        *_bases(part, statistics, name, folded),
    )  # fmt: skip


def _bases(
    part: Scheme, statistics: Statistics, name: str, folded: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The mean of K of a layer, and the bases of K and V, where its scheme has them."""
    found = statistics.tensors
    mean = f"{name}.k.folded.mean" if folded and f"{name}.k.folded.mean" in found else f"{name}.k.mean"
    names = (
        mean if part.center_key else None,
        f"{name}.k.{part.key_basis}" if part.key_basis else None,
        f"{name}.v.{part.value_basis}" if part.value_basis else None,
    )
    if any(wanted is not None and wanted not in found for wanted in names):
        raise OctavoError(
            f"these statistics hold no bases; convert again with scheme {part.name} and --save_statistics to make them"
        )
    key_mean, key_basis, value_basis = (None if wanted is None else found[wanted] for wanted in names)
    return None if key_mean is None else key_mean[:, None], key_basis, value_basis


def sharpest(scheme: Scheme, statistics: Statistics) -> frozenset[int]:
    """The layers whose K a scheme gives wider codes: of those that are in codes the sharpest, as many as its share has.

    Raises:
        OctavoError: the statistics do not tell how sharp layers are.
    """
    layers = [index for index in range(statistics.layers) if index not in scheme.float_layers]
    found = {index: statistics.tensors.get(f"layers.{index}.k.sharpness") for index in layers}
    if any(sharpness is None for sharpness in found.values()):
        raise OctavoError(
            f"these statistics do not tell which layers are sharp; convert again with scheme {scheme.name} and "
            "--save_statistics to find them"
        )
    ranked = sorted(layers, key=lambda index: (-float(found[index]), index))
    return frozenset(ranked[: scheme.sharp_layers(statistics.layers)])


def scales_of(scheme: Scheme, statistics: Statistics) -> Scales:
    """Derive the static scales of a scheme for all layers; raises as `scales_of_layer` and `sharpest`."""
    scheme = scheme.of_model(statistics.layers)
    if not scheme.sharp_share:
        return [scales_of_layer(scheme, statistics, index) for index in range(statistics.layers)]
    sharp = sharpest(scheme, statistics)
    scales = scales_of(scheme.with_sharp(sharp), statistics)
    return [dataclasses.replace(layer, is_sharp=index in sharp) for index, layer in enumerate(scales)]


def settled(scheme: Scheme, scales: Scales) -> Scheme:
    """A scheme that leaves nothing to calibration any more: with the layers stated that scales say are sharp.

    Raises:
        OctavoError: the scheme leaves it to calibration, and the scales do not say.
    """
    if not scheme.sharp_share:
        return scheme
    if not scales or any(layer.is_sharp is None for layer in scales):
        raise OctavoError(f"scheme {scheme.name}: its scales do not tell which layers are sharp; pass statistics=FILE")
    return scheme.with_sharp(index for index, layer in enumerate(scales) if layer.is_sharp)
