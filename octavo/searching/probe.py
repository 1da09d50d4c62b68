"""What it costs to code K or V of one layer alone: KL to the float model, over the cache as it is stored.

W windows, S tokens each, T of them scored, V size of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..common.errors import OctavoError
from ..common.runtime.cache.quantized_cache import QuantizedCache
from ..common.runtime.compatibility import cache_argument
from ..common.runtime.decoder import decoder_layers
from ..common.runtime.passes import whole_passes
from ..common.runtime.schemes.kv_scheme import Scheme, load_scheme
from .sides import fields_of

ROWS = 64
"""Tokens whose logits are compared at a time."""


def kl_rows(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) of each token, float32 `[T]`, from logits `[T, V]`.

    With d = found - expected and p of the expected ones it is log E_p[exp(d)] - E_p[d]; once d is taken about its
    mean, that keeps its digits where the logits hardly differ, which a difference of two logarithms does not.
    """
    parts = []
    for before, after in zip(expected.split(ROWS), found.split(ROWS), strict=True):
        share, moved = before.float().softmax(-1), after.float() - before.float()
        moved -= (share * moved).sum(-1, keepdim=True)
        left = (share * moved).sum(-1)  # of the mean, by rounding
        parts.append((share * moved.expm1_()).sum(-1).log1p() - left)
    return torch.cat(parts)


def only_layer(layer: int, scheme: Scheme) -> Scheme:
    """The scheme that is this one in one layer, and float in all others."""
    return Scheme(name=f"layer {layer}", layers=((str(layer), fields_of(scheme)),))


class Probe:
    """A float model that has read some windows, and reads them again with one layer coded.

    The layers before that one are not computed again: what they gave is kept, `[S, hidden]` of each layer and window.

    Args:
        model: prepared for a `QuantizedCache`, in float32: what rounds more would hide what a layer costs.
        samples: windows of token ids `[S]`.
        scored: of each, the last so many tokens.

    Raises:
        OctavoError: nobody has stated which modules are the layers of this model.
    """

    def __init__(self, model: Any, samples: Sequence[torch.Tensor], scored: int) -> None:
        self._model, self._samples, self._scored = model, samples, scored
        self._layers = [layer for _, layer in _layers_of(model)]
        self._given: list[list[Any]] = []
        self._expected = []
        for ids in samples:
            with _recorded(self._layers) as given:
                self._expected.append(self._logits(ids, load_scheme("float")))
            self._given.append(given)

    @torch.inference_mode()
    def _logits(self, ids: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        """The logits `[T, V]` behind the scored tokens."""
        arguments = {cache_argument(self._model): QuantizedCache(self._model.config, scheme)}
        with whole_passes(self._model.base_model):
            return self._model(ids[None], logits_to_keep=self._scored, **arguments).logits[0]

    def kl(self, scheme: Scheme, first: int = 0) -> float:
        """Mean KL of the scored tokens to the float model.

        Args:
            first: the first layer that is not float; those before it are not computed.
        """
        found = []
        for ids, given, expected in zip(self._samples, self._given, self._expected, strict=True):
            with _standing_in(self._layers[:first], given):
                found.append(kl_rows(expected, self._logits(ids, scheme)))
        return float(torch.cat(found).double().mean())

    def kl_of_layer(self, layer: int, scheme: Scheme) -> float:
        """The same, with a scheme in one layer and float in the others."""
        return self.kl(only_layer(layer, scheme), first=layer)


def _layers_of(model: Any) -> list[tuple[str, nn.Module]]:
    try:
        return decoder_layers(model)
    except OctavoError:
        kind = model.config.model_type
        raise OctavoError(f"model_type {kind!r}: octavo search does not know which modules are its layers") from None


@contextmanager
def _recorded(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What the layers return within it."""
    given: list[Any] = []
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_hook(lambda module, inputs, output: given.append(output))
            stack.callback(handle.remove)
        yield given


@contextmanager
def _standing_in(layers: Sequence[nn.Module], given: Sequence[Any]) -> Iterator[None]:
    """Within it, layers return what they did before, and compute nothing."""
    with ExitStack() as stack:
        for layer, output in zip(layers, given, strict=False):
            layer.forward = partial(_returned, output)
            stack.callback(delattr, layer, "forward")
        yield


def _returned(output: Any, *_: Any, **__: Any) -> Any:
    return output
