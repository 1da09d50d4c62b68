"""What is known of a decoder's layers from one pass to the next, for passes through all of them in one call."""

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...ops.decoder.cpu import DECODER_KERNEL
from ...ops.shared.operands import FLOAT_KINDS
from ..errors import first_line
from .cache.sliding import sliding_windows
from .decoder import Decoder, stated_decoder
from .foldable_linear import changes_of
from .fused_layers import NotFused, norm_eps, plain_layer
from .layer_angles import LayerAngles
from .quantized_linear import QuantizedLinear

IS_ZOO = "octavo_is_stated"
"""Attribute of a decoder whose anatomy the zoo states, and which was checked."""


def _check_classes(base: nn.Module, layer: nn.Module, decoder: Decoder) -> None:
    """Raise `NotFused` unless the modules of a layer, linears aside, are of the file that the decoder is of.

    Another module may have linears of the same names and do something else with them.
    """
    files = {kind.__module__ for kind in type(base).__mro__}
    names = {decoder.attention.name, decoder.mlp.gate.rpartition(".")[0], *decoder.norms}
    for module in (layer, *map(layer.get_submodule, sorted(names))):
        if type(module).__module__ not in files:
            raise NotFused(f"a layer has a {type(module).__name__}, which is not of {type(base).__name__}")


class FusedDecoder:
    """What is known of a decoder's layers from one pass to the next.

    Args:
        base: the decoder.

    Raises:
        NotFused: its layers cannot be run whole.
    """

    def __init__(self, base: nn.Module) -> None:
        decoder = stated_decoder(base)
        self._layers = layers = base.get_submodule(decoder.layers)
        if any(decoder.experts_in(base.config, index) for index in range(len(layers))):
            raise NotFused("a layer has experts")
        if getattr(base.config, "sliding_window", None) == 1:
            raise NotFused("a window of one token")
        if any(part.device.type != "cpu" for part in layers.parameters()):
            raise NotFused("a layer is not on the CPU")
        if DECODER_KERNEL.supports() is not None:
            raise NotFused(f"there is no C kernel ({DECODER_KERNEL.supports()})")
        for layer in layers:
            _check_classes(base, layer, decoder)
        self.plain = [plain_layer(layer, decoder, base.config) for layer in layers]
        self.attentions = [layer.get_submodule(decoder.attention.name) for layer in layers]
        self.windows = sliding_windows(base.config)
        self.angles = LayerAngles(base.get_submodule(decoder.rotary), base.config)
        self.is_float = any(
            not linear.bits for layer in self.plain for linear in layer.linears if linear.codes is not None
        )
        self.hidden_size = self.plain[0].linears.output.out_features
        self._norm = base.get_submodule(decoder.norm)
        self.decoder = decoder
        self.caches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # what `FusedCache` knows of each
        if self._norm.weight.dtype not in FLOAT_KINDS or self._norm.weight.numel() != self.hidden_size:
            raise NotFused("the last norm is of other channels, or neither in float32, bfloat16 nor float16")

    def last_norm(self) -> tuple[torch.Tensor, float, float]:
        """Weight, offset and epsilon of the norm behind the last layer."""
        return self._norm.weight.detach(), self.decoder.norm_offset, norm_eps(self._norm)

    def wants_gradient(self) -> bool:
        """Whether a weight of a layer does."""
        return any(weight.requires_grad for weight in self._layers.parameters())


class Sources:
    """What a decoder is made of, as far as another library may put something else there.

    Args:
        modules: the decoder, whose own hooks and forward are those of `passes.py` and `model.py`, and all within it.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._owners = [vars(module) for module in modules[1:]]
        self._hooks = [hooks for module in modules[1:] for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._children = [module._modules for module in modules if module._modules]
        packed = [module for module in modules if isinstance(module, QuantizedLinear)]
        self._packed = [vars(module) for module in packed]
        self._buffers = [module._buffers for module in packed]  # a bias by its name is slower to reach, at every pass
        self._weights = [module._parameters for module in modules[1:] if module._parameters]
        self._kept = [*self._parts(), *[weight.detach() for weight in self._parameters()]]  # so no other has the id
        self._found = self._now()

    def _parts(self) -> list[Any]:
        children = [child for part in self._children for child in part.values()]
        panels = [owner.get("_panels") for owner in self._packed]
        return [*children, *panels, *[buffers.get("bias") for buffers in self._buffers]]

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (weight for part in self._weights for weight in part.values() if weight is not None)

    def _now(self) -> list[int]:
        # of biases, what is read may be a copy
        biases = [tensors.get("bias") for tensors in (*self._weights, *self._buffers)]
        return [
            *map(id, self._parts()),
            *[weight.data_ptr() for weight in self._parameters()],
            *[part for bias in biases if bias is not None for part in (bias.data_ptr(), changes_of(bias))],
        ]

    def change(self) -> str | None:
        """What keeps the layers from being run whole, or None."""
        if any(self._hooks):
            return "a module has a hook"
        if any("forward" in owner for owner in self._owners):
            return "another library has put its own forward in the place of a module's"
        return None

    def are_same(self) -> bool:
        """Whether modules and their weights are those that were there."""
        return self._now() == self._found


class _Known(NamedTuple):
    """What was found out of a decoder, and of which modules."""

    sources: Sources
    fused: FusedDecoder | None
    refusal: str = ""


_FUSED: "WeakKeyDictionary[nn.Module, _Known]" = WeakKeyDictionary()


def _known(base: nn.Module) -> _Known:
    decoder = stated_decoder(base)
    try:
        fused, refusal = FusedDecoder(base), ""
    except NotFused as reason:
        fused, refusal = None, str(reason)
    except AttributeError as error:  # another module in the place of a layer
        fused, refusal = None, f"the layers are not those that are stated ({first_line(error)})"
    parts = dict(base.named_children())  # what was packed on the way is of them
    norm = parts.get(decoder.norm)
    modules = [base, *parts[decoder.layers].modules(), *([] if norm is None else [norm])]
    return _Known(Sources(modules), fused, refusal)


def fused_decoder(base: nn.Module) -> FusedDecoder:
    """What is known of a decoder, worked out once and again when its modules have changed.

    Raises:
        NotFused: its layers cannot be run whole.
    """
    if not getattr(base, IS_ZOO, False):
        raise NotFused(f"the zoo states no anatomy of {type(base).__name__}")
    known = _FUSED.get(base)
    if known is None or not known.sources.are_same():
        known = _FUSED[base] = _known(base)
    refusal = known.refusal or known.sources.change()
    if refusal:
        raise NotFused(refusal)
    return known.fused
