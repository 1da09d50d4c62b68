"""What a checkpoint tells of quantizing its keys: biases, norms and one projection of K at a time, never the model.

RMSNorm hands attention inputs of unit root mean square (rms) times its weight g. If they prefer no direction, the rms
of channel d of a key, before its bias b, is

    s_d = sqrt(sum_j (W_dj g_j)^2)        or, where keys are normalized themselves (Qwen3), |g_d| of that norm

RoPE turns channels d and d + D/2 into one another, so both count as the mean of their pair, r_d = sqrt((s_d^2 +
s_{d+D/2}^2) / 2), and the bias of both as the pair's radius c_d = sqrt(b_d^2 + b_{d+D/2}^2). A channel then reaches
`reach_d = c_d + 3 r_d`, 3 rms being about the largest of 64 to 128 Gaussian values; calibration statistics, if there
are any, replace it by the radius that was seen. With s the mean of a head's s_d, which an outlier hardly moves:

    token    an integer scale per token or head grows with max_d reach_d, and so does the error of every channel, next
             to the 3 s of a Gaussian key of the same size: log2(max_d reach_d / 3s) bits are lost
    tensor   the same with the largest reach of all heads
    block    the same with the rms of the largest reaches of each 32 channels of a token
    fp8      the error of a value is a share of the value (e4m3: at most 2^-4), whatever the scale: next to a key
             without bias, log2(sqrt(1 + |b|^2 / |s_d|^2)) bits are lost
    channel  0: the error of a channel is its own. (With few bits a large bias in a fast pair costs something even so,
             unless it is folded; this is left out.)

A layer counts by its worst head. How that compares with Qwen2.5-Coder-0.5B, K of one layer quantized at a time (KL from
the float model over 256 tokens, bits lost as of "token"):

    layer                      0      1      2      8      4      3    the 18 others
    bits lost                8.4    6.2    4.6    6.2    3.9    3.4    at most 2.4
    int8 per token         0.049   7e-4   3e-4   3e-3   1e-4   3e-5    3e-6 to 3e-5
    int4 per token         0.297  0.034  0.052  0.037  0.025  0.003    5e-4 to 0.006
    fp8 per token          0.043  0.003  0.002   5e-4   6e-4   3e-4    5e-5 to 3e-4
    int8 per channel        2e-4   3e-5   3e-5   3e-5   2e-5   2e-5    6e-6 to 5e-5

These are orders of magnitude: inputs do have directions, and a layer may matter more than another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..architecture import architecture_of
from ..convert.output.shards import TensorFiles
from ..convert.source.checkpoint import read_source_headers, source_files
from ..errors import OctavoError, first_line
from ..runtime.bias_fold import can_fold_key_bias
from ..runtime.cache.sliding import sliding_windows
from ..runtime.model_sizes import attention_sizes
from ..runtime.rotary import rope_constants
from ..runtime.static_scales import Statistics, of_channels, rotary_radius

PEAK = 3.0
"""The largest of a head's channels in units of their rms, for a Gaussian key."""
BLOCK = 32
TINY = torch.finfo(torch.float32).tiny
STRAINED = 3.0
"""Bits lost from which less than a bit of int4 is left."""
KINDS = {
    "token": "one integer scale per token or head",
    "tensor": "one integer scale for all heads",
    "block": "integer scales per block of 32 channels",
    "fp8": "floating-point codes",
    "channel": "scales per channel",
}
BROKEN = {kind: 3.0 if kind == "fp8" else 4.0 for kind in KINDS}
"""Bits lost from which a layer breaks a scheme: int8 is no better than int4 then, of int4 nothing is left, and of the
three bits of an e4m3 mantissa neither."""
ATTENTIONS = ("full_attention", "sliding_attention")
"""Layer types whose keys the cache can hold."""


