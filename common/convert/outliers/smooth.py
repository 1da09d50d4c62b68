"""Outlier treatment of linear layers, as exact rewrites of one float decoder layer.

Channel j of what a producer makes is divided by s_j, and column j of the linears that read it multiplied by s_j. Where
the producer is a norm, z_j may be taken off before: it comes back as `W z` in the biases of the linears.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import OctavoError
from ...runtime.norm_bias import add_norm_bias
from ...runtime.schemes.linear_scheme import LinearInputs
from .search import OutputError, Search, Site, Smoothing, awq, flex_smooth, smoothquant, suppress_outliers

SEARCHED_OUTPUTS = 4096


@dataclass(frozen=True)
class Subgraph:
    """A producer and all linears that read what it makes, by their names in a decoder layer."""

    producer: str
    consumers: tuple[str, ...]


UP_DOWN = Subgraph("mlp.up_proj", ("mlp.down_proj",))
VALUE_OUTPUT = Subgraph("self_attn.v_proj", ("self_attn.o_proj",))
NORM_QKV = Subgraph("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
NORM_MLP = Subgraph("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
NORMS = (NORM_QKV, NORM_MLP)
BACKWARDS = (UP_DOWN, VALUE_OUTPUT, *NORMS)
"""Weights that a scale is made of are those that earlier rewrites left."""
FORWARDS = (NORM_QKV, VALUE_OUTPUT, NORM_MLP, UP_DOWN)
"""Errors of v and up are weighed as the model came, before a scale of o's or down's inputs changes their units."""


@dataclass(frozen=True)
class Rewrite:
    """How a subgraph was rewritten: its linears are given `(x - shift) / scale` now.

    Attributes:
        producer, consumers: names within the layer.
        scale: float32 `[K]`.
        shift: float32 `[K]`, or None.
        parameters: see `Smoothing`.
        remaining: squared error of the quantized consumers, as a share of what it was; None where none was worked out.
    """

    producer: str
    consumers: tuple[str, ...]
    scale: torch.Tensor
    shift: torch.Tensor | None
    parameters: dict[str, float]
    remaining: float | None


SMOOTHINGS: dict[str, tuple[tuple[Subgraph, ...], Callable[[Site, Search], None]]] = {
    "m1": (NORMS, smoothquant),
    "m2": (NORMS, suppress_outliers),
    "m3": (FORWARDS, awq),
    "m4": (BACKWARDS, smoothquant),
    "m6": (FORWARDS, flex_smooth),
}
"""The values of `--anti_method`: what is rewritten, in this order, and how it is chosen."""


def _module(layer: nn.Module, name: str, dimensions: int) -> nn.Module:
    """A module of the layer whose weight has so many dimensions."""
    try:
        module = layer.get_submodule(name)
    except AttributeError:
        raise OctavoError(f"{name}: {type(layer).__name__} has no such module, which outlier treatment needs") from None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != dimensions or not weight.is_floating_point():
        raise OctavoError(f"{name}: {type(module).__name__} has no float weight of {dimensions} dimensions")
    return module


def _site(
    layer: nn.Module, subgraph: Subgraph, inputs: dict[str, LinearInputs], quantized: Collection[str]
) -> Site | None:
    """The subgraph in a layer; None if none of its consumers will be quantized."""
    producer = _module(layer, subgraph.producer, 1 if subgraph in NORMS else 2)
    consumers = {name: _module(layer, name, 2) for name in subgraph.consumers}
    chosen = [name for name in consumers if name in quantized]
    if not chosen:
        return None
    seen = next((inputs[name] for name in chosen if name in inputs), None)
    if seen is None:
        raise OctavoError(f"{chosen[0]}: calibration saw no inputs of it")
    if not bool((seen.low.isfinite() & seen.high.isfinite()).all()):
        raise OctavoError(f"{chosen[0]}: inputs are not finite, so that outliers cannot be treated")
    width = layer.self_attn.head_dim if subgraph is VALUE_OUTPUT else len(producer.weight)
    return Site(producer, list(consumers.values()), [consumers[name] for name in chosen], seen, width)


def _fold_shift(site: Site, shift: torch.Tensor) -> None:
    """Take `[P]` off what the producer makes, and give it to the biases of the consumers."""
    for linear in site.consumers:
        offset = linear.weight.to(shift.dtype) @ site.spread(shift)
        if linear.bias is None:
            linear.bias = nn.Parameter(offset.to(linear.weight.dtype), requires_grad=False)
        else:
            linear.bias.copy_(linear.bias.to(shift.dtype) + offset)
    if getattr(site.producer, "bias", None) is None:
        add_norm_bias(site.producer, torch.zeros_like(site.producer.weight))
    site.producer.bias.copy_(site.producer.bias.to(shift.dtype) - shift)


def fold_smoothing(site: Site, smoothing: Smoothing) -> None:
    """Rewrite a site, in place: its consumers are given `(x - shift) / scale` then, and yield what they did.

    Works in float32 or wider, and rounds to the dtype of each parameter.
    """
    wide = torch.promote_types(site.producer.weight.dtype, torch.float32)
    if smoothing.shift is not None:
        _fold_shift(site, smoothing.shift.to(wide))
    scale = smoothing.scale.to(wide)
    for parameter in (site.producer.weight, getattr(site.producer, "bias", None)):
        if parameter is not None:
            parameter.copy_(parameter.to(wide) / scale.view(-1, *[1] * (parameter.dim() - 1)))
    for linear in site.consumers:
        linear.weight.copy_(linear.weight.to(wide) * site.spread(scale))


@torch.no_grad()
def smooth_layer(
    layer: nn.Module,
    inputs: dict[str, LinearInputs],
    method: str,
    quantized: Collection[str],
    error: OutputError,
) -> list[Rewrite]:
    """Move outliers of the inputs of a decoder layer's linears into weights, in place; the layer computes what it did.

    Args:
        layer: Llama's decoder layer or one with the same submodules, in float.
        inputs: of its linears, by name within the layer, on its device. Those of q, k and v are the same, and of gate
            and up; of those that share inputs, one that will be quantized is enough.
        method: one of `SMOOTHINGS`: "m1" SmoothQuant, before attention and MLP only; "m2" Outlier Suppression+, there
            too; "m3" AWQ; "m4" SmoothQuant's formula everywhere; "m6" likewise with the exponents of least error. What
            "m2", "m3" and "m6" do not better, they leave as it is.
        quantized: names within the layer of the linears that will be quantized. Others are rewritten where they share
            an input with these, and count for nothing.
        error: from a weight `[N, K]` in float32, inputs, and the exact output `[R, N]`, the squared error of the output
            once both are quantized.

    Returns:
        What was rewritten, in order. With "m2" norms in it have a bias (see `add_norm_bias`), and their linears too.

    Raises:
        OctavoError: the method is unknown, a module is missing or has no weight, or inputs are unknown or not finite.
    """
    if method not in SMOOTHINGS:
        raise OctavoError(f"--anti_method {method}: is none of {', '.join(SMOOTHINGS)}")
    subgraphs, choose = SMOOTHINGS[method]
    rewrites = []
    for subgraph in subgraphs:
        site = _site(layer, subgraph, inputs, quantized)
        if site is None:
            continue
        search = Search(site, error)
        choose(site, search)
        if search.changes:
            best = search.best
            fold_smoothing(site, best)
            scale, shift = site.spread(best.scale), None if best.shift is None else site.spread(best.shift)
            rewrites.append(
                Rewrite(subgraph.producer, subgraph.consumers, scale, shift, best.parameters, search.remaining)
            )
    return rewrites


@torch.no_grad()
def smooth_head(norm: nn.Module, head: nn.Linear, inputs: LinearInputs, method: str, error: OutputError) -> None:
    """Likewise for the last linear and the norm before it, in place, by every method but "m2", which leaves both.

    What is best is searched on evenly chosen output channels, `SEARCHED_OUTPUTS` to twice as many.
    """
    choose = SMOOTHINGS[method][1]
    if choose is suppress_outliers:
        return
    step = max(1, len(head.weight) // SEARCHED_OUTPUTS)
    part = nn.Linear(head.in_features, len(head.weight[::step]), bias=False, device="meta")
    part.weight = nn.Parameter(head.weight[::step].clone(), requires_grad=False)
    site = Site(norm, [part], [part], inputs, len(norm.weight))
    search = Search(site, error)
    choose(site, search)
    if search.changes:
        fold_smoothing(Site(norm, [head], [head], inputs, len(norm.weight)), search.best)
