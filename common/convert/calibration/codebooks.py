"""Calibration of codebooks: levels of the codes of K and V that lie where the values are and the loss feels them.

KVQuant (Hooper et al., arXiv 2401.18079, section 3): the levels of a layer minimize `sum_i F_i (x_i - Q(x_i))^2`, where
F_i is the square of the gradient of the language-model loss by x_i, the diagonal of the Fisher information. Values are
normalized, the ends of their range to -1 and 1, K per channel before RoPE, V per token; outliers are kept apart. Here
the gradients are by the normalized values too, so that the sum is that of the values themselves.

B batch (1), G KV heads, S tokens, D head_dim, R rows: a token of a head each.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ....ops.shared.registry import NAMESPACE
from ...architecture import stated_or_known
from ...errors import OctavoError
from ...runtime.cache.code_store import split_outliers
from ...runtime.cache.dynamic_scales import group_scale
from ...runtime.decoder import attention_modules
from ...runtime.rotary import rotated_by_slot
from ...runtime.schemes.tensor_codec import Codec
from ...runtime.static_scales import Statistics, static_scale
from .observe import attention_replaced, differentiable, left_out_biases

FITTING = f"{NAMESPACE}_fit"
SKIPPED_TOKENS = 1
"""Tokens at the start of a sample that are left out: attention sinks, whose K and V are unlike all others."""
OUTSIDE = 0.01
"""Part of the values of a channel of K that lies outside its range, half on each side."""
MOST_VALUES = 2**17
"""Values of K, and of V, that the codebooks of a layer are found from."""
KEY_CODEC = Codec("int4", "channel", symmetric=False, levels="calibrated", outliers=1, before_rope=True)
VALUE_CODEC = Codec("int4", "token", dynamic=True, symmetric=False, scale_dtype="float16", levels="calibrated",
                    outliers=1)  # fmt: skip
"""How K and V are normalized, which is the same for any number of levels."""
ITERATIONS = 300
BINS_OF_START = 512


def _start_levels(values: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """Levels to start from: quantiles of the cube root of the weighted density.

    This is the density of the best levels as their number grows (Panter and Dite, "Quantization distortion in
    pulse-count modulation with nonuniform spacing of levels", 1951).
    """
    low, high = values[0], values[-1]
    width = (high - low) / BINS_OF_START
    bins = ((values - low) / width).nan_to_num(0.0).long().clamp(0, BINS_OF_START - 1)
    density = torch.zeros(BINS_OF_START, dtype=values.dtype).index_add_(0, bins, weights) ** (1 / 3)
    below = functional.pad(density.cumsum(0), (1, 0))
    wanted = (torch.arange(count, dtype=values.dtype) + 0.5) / count * below[-1]
    index = torch.searchsorted(below, wanted).clamp(1, BINS_OF_START)
    part = ((wanted - below[index - 1]) / density[index - 1]).nan_to_num(0.0)
    return low + (index - 1 + part) * width


def weighted_levels(values: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """The levels, ascending, that minimize `sum_i w_i (x_i - nearest level)^2`, a local minimum: k-means on a line.

    Lloyd's iterations ("Least squares quantization in PCM", 1982) on sorted values, where the sums of a cluster are
    differences of running sums. A level that no value is nearest to stays where it is.

    Args:
        values: float `[N]`.
        weights: not negative, `[N]`; where all are 0, values count alike.
        count: number of levels.

    Returns:
        float32 `[count]`.
    """
    counts = weights > 0
    if not bool(counts.any()):
        weights, counts = torch.ones_like(weights), ~counts
    values, order = values[counts].double().sort()
    weights = weights[counts].double()[order]
    mass, moment = (functional.pad(part.cumsum(0), (1, 0)) for part in (weights, weights * values))
    levels = _start_levels(values, weights, count)
    ends = torch.tensor([0]), torch.tensor([len(values)])
    for _ in range(ITERATIONS):
        cuts = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2, right=True)
        cuts = torch.cat((ends[0], cuts, ends[1]))
        own = mass[cuts].diff()
        moved = torch.where(own > 0, moment[cuts].diff() / own, levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels.float()


def _outlying(distance: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` values of each row lie that are farthest out; bool of the shape of `distance`, `[..., D]`."""
    return torch.zeros_like(distance, dtype=torch.bool).scatter_(-1, distance.topk(count, dim=-1).indices, True)


class _Extremes:
    """The values of each channel that lie farthest out on either side, of all that are seen.

    Args:
        tokens: values of a channel that will be seen.
    """

    def __init__(self, tokens: int) -> None:
        self._outside = int(tokens * OUTSIDE / 2)
        self._found: list[torch.Tensor | None] = [None, None]  # of x, and of -x: [G, at most outside + 1, D]

    def __call__(self, values: torch.Tensor) -> None:
        """See `[G, S, D]`."""
        for side, part in enumerate((values, -values)):
            old = self._found[side]
            part = part if old is None else torch.cat((old, part), dim=1)
            self._found[side] = part.topk(min(self._outside + 1, part.shape[1]), dim=1).values

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ends of the range of each channel, `[G, D]` each: `OUTSIDE` of the values lie outside."""
        high, negative_low = (found[:, -1].contiguous().cpu() for found in self._found)
        return -negative_low, high


class _StateSampler:
    """Values of K and V of one attention with the gradients of the loss by them, a row at a time.

    Args:
        biases: of k and v, which the cache leaves out, `[G, 1, D]` each, or None.
        frequencies, factor: as in `AttentionObserver`.
        tokens: how many will be seen in all.
    """

    def __init__(
        self,
        biases: tuple[torch.Tensor | None, torch.Tensor | None],
        frequencies: torch.Tensor,
        factor: float,
        tokens: int,
    ) -> None:
        self.extremes = _Extremes(tokens)
        self._frequencies = frequencies
        self._key_bias, self._value_bias = (
            0.0 if bias is None else bias * part for bias, part in zip(biases, (factor, 1.0), strict=True)
        )
        self._tokens = tokens
        self._generator = torch.Generator().manual_seed(0)
        self._rows: dict[str, list[tuple[torch.Tensor, ...]]] = {"k": [], "v": []}

    def __call__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """See `[1, G, S, D]` states after RoPE of tokens from the first on, by which a loss will be differentiated."""
        before = rotated_by_slot(key.detach().float(), self._frequencies, 0, backwards=True)[0] - self._key_bias
        before, values = before[:, SKIPPED_TOKENS:], (value.detach().float()[0] - self._value_bias)[:, SKIPPED_TOKENS:]
        self.extremes(before)
        heads, tokens, width = before.shape
        share = min(1.0, MOST_VALUES / (self._tokens * heads * width))
        rows = torch.randperm(heads * tokens, generator=self._generator)
        rows = rows[: math.ceil(share * heads * tokens)].to(key.device)

        def keep(name: str, states: torch.Tensor, gradient: torch.Tensor) -> None:
            chosen = (part.flatten(0, 1)[rows].cpu() for part in (states, gradient[0, :, SKIPPED_TOKENS:]))
            self._rows[name].append((*chosen, (rows // tokens).cpu()))

        def keep_key(gradient: torch.Tensor) -> None:
            keep("k", before, rotated_by_slot(gradient.float(), self._frequencies, 0, backwards=True))

        key.register_hook(keep_key)
        value.register_hook(lambda gradient: keep("v", values, gradient.float()))

    def _sampled(self, name: str) -> tuple[torch.Tensor, ...]:
        """Values and gradients, `[1, 1, R, D]`, and heads `[R]`."""
        values, gradients, heads = (torch.cat(parts) for parts in zip(*self._rows[name], strict=True))
        return values[None, None], gradients[None, None], heads

    def normalized_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values of K as codes see them and their weights; flat, outliers left out."""
        values, gradients, heads = self._sampled("k")
        scale, zero = (part[heads, 0] for part in static_scale(KEY_CODEC, *self.extremes.ends()))
        normal = values / scale + zero
        kept = ~_outlying(normal.abs(), KEY_CODEC.outliers)
        return normal[kept], (gradients * scale).square()[kept]

    def normalized_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise of V."""
        values, gradients, _ = self._sampled("v")
        distance = (values - values.mean(dim=-1, keepdim=True)).abs()
        rest, _, _ = split_outliers(values, distance, VALUE_CODEC.outliers)
        scale, zero = (part.float()[..., None] for part in group_scale(VALUE_CODEC, rest))
        kept = ~_outlying(distance, VALUE_CODEC.outliers)
        return (values / scale + zero)[kept], (gradients * scale).square()[kept]

    def tensors(self, bits: Iterable[int]) -> dict[str, torch.Tensor]:
        """Ranges and codebooks, by the names of `static_scales.py` within a layer."""
        low, high = self.extremes.ends()
        found = {"k.before.low": low, "k.before.high": high}
        for name, (values, weights) in (("k", self.normalized_keys()), ("v", self.normalized_values())):
            found |= {f"{name}.levels.{b}": weighted_levels(values, weights, 2**b) for b in bits}
        return found


def _sampled_attention(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    if not key.requires_grad:  # the first layer: no parameter before it has gradients
        key, value = key.detach().requires_grad_(), value.detach().requires_grad_()
    module.state_sampler(key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def _differentiate(model: nn.Module, sample: dict[str, torch.Tensor]) -> None:
    """Run one sample forwards and backwards; the loss is the sum over its tokens, so that all count alike."""
    sample = {name: part.to(model.device) for name, part in sample.items()}
    logits = model(**sample, use_cache=False).logits[0, :-1]
    targets = sample["input_ids"][0, 1:].to(logits.device)
    functional.cross_entropy(logits.float(), targets, reduction="sum").backward()


def fit_codebooks(
    model: nn.Module,
    samples: Iterable[dict[str, torch.Tensor]],
    statistics: Statistics,
    bits: Iterable[int] = (2, 3, 4),
) -> Statistics:
    """Run a float model over samples, forwards and backwards, and add ranges and codebooks to its statistics.

    The model is left as it was. On top of a forward pass it needs memory for the activations of one sample.

    Args:
        model: a causal language model of an architecture of the zoo.
        samples: keyword arguments of the model, `[1, S]` ids and mask each; those of fewer than three tokens are left
            out.
        statistics: what `observe.calibrate` found.
        bits: widths of the codes to find levels for.

    Raises:
        OctavoError: no sample is long enough.
    """
    samples = [sample for sample in samples if sample["input_ids"].shape[1] > SKIPPED_TOKENS + 1]
    if not samples:
        raise OctavoError("codebooks need calibration texts of at least three tokens; give longer ones")
    tokens = sum(sample["input_ids"].shape[1] - SKIPPED_TOKENS for sample in samples)
    stated_or_known(model)
    attentions = attention_modules(model)

    def make(attention: nn.Module, frequencies: torch.Tensor, factor: float) -> _StateSampler:
        return _StateSampler(left_out_biases(model, attention.layer_idx), frequencies, factor, tokens)

    tensors = dict(statistics.tensors)
    with attention_replaced(model, attentions, FITTING, _sampled_attention, "state_sampler", make):
        with differentiable(model):
            for sample in tqdm(samples, desc="differentiating", unit="text"):
                _differentiate(model, sample)
        for _, attention in tqdm(attentions, desc="fitting codebooks", unit="layer"):
            found = attention.state_sampler.tensors(bits)
            tensors |= {f"layers.{attention.layer_idx}.{name}": tensor for name, tensor in found.items()}
    return Statistics(tensors, statistics.metadata)
