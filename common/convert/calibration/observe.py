"""Calibration: run the float model over texts and keep what scales are derived from (see `static_scales.py`)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ....ops.shared.registry import NAMESPACE
from ...architecture import stated_or_known
from ...runtime.bias_fold import folds_key_bias, large_key_bias
from ...runtime.decoder import attention_modules, decoder_layers, linear_of, stated_decoder
from ...runtime.experts import ExpertList
from ...runtime.rotary import rope_constants, rotated_by_slot
from ...runtime.schemes.linear_scheme import LinearInputs
from ...runtime.static_scales import Statistics, rotary_radius, statistics_facts

OBSERVING = f"{NAMESPACE}_observe"
MOST_BYTES = 2**26
"""Of rows that are kept of the inputs of a linear layer."""
MOST_EXPERT_BYTES = 2**22
"""Likewise of one of an expert, of which a decoder layer has many: 512 rows of 2,048 channels."""
INPUT_PARTS = ("low", "high", "mean_abs", "mean_square")


def left_out_biases(model: nn.Module, index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What folding leaves out of the k and v of a layer of a stated model, float32 `[G, 1, D]` each, or None."""
    decoder, layer = stated_decoder(model), decoder_layers(model)[index][1]
    attention = layer.get_submodule(decoder.attention.name)
    key, value = (linear_of(decoder, attention, part) for part in ("key", "value"))
    shape = -1, 1, attention.head_dim
    key_bias = value_bias = None
    if key is not None and key.bias is not None and folds_key_bias(model, index):
        norm = layer.get_submodule(decoder.attention_norm)
        key_bias = large_key_bias(key, norm, attention.head_dim, decoder.norm_offset).float().view(shape)
    if value is not None and value.bias is not None:
        value_bias = value.bias.detach().float().view(shape)
    return key_bias, value_bias


