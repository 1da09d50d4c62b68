"""Scales and shifts that move outliers of linear inputs into weights: formulas, and searches for the least error.

P channels of a producer (a norm, or a linear) are K input channels of the linears that read what it makes: as many, but
for the projection of v, each of whose G KV heads is read by H / G query heads, which have one scale.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import torch
from torch import nn

from ...runtime.norm_bias import add_norm_bias
from ...runtime.schemes.linear_scheme import LinearInputs

OutputError = Callable[[torch.Tensor, LinearInputs, torch.Tensor], torch.Tensor]
"""Squared error of a linear's output over `rows`, 0-dim, once its weight `[N, K]` and inputs are quantized; it is given
the exact output for those inputs, without bias, `[R, N]`."""
SMALLEST_SMOOTHING = 1e-5
"""Floor of scales and of the weights they are made of, as in SmoothQuant."""
SMALLEST_MEAN = 1e-4
"""Floor of scales before they are normalised, as in AWQ."""
LARGEST_PRODUCER, SMALLEST_PRODUCER = 2.0**15, 2.0**-14
"""Scales leave the largest weight of a producer's channel between these, so that float16 still holds the channel."""
ALPHA = 0.5
AWQ_STEPS, THRESHOLD_STEPS, FLEX_STEPS = 20, 20, 10
NEAR_ALPHA, NEAR_BETA = (-0.1, -0.05, 0.0, 0.05, 0.1), (-0.2, -0.1, 0.0, 0.1, 0.2)
SAMPLED_ROWS, SAMPLED_OUTPUTS, FINALISTS = 128, 128, 3
"""Tokens and output channels on which all that is considered is compared, and how many are compared on all there is."""
LOWEST_THRESHOLD = 0.1
"""Share of channels below the lowest threshold that is tried."""


@dataclass(frozen=True)
class Smoothing:
    """How a subgraph may be rewritten.

    Attributes:
        scale: float32 `[P]`.
        shift: float32 `[P]`, or None.
        parameters: what the scale was made with, as `alpha`.
    """

    scale: torch.Tensor
    shift: torch.Tensor | None = None
    parameters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Producer:
    """What makes the inputs of some linears.

    Attributes:
        module: a norm with a weight `[P]`, or a linear `[..., K]`.
        first_row: from which on rows of the linear are read; those before make other things.
        offset: what the norm adds to its weight.
        stored: dtype that the weight will be stored in; None is that which it has.
    """

    module: nn.Module
    first_row: int = 0
    offset: float = 0.0
    stored: torch.dtype | None = None

    @property
    def weight(self) -> torch.Tensor:
        """What channels are multiplied by, or made with: `[P]` or `[P, ...]`."""
        weight = self.module.weight[self.first_row :]
        return weight + self.offset if self.offset else weight

    @property
    def channels(self) -> int:
        """P."""
        return len(self.module.weight[self.first_row :])

    @property
    def smallest(self) -> float:
        """The least that scales may leave of a channel's weight; of `1 + w`, what w has digits for."""
        digits = torch.finfo(self.stored or self.module.weight.dtype).eps if self.offset else 0.0
        return max(SMALLEST_PRODUCER, digits)

    def exact(self, scale: torch.Tensor) -> torch.Tensor:
        """The scales nearest to `[P]` by which its weight, as it is stored, can be divided.

        A weight keeps its digits when it is divided, and a w of `1 + w` does not: near -1 it has few for their sum.
        """
        if not self.offset:
            return scale
        weight = self.weight.to(scale.dtype)
        left = (weight / scale - self.offset).to(self.stored or self.module.weight.dtype).to(scale.dtype) + self.offset
        return torch.where(left == 0, scale, weight / left)

    def subtract(self, shift: torch.Tensor) -> None:
        """Take `[P]` off what a norm makes."""
        if getattr(self.module, "bias", None) is None:
            add_norm_bias(self.module, torch.zeros_like(self.module.weight))
        self.module.bias.copy_(self.module.bias.to(shift.dtype) - shift)

    def divide(self, scale: torch.Tensor) -> None:
        """Divide what it makes by `[P]`; each parameter is rounded to its dtype."""
        for parameter, offset in ((self.module.weight, self.offset), (getattr(self.module, "bias", None), 0.0)):
            if parameter is None:
                continue
            part = parameter[self.first_row :]
            wide = part.to(scale.dtype) + offset if offset else part.to(scale.dtype)
            part.copy_(wide / scale.view(-1, *[1] * (part.dim() - 1)) - offset)


