"""What calibration leaves, saved once: every static scheme and every dialect derives its scales from it.

Tensors, for decoder layer `i` (H query heads, G KV heads, D head_dim), all float32:

    layers.{i}.{q,k}.max      [H or G, D]    largest |x| of each channel after RoPE
    layers.{i}.{q,k}.radius   [H or G, D/2]  largest sqrt(x_d^2 + x_{d+D/2}^2) of each rotary pair
    layers.{i}.v.max          [G, D]         largest |x| of each channel
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..ops.codes import CODE_RANGES, SMALLEST_SCALE
from .errors import OctavoError, first_line
from .scheme import Codec, Scheme

STATISTICS_FORMAT = "octavo-statistics-1"


@dataclass(frozen=True)
class LayerScales:
    """The static scales of one layer's attention.

    Attributes:
        key, value: scale and zero, each broadcastable to `[G, 1, D]`, float32; zero is None where symmetric. The
            pair is None where the codec is dynamic or none.
        query: `[H, 1, 1]` float32, or None.
    """

    key: tuple[torch.Tensor, torch.Tensor | None] | None = None
    value: tuple[torch.Tensor, torch.Tensor | None] | None = None
    query: torch.Tensor | None = None


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
        return int(self.metadata["num_hidden_layers"])

    def check_finite(self) -> None:
        """Raise an `OctavoError` that names the first tensor with a NaN or Inf."""
        for name, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                raise OctavoError(
                    f"calibration statistics: {name} holds NaN or Inf; the model overflows on the calibration text"
                )

    def save(self, file: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            OctavoError: it cannot be written.
        """
        try:
            save_file(self.tensors, file, metadata={**self.metadata, "format": STATISTICS_FORMAT})
        except (OSError, SafetensorError) as error:
            raise OctavoError(f"statistics file {file}: cannot be written ({first_line(error)})") from None


def load_statistics(file: str | Path) -> Statistics:
    """Read what `Statistics.save` wrote.

    Raises:
        OctavoError: the file is missing, no statistics file, damaged, or holds NaN or Inf.
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
    return statistics


def rotary_radius(x: torch.Tensor) -> torch.Tensor:
    """The length of each rotary pair, `[..., D] -> [..., D/2]`, which RoPE leaves the same at every position."""
    first, second = x.chunk(2, dim=-1)
    return torch.hypot(first, second)


def symmetric_scale(largest: torch.Tensor, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """The scale at which values up to `largest` fill the range of a code, stored as `dtype`, without clipping."""
    return (largest.float() / CODE_RANGES[dtype][1]).clamp_min(SMALLEST_SCALE)


def _static_scale(codec: Codec | None, largest: torch.Tensor) -> tuple[torch.Tensor, None] | None:
    """Scale of a codec from the bound of each channel, `[heads, D]`, as `[heads, 1, D or 1]`."""
    if codec is None or codec.dynamic:
        return None
    bound = largest if codec.granularity == "channel" else largest.amax(dim=-1, keepdim=True)
    return symmetric_scale(bound, codec.stored_dtype)[:, None, :], None


def scales_of(scheme: Scheme, statistics: Statistics) -> Scales:
    """Derive the static scales of a scheme.

    K and q take the radius of each rotary pair as the bound of both its channels: a range observed after RoPE holds
    only for the positions that were observed, since RoPE turns one channel of a pair into the other as they grow.
    """
    result = []
    for index in range(statistics.layers):
        part, tensors = scheme.of_layer(index), statistics.tensors
        key = _static_scale(part.key, tensors[f"layers.{index}.k.radius"].repeat(1, 2))
        value = _static_scale(part.value, tensors[f"layers.{index}.v.max"])
        query = _static_scale(part.query, tensors[f"layers.{index}.q.radius"].repeat(1, 2))
        result.append(LayerScales(key, value, query[0] if query else None))
    return result