class AttentionObserver:
    """Extremes of q, k and v of one attention: per channel, and for q and k the length of each rotary pair.

    Args:
        biases: of k and v, which the cache leaves out, `[G, 1, D]` each, or None.
        frequencies, factor: angles per token of the rotary pairs, `[D / 2]` or fewer, and the factor of cos and sin.
    """

    def __init__(
        self, biases: tuple[torch.Tensor | None, torch.Tensor | None], frequencies: torch.Tensor, factor: float
    ) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self._frequencies, self._factor = frequencies, factor
        self._key_bias, self._value_bias = biases

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
            self._keep(f"{name}.radius", rotary_radius(states.float(), len(self._frequencies)))
        self._keep_range("v", value)
        if self._key_bias is not None:
            before = rotated_by_slot(key.float(), self._frequencies, 0, backwards=True)
            self._keep("k.folded.radius", rotary_radius(before - self._factor * self._key_bias, len(self._frequencies)))
        if self._value_bias is not None:
            self._keep_range("v.folded", value.float() - self._value_bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was found, by the names of `static_scales.py` within a layer."""
        return {
            name.replace("negative_low", "low"): (-found if "negative" in name else found).cpu()
            for name, found in self.found.items()
        }


class InputObserver:
    """What the inputs of one linear layer are like: extremes and means of each channel, and some rows.

    Rows are kept evenly: once they take more than `MOST_BYTES`, every second one goes, and from then on every second
    one that comes is kept.

    Args:
        keeps_hessian: whether the mean of x x^T is worked out too, `[K, K]`.
        most_bytes: in the place of `MOST_BYTES`, if given.
    """

    def __init__(self, keeps_hessian: bool = False, most_bytes: int | None = None) -> None:
        self.count = 0
        self._most_bytes = most_bytes or MOST_BYTES
        self._hessian: torch.Tensor | None = None
        self._keeps_hessian = keeps_hessian
        self._stride = 1
        self._rows: list[torch.Tensor] = []
        self._bytes = 0

    def __call__(self, x: torch.Tensor) -> None:
        """See inputs `[..., K]`."""
        values = x.detach().float().reshape(-1, x.shape[-1])
        low, high = values.amin(dim=0), values.amax(dim=0)
        sums = values.abs().sum(dim=0, dtype=torch.float64), values.square().sum(dim=0, dtype=torch.float64)
        if not self.count:
            self.low, self.high, (self._abs, self._squares) = low, high, sums
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            self._abs, self._squares = self._abs + sums[0], self._squares + sums[1]
        if self._keeps_hessian:
            if self._hessian is None:
                self._hessian = values.new_zeros(values.shape[1], values.shape[1])
            self._hessian.addmm_(values.T, values)
        self._rows.append(values[-self.count % self._stride :: self._stride].clone())
        self._bytes += self._rows[-1].nbytes
        self.count += len(values)
        while self._bytes > self._most_bytes:
            self._stride *= 2
            self._rows = [torch.cat(self._rows)[::2].clone()]
            self._bytes = self._rows[0].nbytes

    def inputs(self) -> LinearInputs:
        """What was found."""
        means = (self._abs / self.count).float(), (self._squares / self.count).float()
        hessian = None if self._hessian is None else self._hessian / self.count
        return LinearInputs(self.low, self.high, *means, torch.cat(self._rows), hessian)


class ExpertWatch:
    """Which experts of a layer calibration reaches, and what it gives to all of them.

    Args:
        experts: of the layer.
    """

    def __init__(self, experts: ExpertList) -> None:
        self._experts = experts
        self._unreached = dict.fromkeys(range(len(experts)))
        self._states: list[torch.Tensor] = []
        self._bytes = 0
        self._hook = experts.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        states, chosen = args[:2]
        for number in chosen.unique().tolist():
            self._unreached.pop(number, None)
        if self._bytes < MOST_BYTES:
            self._states.append(states)
            self._bytes += states.nbytes

    def reach_all(self) -> list[int]:
        """Give those that no token chose the tokens of all; returns their numbers."""
        for number in self._unreached:
            for states in self._states:
                self._experts[number](states)
        return list(self._unreached)

    def remove(self) -> None:
        """Stop watching."""
        self._hook.remove()


class InputObservers:
    """The observers of some linear layers; layers that are given the same tensor (q, k and v; gate and up) share one.

    Args:
        linears: by name.
        keeps_hessian: see `InputObserver`.
        experts: of the layer that they are in, if it has any; see `reach_all_experts`.
    """

    def __init__(
        self, linears: dict[str, nn.Module], keeps_hessian: bool = False, experts: ExpertList | None = None
    ) -> None:
        self._keeps_hessian = keeps_hessian
        self._watch = None if experts is None else ExpertWatch(experts)
        of_experts = set() if experts is None else set(experts.modules())
        self._most_bytes = {name: MOST_EXPERT_BYTES for name, linear in linears.items() if linear in of_experts}
        self._of: dict[str, InputObserver] = {}
        self._last: tuple[torch.Tensor | None, InputObserver | None] = (None, None)
        self._hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name: self._see(name, args[0]))
            for name, linear in linears.items()
        ]

    def _see(self, name: str, x: torch.Tensor) -> None:
        if x is self._last[0]:
            self._of.setdefault(name, self._last[1])
            return
        observer = self._of.setdefault(name, InputObserver(self._keeps_hessian, self._most_bytes.get(name)))
        observer(x)
        self._last = (x, observer)

    def inputs(self) -> dict[str, LinearInputs]:
        """What was found, by name; layers that share an observer hold the same object."""
        found = {id(observer): observer.inputs() for observer in self._of.values()}
        return {name: found[id(observer)] for name, observer in self._of.items()}

    def reach_all_experts(self) -> list[int]:
        """Give the experts that no token has chosen the tokens of all; returns their numbers."""
        return [] if self._watch is None else self._watch.reach_all()

    def remove(self) -> None:
        """Stop observing."""
        self._last = (None, None)
        if self._watch is not None:
            self._watch.remove()
        for hook in self._hooks:
            hook.remove()


def _observing_attention(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    module.attention_observer(query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


@contextmanager
def attention_replaced(
    model: nn.Module, attentions: list[tuple[str, nn.Module]], name: str, function: Callable, watcher: str,
    make: Callable[[nn.Module, torch.Tensor, float], Any],
) -> Iterator[None]:  # fmt: skip
    """Within it, some attention modules of a model call a function in the place of theirs, and have a watcher each.

    Args:
        attentions: names and modules, as `attention_modules` gives them.
        name: of the function among transformers' implementations.
        function: what transformers calls.
        watcher: attribute of a module that holds its watcher.
        make: a watcher, from the module, its angles per token `[R / 2]` on its device, and the factor of cos and sin.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    before = model.config._attn_implementation
    try:
        for _, attention in attentions:
            frequencies, factor = rope_constants(model.config, attention.head_dim, attention.layer_idx)
            device = next(attention.parameters()).device
            setattr(attention, watcher, make(attention, frequencies.to(device), factor))
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        for _, attention in attentions:
            vars(attention).pop(watcher, None)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Within it, a model is evaluated with gradients by its states, and by none of its parameters."""
    was_training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def observing_attention(model: nn.Module, attentions: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Within it, passes of the model show q, k and v to an `attention_observer` of each of some attention modules.

    Args:
        attentions: names and modules, as `attention_modules` gives them.
    """

    def make(attention: nn.Module, frequencies: torch.Tensor, factor: float) -> AttentionObserver:
        return AttentionObserver(left_out_biases(model, attention.layer_idx), frequencies, factor)

    with attention_replaced(model, attentions, OBSERVING, _observing_attention, "attention_observer", make):
        yield


def attention_tensors(attention: nn.Module) -> dict[str, torch.Tensor]:
    """What the observer of an attention module found, by the names of `static_scales.py`."""
    found = attention.attention_observer.tensors()
    return {f"layers.{attention.layer_idx}.{name}": tensor for name, tensor in found.items()}


def input_tensors(inputs: dict[str, LinearInputs]) -> dict[str, torch.Tensor]:
    """What is kept of the inputs of linear layers, by the names of `static_scales.py`."""
    return {
        f"linears.{name}.{part}": getattr(found, part).cpu().clone()
        for name, found in inputs.items()
        for part in INPUT_PARTS
    }


def calibrate(model: nn.Module, linears: Iterable[str], samples: Iterable[dict[str, torch.Tensor]]) -> Statistics:
    """Run a float model of transformers over samples and collect statistics; the model is left as it was.

    Args:
        model: a causal language model of an architecture of the zoo.
        linears: names of the linear layers whose inputs are observed.
        samples: keyword arguments of the model, `[1, S]` ids and mask each.
    """
    stated_or_known(model)
    attentions = attention_modules(model)
    tokens = 0
    inputs = InputObservers({name: model.get_submodule(name) for name in linears})
    try:
        with torch.inference_mode(), observing_attention(model, attentions):
            for sample in samples:
                tokens += sample["input_ids"].shape[1]
                model(**{name: part.to(model.device) for name, part in sample.items()}, use_cache=False)
            tensors = {k: v for _, attention in attentions for k, v in attention_tensors(attention).items()}
    finally:
        inputs.remove()
    return Statistics(tensors | input_tensors(inputs.inputs()), statistics_facts(model.config, tokens))