class KeyWeights:
    """What makes the keys of a float checkpoint, read one tensor at a time: biases, norms and projections.

    Attributes:
        headers: dtype and shape of each tensor of the checkpoint, by name.
        key_is_normalized: whether keys have norms of their own.
        folds_key_bias: whether a bias of K can be folded in every layer.

    Raises:
        OctavoError: no anatomy is stated of its architecture, or there are no sound files.
    """

    def __init__(self, directory: Path, config: Any) -> None:
        self._where, self._config = f"--model_path {directory}", config
        try:
            self._architecture = architecture_of(config)
        except OctavoError as error:
            raise OctavoError(f"{self._where}: {error}") from None
        self._decoder = self._architecture.decoder
        self.headers = read_source_headers(directory)
        self._files = TensorFiles(source_files(directory))
        self.key_is_normalized = self._decoder.attention.key_norm is not None
        layers = range(config.num_hidden_layers)
        self.folds_key_bias = all(can_fold_key_bias(config, self._decoder, index) for index in layers)

    def name(self, layer: int, module: str, part: str = "weight") -> str:
        """Name of a tensor of a layer."""
        return f"{self._architecture.layer_name(layer)}.{module}.{part}"

    def embedding_rows(self, count: int) -> torch.Tensor:
        """The first rows of each of some evenly spaced parts of the embedding, about `count` `[.., E]` in float32."""
        name = f"{self._architecture.layer_name(0).removesuffix(f'{self._decoder.layers}.0')}{self._decoder.embedding}"
        total, parts = self.headers[f"{name}.weight"].shape[0], 8
        starts = range(0, total, max(1, -(-total // parts)))
        rows = max(1, count // len(starts))
        read = (self._files.rows(f"{name}.weight", start, min(total, start + rows)) for start in starts)
        return torch.cat(list(read)).float()

    def key_name(self, layer: int) -> str:
        """Name of the weight that makes the keys of a layer."""
        return self.name(layer, self._decoder.attention.key)

    def read(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor in float32.

        Raises:
            OctavoError: it is missing, of another shape, or holds NaN or Inf.
        """
        if name not in self.headers:
            raise OctavoError(
                f"{self._where}: {name} is missing; the doctor reads whole decoders whose tensors are named so"
            )
        if self.headers[name].shape != shape:
            stored = list(self.headers[name].shape)
            raise OctavoError(f"{self._where}: {name} is {stored} and config.json makes it {list(shape)}")
        try:
            tensor = self._files.read(name).float()
        except OSError as error:
            raise OctavoError(f"{self._where}: {name} cannot be read ({first_line(error)})") from None
        if not torch.isfinite(tensor).all():
            raise OctavoError(f"{self._where}: {name} holds NaN or Inf; the checkpoint is damaged")
        return tensor

    def _of_part(self, part: str, layer: int, end: str, *others: int) -> torch.Tensor | None:
        """The rows `[G D, ...]` of k or v in what makes them; None if there is no such tensor."""
        heads, kv_heads, head_dim = attention_sizes(self._config)
        facts = self._decoder.attention
        name = self.name(layer, getattr(facts, part), end)
        if name not in self.headers and end == "bias":
            return None
        if not facts.is_fused:
            return self.read(name, kv_heads * head_dim, *others)
        first = (heads if part == "key" else heads + kv_heads) * head_dim
        return self.read(name, (heads + 2 * kv_heads) * head_dim, *others)[first : first + kv_heads * head_dim]

    def bias(self, part: str, layer: int) -> torch.Tensor:
        """The bias of k or v, `[G, D]`; zeros where there is none."""
        _, kv_heads, head_dim = attention_sizes(self._config)
        found = self._of_part(part, layer, "bias")
        return torch.zeros(kv_heads, head_dim) if found is None else found.view(kv_heads, head_dim)

    def channel_rms(self, layer: int) -> torch.Tensor:
        """The rms of each channel of a key without bias, `[G, D]`."""
        _, kv_heads, head_dim = attention_sizes(self._config)
        facts, offset, hidden = self._decoder.attention, self._decoder.norm_offset, self._config.hidden_size
        if facts.key_norm is not None:
            gains = self.read(self.name(layer, facts.key_norm), head_dim) + offset
            return gains.abs().expand(kv_heads, head_dim)
        norm = self.read(self.name(layer, self._decoder.attention_norm), hidden) + offset
        weight = self._of_part("key", layer, "weight", hidden)
        return torch.linalg.vector_norm(weight * norm, dim=-1).view(kv_heads, head_dim)

    def check(self) -> None:
        """Raise an `OctavoError` if the formulas do not hold for this decoder, as far as config and names tell."""
        where = f"{self._where}: model_type {self._config.model_type!r}"
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"):
            if not getattr(self._config, name, None):
                raise OctavoError(f"{where} has no {name} in its config; the doctor reads decoders of the zoo")
        if self.name(0, self._decoder.attention_norm, "bias") in self.headers:
            raise OctavoError(f"{where} has norms with a bias; the doctor's formulas rest on RMSNorm")
        first = next((i for i, kind in enumerate(layer_types(self._config)) if kind in ATTENTIONS), None)
        if first is None:
            raise OctavoError(f"{where} has no layer of full or sliding attention; there is no K to judge")
        for module in self._decoder.attention.inputs:
            if self.name(first, module) not in self.headers:
                raise OctavoError(
                    f"{where}: {self.name(first, module)} is missing; the doctor reads decoders whose tensors are "
                    f"named as models/{self._architecture.name} states"
                )


@dataclass(frozen=True)
class LayerDiagnosis:
    """What one layer's keys are like.

    Attributes:
        layer: its index.
        key_bias, value_bias: norms of the biases of k and v, 0 where there are none.
        bias_pair: largest rotary pair of the key's bias in units of the mean rms of its head's channels without bias.
        key_size: that mean, of the head in which the bias is largest in its units.
        outlier: largest channel of a key without bias over the median channel of its head.
        lost: bits lost by kind of scale (`KINDS`), the bias being in the key.
        lost_folded: the same with the bias kept out of the cache.
    """

    layer: int
    key_bias: float
    value_bias: float
    bias_pair: float
    key_size: float
    outlier: float
    lost: dict[str, float]
    lost_folded: dict[str, float]


def is_broken(kind: str, lost: dict[str, float]) -> bool:
    """Whether a layer that loses so many bits breaks schemes of a kind of scale."""
    return lost[kind] >= BROKEN[kind]


def bits_lost(reach: torch.Tensor, bias: torch.Tensor, rms: torch.Tensor) -> dict[str, float]:
    """Bits that each kind of scale loses in the worst head (see the module).

    Args:
        reach: `[G, D]`, how large each channel gets.
        bias: `[G, D]`.
        rms: `[G, D]`, of each channel without bias.
    """
    size = rms.mean(dim=-1).clamp_min(TINY)
    blocks = torch.stack([block.amax(dim=-1) for block in reach.split(BLOCK, dim=-1)], dim=-1)
    ratios = {
        "token": reach.amax(dim=-1) / (PEAK * size),
        "tensor": reach.amax() / (PEAK * size),
        "block": blocks.square().mean(dim=-1).sqrt() / (PEAK * size),
        "fp8": (1 + bias.square().sum(dim=-1) / rms.square().sum(dim=-1).clamp_min(TINY)).sqrt(),
        "channel": torch.ones_like(size),
    }
    return {kind: max(0.0, float(ratio.amax().log2())) for kind, ratio in ratios.items()}


def _seen_radius(statistics: Statistics | None, name: str, shape: tuple[int, int]) -> torch.Tensor | None:
    """Radius of each pair from statistics for both its channels, `[G, D]`; None if they do not have it."""
    if statistics is None or name not in statistics.tensors:
        return None
    radius = of_channels(statistics.tensors[name], shape[1])
    if radius.shape != shape:
        raise OctavoError(f"--statistics: {name} is of another model, {list(radius.shape)} and not {list(shape)}")
    return radius


def diagnose_layer(weights: KeyWeights, config: Any, layer: int, statistics: Statistics | None) -> LayerDiagnosis:
    """Judge one layer.

    Raises:
        OctavoError: a tensor is missing, damaged or of another shape than the config's.
    """
    rms, stored_bias = weights.channel_rms(layer), weights.bias("key", layer)
    # a key that is normalized has its bias inside, and no more reaches the cache than the norm lets through
    bias = torch.zeros_like(stored_bias) if weights.key_is_normalized else stored_bias
    head_dim = rms.shape[-1]
    pairs = len(rope_constants(config, head_dim, layer)[0])
    radius, size_of_pair = (of_channels(rotary_radius(part, pairs), head_dim) for part in (bias, rms))
    pair = torch.cat((size_of_pair[:, : 2 * pairs] / 2**0.5, size_of_pair[:, 2 * pairs :]), dim=-1)
    seen = _seen_radius(statistics, f"layers.{layer}.k.radius", rms.shape)
    seen_folded = _seen_radius(statistics, f"layers.{layer}.k.folded.radius", rms.shape)
    if seen_folded is None and not bias.any():
        seen_folded = seen
    reach = radius + PEAK * pair if seen is None else seen
    reach_folded = PEAK * pair if seen_folded is None else seen_folded
    channels = rms if seen_folded is None else seen_folded
    size = rms.mean(dim=-1).clamp_min(TINY)
    in_units = radius.amax(dim=-1) / size
    return LayerDiagnosis(
        layer=layer,
        key_bias=float(stored_bias.norm()),
        value_bias=float(weights.bias("value", layer).norm()),
        bias_pair=float(in_units.amax()),
        key_size=float(size[in_units.argmax()]),
        outlier=float((channels.amax(dim=-1) / channels.median(dim=-1).values.clamp_min(TINY)).amax()),
        lost=bits_lost(reach, bias, rms),
        lost_folded=bits_lost(reach_folded, torch.zeros_like(bias), rms),
    )


def layer_types(config: Any) -> list[str]:
    """The kind of each layer: as the config lists them, but sliding where the cache finds a window and nowhere else."""
    full, sliding = ATTENTIONS
    listed = getattr(config, "layer_types", None) or [full] * config.num_hidden_layers
    found = zip(listed, sliding_windows(config), strict=True)
    return [sliding if window else full if kind in ATTENTIONS else kind for kind, window in found]


def diagnose_layers(weights: KeyWeights, config: Any, statistics: Statistics | None) -> Iterator[LayerDiagnosis]:
    """The diagnoses of all layers of full or sliding attention, one by one."""
    for layer, kind in enumerate(layer_types(config)):
        if kind in ATTENTIONS:
            yield diagnose_layer(weights, config, layer, statistics)
