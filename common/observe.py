"""Calibration: run the float model over texts and keep what scales are derived from (see `statistics`)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..ops.library import NAMESPACE
from .checkpoints.ascend import attention_modules
from .folds import folds_key_bias, large_key_bias, norm_before
from .rotation import rope_constants, rotated_by_slot
from .statistics import Statistics, rotary_radius

OBSERVING = f"{NAMESPACE}_observe"
BINS = 2048


def left_out_biases(
    attention: nn.Module, norm: nn.Module | None, has_key_fold: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What folding leaves out of the k and v of an attention, float32 `[G, 1, D]` each, or None.

    Args:
        norm: the norm before it.
        has_key_fold: whether the bias of k can be folded.
    """
    key = value = None
    if has_key_fold and attention.k_proj.bias is not None:
        bias = large_key_bias(attention.k_proj, norm, attention.head_dim)
        key = bias.float().view(-1, 1, attention.head_dim)
    if attention.v_proj.bias is not None:
        value = attention.v_proj.bias.detach().float().view(-1, 1, attention.head_dim)
    return key, value


class AttentionObserver:
    """Extremes of q, k and v of one attention: per channel, and for q and k the length of each rotary pair.

    Args:
        attention: the module, for the biases of its projections.
        norm: the norm before it.
        frequencies, factor: angles per token of the rotary pairs, `[D / 2]`, and the factor of cos and sin.
        has_key_fold: whether the bias of k can be folded.
    """

    def __init__(
        self,
        attention: nn.Module,
        norm: nn.Module | None,
        frequencies: torch.Tensor,
        factor: float,
        has_key_fold: bool = True,
    ) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self._frequencies, self._factor = frequencies, factor
        self._key_bias, self._value_bias = left_out_biases(attention, norm, has_key_fold)

    def _keep(self, name: str, values: torch.Tensor) -> None:
        """Fold `[1, heads, S, width]` into the running maximum `[heads, width]`."""
        largest = values.float().amax(dim=(0, 2))
        self.found[name] = torch.maximum(self.found.get(name, largest), largest)

    def _keep_range(self, name: str, values: torch.Tensor) -> None:
        self._keep(f"{name}.high", values)
        self._keep(f"{name}.negative_low", -values)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """See `[1, H or G, S, D]` states after RoPE, of tokens from the first on."""
        for name, states in (("q", query), ("k", key)):
            self._keep(f"{name}.max", states.abs())
            self._keep(f"{name}.radius", rotary_radius(states.float()))
        self._keep_range("v", value)
        if self._key_bias is not None:
            before = rotated_by_slot(key.float(), self._frequencies, 0, backwards=True)
            self._keep("k.folded.radius", rotary_radius(before - self._factor * self._key_bias))
        if self._value_bias is not None:
            self._keep_range("v.folded", value.float() - self._value_bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was found, by the names of `statistics.py` within a layer."""
        return {
            name.replace("negative_low", "low"): (-found if "negative" in name else found).cpu()
            for name, found in self.found.items()
        }


class InputObserver:
    """Range, spread and histogram of the inputs of one linear layer.

    The histogram has `BINS` equal bins over `[-limit, limit]`; when a value falls outside, the limit doubles and
    neighbouring bins merge, so that no earlier value is needed again.
    """

    def __init__(self) -> None:
        self.low = self.high = self.squares = 0.0
        self.count = 0
        self.limit = 0.0
        self.histogram = torch.zeros(BINS)

    def _widen(self, largest: float) -> None:
        if self.limit == 0.0:
            self.limit = largest
        while largest > self.limit:
            merged = self.histogram.view(-1, 2).sum(dim=1)
            self.histogram = nn.functional.pad(merged, (BINS // 4, BINS // 4))
            self.limit *= 2

    def __call__(self, x: torch.Tensor) -> None:
        """See inputs of any shape."""
        values = x.detach().float()
        low, high = (float(bound) for bound in torch.aminmax(values))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.squares += float(torch.linalg.vector_norm(values)) ** 2
        self.count += values.numel()
        if not math.isfinite(self.squares):
            return
        self._widen(max(-low, high))
        if self.limit > 0.0:
            bins = ((values.flatten() + self.limit) * (BINS / 2 / self.limit)).int().clamp_(0, BINS - 1)
            self.histogram += torch.bincount(bins, minlength=BINS).cpu()

    def tensors(self) -> dict[str, torch.Tensor]:
        """`range` [low, high, root mean square, limit of the histogram] and `histogram` [BINS]."""
        spread = math.sqrt(self.squares / max(1, self.count))
        return {"range": torch.tensor([self.low, self.high, spread, self.limit]), "histogram": self.histogram.clone()}


class InputObservers:
    """The observers of all linear layers; layers that are given the same tensor (q, k and v; gate and up) share one."""

    def __init__(self, model: nn.Module, linears: Iterable[str]) -> None:
        self.of: dict[str, InputObserver] = {}
        self._last: tuple[torch.Tensor | None, InputObserver | None] = (None, None)
        self._hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: self._see(name, args[0]))
            for name in linears
        ]

    def _see(self, name: str, x: torch.Tensor) -> None:
        if x is self._last[0]:
            self.of.setdefault(name, self._last[1])
            return
        observer = self.of.setdefault(name, InputObserver())
        observer(x)
        self._last = (x, observer)

    def remove(self) -> None:
        """Stop observing."""
        self._last = (None, None)
        for hook in self._hooks:
            hook.remove()


def _observing_attention(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    module.attention_observer(query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def calibrate(model: nn.Module, linears: Iterable[str], samples: Iterable[dict[str, torch.Tensor]]) -> Statistics:
    """Run a float model of transformers over samples and collect statistics; the model is left as it was.

    Args:
        model: a causal language model.
        linears: names of the linear layers whose inputs are observed.
        samples: keyword arguments of the model, `[1, S]` ids and mask each.
    """
    AttentionInterface.register(OBSERVING, _observing_attention)
    AttentionMaskInterface.register(OBSERVING, sdpa_mask)
    inputs = InputObservers(model, linears)
    attentions = attention_modules(model)
    for name, attention in attentions:
        frequencies, factor = rope_constants(model.config, attention.head_dim)
        attention.attention_observer = AttentionObserver(
            attention, norm_before(model, name), frequencies.to(model.device), factor, folds_key_bias(model)
        )
    before = model.config._attn_implementation
    model.set_attn_implementation(OBSERVING)
    tokens = 0
    try:
        with torch.inference_mode():
            for sample in samples:
                tokens += sample["input_ids"].shape[1]
                model(**{name: part.to(model.device) for name, part in sample.items()}, use_cache=False)
        tensors = {
            f"layers.{attention.layer_idx}.{name}": found
            for _, attention in attentions
            for name, found in attention.attention_observer.tensors().items()
        }
    finally:
        model.set_attn_implementation(before)
        inputs.remove()
        for _, attention in attentions:
            del attention.attention_observer
    for name, observer in inputs.of.items():
        tensors.update({f"linears.{name}.{part}": tensor for part, tensor in observer.tensors().items()})
    facts = {"model_type": model.config.model_type, "num_hidden_layers": len(attentions), "tokens": tokens}
    return Statistics(tensors, {name: str(value) for name, value in facts.items()})
