"""Outlier treatment of linear layers, as exact rewrites of one float decoder layer.

Channel j of what a producer makes is divided by s_j, and column j of the linears that read it multiplied by s_j. Where
the producer is a norm, z_j may be taken off before: it comes back as `W z` in the biases of the linears.
"""

from collections.abc import Callable, Collection

import torch
from torch import nn

from ...errors import OctavoError
from ...runtime.decoder import Decoder
from ...runtime.model_sizes import kv_heads_of
from ...runtime.schemes.linear_scheme import LinearInputs
from ..spelling import named
from .search import OutputError, Producer, Search, Site, Smoothing, awq, flex_smooth, smoothquant, suppress_outliers
from .subgraphs import Subgraph, backwards, forwards, norm_subgraphs, shifted_subgraphs

SEARCHED_OUTPUTS = 4096


SMOOTHINGS: dict[str, tuple[Callable[[Decoder, int], tuple[Subgraph, ...]], Callable[[Site, Search], None]]] = {
    "m1": (norm_subgraphs, smoothquant),
    "m2": (shifted_subgraphs, suppress_outliers),
    "m3": (forwards, awq),
    "m4": (backwards, smoothquant),
    "m6": (forwards, flex_smooth),
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


def _producer(
    layer: nn.Module, decoder: Decoder, subgraph: Subgraph, stored: Callable[[str], torch.dtype] | None
) -> Producer:
    """What makes the inputs of a subgraph: a norm, a linear, or the last rows of one, where v and up stand."""
    module = _module(layer, subgraph.producer, 1 if subgraph.is_norm else 2)
    if subgraph.is_norm:
        return Producer(module, offset=decoder.norm_offset, stored=stored and stored(f"{subgraph.producer}.weight"))
    if not subgraph.part:
        return Producer(module)
    attention = layer.get_submodule(decoder.attention.name)
    rows = len(module.weight)
    count = kv_heads_of(attention.config) * attention.head_dim if subgraph.by_heads else rows // 2
    return Producer(module, rows - count)


def _site(
    layer: nn.Module,
    decoder: Decoder,
    subgraph: Subgraph,
    inputs: dict[str, LinearInputs],
    quantized: Collection[str],
    stored: Callable[[str], torch.dtype] | None,
) -> Site | None:
    """The subgraph in a layer; None if none of its consumers will be quantized."""
    producer = _producer(layer, decoder, subgraph, stored)
    consumers = {name: _module(layer, name, 2) for name in subgraph.consumers}
    chosen = [name for name in consumers if name in quantized]
    if not chosen:
        return None
    seen = next((inputs[name] for name in [subgraph.router or chosen[0], *chosen] if name in inputs), None)
    if seen is None:
        raise OctavoError(f"{chosen[0]}: calibration saw no inputs of it")
    if not bool((seen.low.isfinite() & seen.high.isfinite()).all()):
        raise OctavoError(f"{chosen[0]}: inputs are not finite, so that outliers cannot be treated")
    width = layer.get_submodule(decoder.attention.name).head_dim if subgraph.by_heads else producer.channels
    return Site(producer, list(consumers.values()), [consumers[name] for name in chosen], seen, width)


def _fold_shift(site: Site, shift: torch.Tensor) -> None:
    """Take `[P]` off what the producer makes, and give it to the biases of the consumers."""
    for linear in site.consumers:
        offset = linear.weight.to(shift.dtype) @ site.spread(shift)
        if linear.bias is None:
            linear.bias = nn.Parameter(offset.to(linear.weight.dtype), requires_grad=False)
        else:
            linear.bias.copy_(linear.bias.to(shift.dtype) + offset)
    site.producer.subtract(shift)


def fold_smoothing(site: Site, smoothing: Smoothing) -> None:
    """Rewrite a site, in place: its consumers are given `(x - shift) / scale` then, and yield what they did.

    Works in float32 or wider, and rounds to the dtype of each parameter.
    """
    wide = torch.promote_types(site.producer.module.weight.dtype, torch.float32)
    if smoothing.shift is not None:
        _fold_shift(site, smoothing.shift.to(wide))
    scale = smoothing.scale.to(wide)
    site.producer.divide(scale)
    for linear in site.consumers:
        linear.weight.copy_(linear.weight.to(wide) * site.spread(scale))


@torch.no_grad()
def smooth_layer(
    layer: nn.Module,
    inputs: dict[str, LinearInputs],
    method: str,
    quantized: Collection[str],
    error: OutputError,
    decoder: Decoder,
    stored: Callable[[str], torch.dtype] | None = None,
    experts: int = 0,
) -> dict[Subgraph, Smoothing]:
    """Move outliers of the inputs of a decoder layer's linears into weights, in place; the layer computes what it did.

    Args:
        layer: a decoder layer, in float.
        inputs: of its linears, by name within the layer, on its device. Those of q, k and v are the same, and of gate
            and up; of those that share inputs, one that will be quantized is enough. Of experts, a scale of what all
            are given is made by the inputs of their router.
        method: one of `SMOOTHINGS`: "m1" SmoothQuant, before attention and MLP only; "m2" Outlier Suppression+, there
            too, but not before experts; "m3" AWQ; "m4" SmoothQuant's formula everywhere; "m6" likewise with the
            exponents of least error. What "m2", "m3" and "m6" do not better, they leave as it is.
        quantized: names within the layer of the linears that will be quantized. Others are rewritten where they share
            an input with these, and count for nothing.
        error: from a weight `[N, K]` in float32, inputs, and the exact output `[R, N]`, the squared error of the output
            once both are quantized.
        decoder: what the layer's modules are. With "m2" its norms may have a bias then (see `add_norm_bias`), and their
            linears too.
        stored: of a parameter's name within the layer, the dtype that it will be stored in; None is that which it has.
        experts: that the layer has in the place of its MLP, as `ExpertList`, see `Decoder.experts_in`.

    Returns:
        What was rewritten, and how, in order.

    Raises:
        OctavoError: the method is unknown, a module is missing or has no weight, or inputs are unknown or not finite.
    """
    if method not in SMOOTHINGS:
        raise OctavoError(f"{named('anti_method')} {method}: is none of {', '.join(SMOOTHINGS)}")
    subgraphs, choose = SMOOTHINGS[method]
    done = {}
    for subgraph in subgraphs(decoder, experts):
        site = _site(layer, decoder, subgraph, inputs, quantized, stored)
        if site is None:
            continue
        search = Search(site, error)
        choose(site, search)
        if search.changes:
            fold_smoothing(site, search.best)
            done[subgraph] = search.best
    return done


@torch.no_grad()
def smooth_head(producer: Producer, head: nn.Linear, inputs: LinearInputs, method: str, error: OutputError) -> None:
    """Likewise for the last linear and the norm before it, in place, by every method but "m2", which leaves both.

    What is best is searched on evenly chosen output channels, `SEARCHED_OUTPUTS` to twice as many.
    """
    choose = SMOOTHINGS[method][1]
    if choose is suppress_outliers:
        return
    step = max(1, len(head.weight) // SEARCHED_OUTPUTS)
    part = nn.Linear(head.in_features, len(head.weight[::step]), bias=False, device="meta")
    part.weight = nn.Parameter(head.weight[::step].clone(), requires_grad=False)
    site = Site(producer, [part], [part], inputs, producer.channels)
    search = Search(site, error)
    choose(site, search)
    if search.changes:
        fold_smoothing(Site(producer, [head], [head], inputs, producer.channels), search.best)
