"""A directory in float beside what an engine reads of the cache alone: every code as the float that it stands for."""

from collections.abc import Iterator

import torch

from .caches import kind_of, leaves_biases_out, quantized_layers
from .directory import OctavoDirectory
from .form import Form
from .tensor_plan import TensorPlan


def decoded_plan(directory: OctavoDirectory) -> TensorPlan:
    """All weights of a directory, in float."""
    plan, form = TensorPlan(directory), directory.form
    for name in directory.floats():
        plan.keep(name)
    for name in form.linears:
        plan.decode(name)
    if form.has_coded_embedding:
        plan.decode(form.embedding)
    return plan


def decoded_note(form: Form) -> list[str]:
    """What there is to say of weights that were in codes."""
    if not form.linears and not form.has_coded_embedding:
        return []
    return ["all weights are written in float, as their codes stand for them: the format is of the cache alone"]


def check_static(form: Form, kinds: tuple[str, ...], instead: str) -> Iterator[str]:
    """Refusals of a cache that is none of some static kinds, in every layer, or whose scales leave out biases.

    Args:
        instead: arguments of the command that give such a cache.
    """
    if kind_of(form) not in kinds:
        yield f"scheme {form.scheme.name}: the format says {', '.join(kinds)} alone; {instead}"
    elif form.folds:
        yield leaves_biases_out(form)
    elif len(quantized_layers(form)) < form.layers:
        floats = ", ".join(map(str, form.float_layers()))
        yield f"layers {floats} keep their cache in float, which the format cannot say; convert without --fa_amp"


def static_pairs(directory: OctavoDirectory) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scales of K and V of each layer, float32, `[1]` or `[G D]` or of heads `[G]`."""
    found = []
    for scheme, layer in zip(directory.form.schemes(), directory.scales(), strict=True):
        pair = []
        for codec, stored in ((scheme.key, layer.key), (scheme.value, layer.value)):
            scale = torch.tensor([codec.fixed_scale]) if codec.fixed_scale else stored[0]
            pair.append(scale.float().flatten())
        found.append(tuple(pair))
    return found