@dataclass(frozen=True)
class Site:
    """A subgraph in a layer, before it is rewritten.

    Attributes:
        producer: of their inputs.
        consumers: linears `[N, K]`.
        quantized: those that will be quantized.
        inputs: what they are given.
        width: consecutive channels of P that lie together in K: D of what makes v, all P elsewhere.
    """

    producer: Producer
    consumers: list[nn.Module]
    quantized: list[nn.Module]
    inputs: LinearInputs
    width: int

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """`[P] -> [K]`: the channels of each KV head once per query head of its group."""
        repeats = self.consumers[0].weight.shape[1] // len(values)
        return values.view(-1, 1, self.width).expand(-1, repeats, -1).reshape(-1)

    def grouped(self, values: torch.Tensor) -> torch.Tensor:
        """`[K] -> [K / P, P]`: each channel of P beside the others of K that share its scale."""
        heads = self.producer.channels // self.width
        return values.view(heads, -1, self.width).transpose(0, 1).flatten(1)

    @cached_property
    def largest_input(self) -> torch.Tensor:
        """Largest |x| of each channel, `[P]`."""
        return self.grouped(self.inputs.largest).amax(dim=0)

    @cached_property
    def mean_input(self) -> torch.Tensor:
        """Mean |x| of each channel, `[P]`."""
        return self.grouped(self.inputs.mean_abs).mean(dim=0)

    @cached_property
    def largest_weight(self) -> torch.Tensor:
        """Largest |W| of each input channel over the linears that will be quantized, `[P]`."""
        columns = [linear.weight.abs().amax(dim=0).float() for linear in self.quantized]
        return self.grouped(torch.stack(columns).amax(dim=0)).amax(dim=0)

    @cached_property
    def is_alive(self) -> torch.Tensor:
        """Channels that have inputs and weights, `[P]`; the others tell nothing that a scale could be made of."""
        return (self.largest_input > 0) & (self.largest_weight > 0)

    def usable(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales `[P]` within what 16 bits hold; 1 for channels that are not alive."""
        largest = self.producer.weight.abs().float().view(len(scale), -1).amax(dim=1)
        lowest, highest = (largest / LARGEST_PRODUCER).clamp_max(1.0), (largest / self.producer.smallest).clamp_min(1.0)
        return torch.where(self.is_alive, self.producer.exact(scale.clamp(lowest, highest)), 1.0)

    def normalised(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales `[P]`, the smallest as far from 1 as the largest: a factor common to all changes no error."""
        alive = scale[self.is_alive]
        return scale / (alive.amax() * alive.amin()).sqrt() if len(alive) else scale


class _Sample:
    """What errors are worked out on: evenly chosen rows of the inputs, and output channels of each linear.

    Args:
        site: whose.
        rows: of the inputs, at most.
        outputs: channels of a linear, to twice as many; all where it has fewer.
    """

    def __init__(self, site: Site, rows: int, outputs: int) -> None:
        every = [linear.weight for linear in site.quantized]
        steps = [max(1, len(weight) // outputs) for weight in every]
        self.inputs = site.inputs if len(site.inputs.rows) <= rows else site.inputs.thinned(rows)
        self.weights = [weight[::step].float() for weight, step in zip(every, steps, strict=True)]
        self.outputs = [self.inputs.rows @ weight.T for weight in self.weights]
        self.shares = [len(part) / len(weight) for part, weight in zip(self.weights, every, strict=True)]
        self.is_whole = self.inputs is site.inputs and max(steps) == 1


class Search:
    """What is best for a site; no change, before anything is tried.

    All that is considered is compared on a sample, and then the best few of it, and no change, on all there is.
    """

    def __init__(self, site: Site, error: OutputError) -> None:
        self._site, self._error = site, error
        self._unchanged = Smoothing(torch.ones_like(site.largest_input))
        self._settled: Smoothing | None = None
        self._tried: list[tuple[float, Smoothing]] = []
        self._costs: dict[int, float] = {}  # on all there is, by the id of what is kept above

    @cached_property
    def _sample(self) -> _Sample:
        return _Sample(self._site, SAMPLED_ROWS, SAMPLED_OUTPUTS)

    @cached_property
    def _whole(self) -> _Sample:
        return self._sample if self._sample.is_whole else _Sample(self._site, len(self._site.inputs.rows), sys.maxsize)

    @property
    def best(self) -> Smoothing:
        """The least error of all that was considered, or what was settled on."""
        if self._settled is not None or not self._tried:
            return self._settled or self._unchanged
        finalists = sorted(self._tried, key=lambda tried: tried[0])[:FINALISTS]
        return min([self._unchanged, *[smoothing for _, smoothing in finalists]], key=self._whole_cost)

    @property
    def changes(self) -> bool:
        """Whether something is better than no change."""
        return self.best is not self._unchanged

    def _whole_cost(self, smoothing: Smoothing) -> float:
        if id(smoothing) not in self._costs:
            self._costs[id(smoothing)] = self._cost(smoothing, self._whole)
        return self._costs[id(smoothing)]

    def _cost(self, smoothing: Smoothing, sample: _Sample) -> float:
        scale = self._site.spread(smoothing.scale)
        shift = None if smoothing.shift is None else self._site.spread(smoothing.shift)
        inputs = sample.inputs.transformed(scale, shift)
        cost = 0.0
        for weight, output, share in zip(sample.weights, sample.outputs, sample.shares, strict=True):
            exact = output if shift is None else output - weight @ shift
            cost += float(self._error(weight * scale, inputs, exact)) / share
        return cost

    def consider(self, scale: torch.Tensor, shift: torch.Tensor | None = None, **parameters: float) -> None:
        """Try it: `best` is it if its error is less than that of all else."""
        smoothing = Smoothing(self._site.usable(scale), shift, parameters)
        cost = self._whole_cost(smoothing) if self._sample.is_whole else self._cost(smoothing, self._sample)
        self._tried.append((cost if math.isfinite(cost) else math.inf, smoothing))

    def settle(self, scale: torch.Tensor, **parameters: float) -> None:
        """Take it, whatever its error."""
        self._settled = Smoothing(self._site.usable(scale), None, parameters)


def _migrated(site: Site, alpha: float, beta: float) -> torch.Tensor:
    """`amax|x|^alpha / amax|W|^beta`, `[P]`."""
    weight = site.largest_weight.clamp_min(SMALLEST_SMOOTHING)
    return (site.largest_input**alpha / weight**beta).clamp_min(SMALLEST_SMOOTHING)


def smoothquant(site: Site, search: Search) -> None:
    """SmoothQuant (arXiv 2211.10438): of each outlier, inputs and weights bear the same share."""
    search.settle(_migrated(site, ALPHA, 1 - ALPHA), alpha=ALPHA)


def suppress_outliers(site: Site, search: Search) -> None:
    """Outlier Suppression+ (arXiv 2304.09145): channels about their middle, the larger of them reduced to a threshold.

    The bias that a norm gets, `-z / s`, is a number of bfloat16, lest its rounding be an error of every token.
    """
    low, high = site.inputs.low, site.inputs.high
    middle, extent = (high + low) / 2, (high - low) / 2
    if not bool((extent > 0).any()):
        return
    share = extent[extent > 0].quantile(LOWEST_THRESHOLD) / extent.amax()
    for step in range(THRESHOLD_STEPS + 1):
        threshold = extent.amax() * share ** (step / THRESHOLD_STEPS)
        scale = site.usable((extent / threshold).clamp_min(1.0))
        shift = (middle / scale).bfloat16().float() * scale
        search.consider(scale, shift, threshold=float(threshold))


def awq(site: Site, search: Search) -> None:
    """AWQ (arXiv 2306.00978): a power of the usual size of inputs."""
    for step in range(1, AWQ_STEPS):
        ratio = step / AWQ_STEPS
        search.consider(site.normalised((site.mean_input**ratio).clamp_min(SMALLEST_MEAN)), ratio=ratio)


def flex_smooth(site: Site, search: Search) -> None:
    """SmoothQuant's formula with other exponents: such as sum to 1, and then those about the best of them.

    It often makes the largest input of all channels about the same, so that static ranges must hold for tokens that
    calibration did not see: it wants some thousands of tokens, where the other methods do with hundreds.
    """

    def consider(alpha: float, beta: float) -> None:
        search.consider(site.normalised(_migrated(site, alpha, beta)), alpha=alpha, beta=beta)

    for step in range(FLEX_STEPS + 1):
        consider(step / FLEX_STEPS, round(1 - step / FLEX_STEPS, 2))
    alpha, beta = (search.best.parameters.get(name, 0.0) for name in ("alpha", "beta"))
    alphas, betas = [round(alpha + step, 2) for step in NEAR_ALPHA], [round(beta + step, 2) for step in NEAR_BETA]
    for near in product(alphas, betas):
        if min(near) >= 0 and near != (alpha, beta):
            consider(*near)
