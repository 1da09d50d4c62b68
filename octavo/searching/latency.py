"""Times of decode steps: attention and the update of the cache, by the kernels of this machine.

L layers, O options, H query heads, G KV heads, D head_dim.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..common.errors import OctavoError
from ..common.runtime.attention import SlidingWindow, quantized_attention
from ..common.runtime.cache.quantized_cache import QuantizedCache
from ..common.runtime.cache.sliding import sliding_windows
from ..common.runtime.compatibility import cache_argument
from ..common.runtime.decoder import attention_modules
from ..common.runtime.model_sizes import attention_sizes
from ..common.runtime.schemes.kv_scheme import Scheme, load_scheme
from ..generate import Speaker
from ..machine import finish
from .sides import Option, identity_of
from .store import Store

REPEATS = 5
"""How often each step of a group of tokens is timed."""
_WARM = 2
"""Rounds before the first that counts."""


def period_of(schemes: Sequence[Scheme]) -> int:
    """Steps after which tokens have become codes a whole number of times in each of these schemes of a layer."""
    return math.lcm(*(scheme.step(codec) for scheme in schemes for codec in (scheme.key, scheme.value)))


def in_turns(steps: Sequence[Callable[[], float]], period: int) -> list[float]:
    """Seconds of a step of each, which take turns, so that what slows the machine down slows all of them.

    Tokens become codes in groups, so that steps differ: the median is of those at the same place in a group, and the
    mean of these medians is the time.
    """
    for _ in range(_WARM):
        for step in steps:
            step()
    rounds = tqdm(range(REPEATS * period), desc="time", unit="step")
    found = torch.tensor([[step() for step in steps] for _ in rounds], dtype=torch.float64)
    return found.view(REPEATS, period, len(steps)).median(dim=0).values.mean(dim=0).tolist()


@dataclass(frozen=True)
class Times:
    """Milliseconds of attention and the update of the cache in one decode step, over all layers.

    Attributes:
        budget: what was asked for.
        predicted: as the sum over the layers that were chosen.
        measured: of these layers one behind the other.
        floats: of as many layers of floats in the same cache.
        context: tokens that the cache holds.
        machine: the processor.
    """

    budget: float
    predicted: float
    measured: float
    floats: float
    context: int
    machine: str

    def sentence(self) -> str:
        """All of it, and whether the budget holds for the whole."""
        said = (
            f"Attention and the update of the cache in one decode step at {self.context:,} tokens on {self.machine}: "
            f"{self.predicted:.4g} ms as the sum over layers, {self.measured:.4g} ms measured as a whole; "
            f"{self.floats:.4g} ms with floats."
        )
        if self.measured > self.budget:
            said += (
                f" As a whole that is above the budget of {self.budget:g} ms: give less; or, if the machine had other "
                "work, remove the directory timed beside the scheme and time again."
            )
        return said


class DecodeStep:
    """What decoding asks of the cache of some layers: one token comes to each, and its query reads all tokens.

    Args:
        model: prepared for a `QuantizedCache`; its attention modules add what they fold of biases.
        scheme: of all its layers.
        layers: that are timed, one behind the other.
        tokens: that each holds before, random ones.
        room: for so many steps.
        dtype: of the states.
    """

    def __init__(
        self, model: Any, scheme: Scheme, layers: Sequence[int], tokens: int, room: int, dtype: torch.dtype
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        windows, attentions = sliding_windows(config), attention_modules(model)
        self._parts: list[tuple[int, nn.Module, SlidingWindow | None]] = [
            (layer, attentions[layer][1], None if windows[layer] is None else SlidingWindow(windows[layer]))
            for layer in layers
        ]
        self.cache = QuantizedCache(config, scheme)
        self.cache.expect(tokens + room)
        self._device, (heads, kv_heads, head_dim) = model.device, attention_sizes(config)

        def states(count: int, length: int) -> torch.Tensor:
            return torch.randn(1, count, length, head_dim, dtype=dtype, device=self._device)

        with torch.inference_mode():
            token = torch.zeros((1, 1), dtype=torch.int64, device=self._device)
            model(token, **{cache_argument(model): QuantizedCache(config, "float")})  # by which folds know their biases
            for layer in layers:
                self.cache.update(states(kv_heads, tokens), states(kv_heads, tokens), layer)
            self._query, self._key, self._value = states(heads, 1), states(kv_heads, 1), states(kv_heads, 1)
        self._position = torch.tensor([[tokens]], device=self._device)

    @torch.inference_mode()
    def seconds(self) -> float:
        """Take a step, and tell how long it took."""
        finish(self._device)
        started = time.perf_counter()
        for layer, attention, mask in self._parts:
            handles = self.cache.update(self._key, self._value, layer)
            quantized_attention(attention, self._query, *handles, mask, position_ids=self._position)
        finish(self._device)
        taken = time.perf_counter() - started
        self._position += 1
        return taken


class Stopwatch:
    """Times of a model's schemes at some tokens.

    Args:
        speaker: of the float model.
        dtype: of the states that the model runs in.
        tokens: that the cache holds.
        store: of what was timed before.
    """

    def __init__(self, speaker: Speaker, dtype: torch.dtype, tokens: int, store: Store) -> None:
        self._model, self._dtype, self._tokens, self._store = speaker.model, dtype, tokens, store
        self._windows = sliding_windows(speaker.model.config.get_text_config(decoder=True))

    def _timed(self, parts: Sequence[tuple[Scheme, Sequence[int]]], kinds: Sequence[Scheme]) -> list[float]:
        """Seconds of a step of each scheme in some layers; `kinds` are all schemes of a layer among them."""
        period = period_of(kinds)
        steps = REPEATS * period + _WARM
        before = max(1, self._tokens - steps // 2)
        found = [
            DecodeStep(self._model, scheme, layers, before, steps, self._dtype).seconds for scheme, layers in parts
        ]
        return in_turns(found, period)

    def of_options(self, options: Sequence[Option]) -> list[list[float]]:
        """Seconds of a decode step in each layer (row) by each option (column), `[L][O]`.

        All layers of a model are of one shape: one of each sliding window is timed. The caches of all options take
        turns, so that each comes from memory as far as it does in a model.
        """
        kinds = list(dict.fromkeys(self._windows))
        cases = {
            f"window {window} {identity_of(option.scheme)}": (option.scheme, [self._windows.index(window)])
            for window in kinds
            for option in options
        }

        def measure(missing: Sequence[str]) -> list[float]:
            return self._timed([cases[name] for name in missing], [cases[name][0] for name in missing])

        found = iter(self._store.figures("layer", list(cases), measure))
        rows = {window: [next(found) for _ in options] for window in kinds}
        return [rows[window] for window in self._windows]

    def of_whole(self, scheme: Scheme) -> tuple[float, float]:
        """Seconds of a decode step of a scheme in all layers, one behind the other, and of floats in the same cache."""
        layers = range(len(self._windows))
        schemes, names = [scheme, load_scheme("float")], ["searched", "float"]

        def measure(_: Sequence[str]) -> list[dict[str, float]]:
            times = self._timed([(each, layers) for each in schemes], [scheme.of_layer(layer) for layer in layers])
            return [dict(zip(names, times, strict=True))]

        (found,) = self._store.figures("whole", [identity_of(scheme)], measure)
        return found["searched"], found["float"]


def check_milliseconds(
    milliseconds: float, options: Sequence[Option], seconds: Sequence[Sequence[float]], context: int
) -> None:
    """Raise an `OctavoError` that names the fastest if no choice takes so little.

    Args:
        seconds: of each option in each layer, `[L][O]`.
        context: tokens at which they were taken.
    """
    least = sum(map(min, seconds))
    if least <= milliseconds / 1e3:
        return
    fastest = dict.fromkeys(options[row.index(min(row))].scheme.name for row in seconds)
    raise OctavoError(
        f"--milliseconds {milliseconds:g}: on this machine the fastest of these schemes ({'; '.join(fastest)}) takes "
        f"{least * 1e3:.4g} ms at {context:,} tokens; give more, other --schemes, or a smaller --context"
    )
