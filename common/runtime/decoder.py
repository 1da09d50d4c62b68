"""The anatomy of a decoder: what quantization must know of an architecture, stated as data beside its modeling file.

Names are those of modules within a decoder layer, but where it is said otherwise. What is not stated is not guessed:
`check_anatomy` refuses a model that has more, or less, or norms of another form than its statement says.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import OctavoError
from .experts import PROBE_SIZE, PROBE_TOLERANCE, ExpertsFacts, experts_faults, list_layer_experts
from .rotary import is_rotated, partial_rotary_factor

STATED = "octavo_decoder"
"""Attribute of a model, and of its decoder, that holds its `Decoder`."""


@dataclass(frozen=True)
class AttentionFacts:
    """The attention of a decoder layer: names within the layer.

    Attributes:
        name: of the module that calls transformers' `AttentionInterface`.
        query, key, value, output: of the projections. One name for `query`, `key` and `value` is one linear that makes
            all three, rows of q first, then those of k, then those of v.
        query_norm, key_norm: norms per head behind the projections, before RoPE.
    """

    name: str
    query: str
    key: str
    value: str
    output: str
    query_norm: str | None = None
    key_norm: str | None = None

    @property
    def is_fused(self) -> bool:
        """Whether one linear makes q, k and v."""
        return self.key == self.query

    @property
    def inputs(self) -> tuple[str, ...]:
        """The linears that read what the norm before attention makes."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))

    @property
    def modules(self) -> set[str]:
        """All modules of it that have parameters."""
        return {*self.inputs, self.output} | {name for name in (self.query_norm, self.key_norm) if name}


@dataclass(frozen=True)
class MlpFacts:
    """The MLP of a decoder layer, `down(act(gate(x)) * up(x))`: names within the layer.

    Attributes:
        gate, up, down: of the projections. One name for `gate` and `up` is one linear that makes both, rows of gate
            first.
    """

    gate: str
    up: str
    down: str

    @property
    def is_fused(self) -> bool:
        """Whether one linear makes gate and up."""
        return self.gate == self.up

    @property
    def inputs(self) -> tuple[str, ...]:
        """The linears that read what the norm before the MLP makes."""
        return tuple(dict.fromkeys((self.gate, self.up)))

    @property
    def modules(self) -> set[str]:
        """All modules of it that have parameters."""
        return {*self.inputs, self.down}


@dataclass(frozen=True)
class Decoder:
    """The anatomy of a decoder.

    Attributes:
        layers, embedding, norm, rotary: names within the decoder of the list of layers, the embedding of tokens, the
            norm behind the last layer, and the rotary embedding.
        head: name within the causal model of the last linear.
        attention, mlp: see there.
        attention_norm, mlp_norm: norms, whose output nothing reads but the projections of attention and of the MLP,
            or of the experts and their router.
        experts: what some layers, or all, have in the place of the MLP; None where none has.
        output_norms: norms of what attention and MLP add to the states.
        norm_offset: what every norm adds to its weight: 1 where it multiplies by `1 + w`.
        embedding_scale: from a config, the factor that the embedding multiplies its rows by; None where it has none.
        states_scale: from a config, the factor that the decoder itself multiplies embeddings by; None where by none.
        logits_divisor: from a config, what the model divides the outputs of the last linear by; None where by nothing.
        skips_rotation: whether the config's `no_rope_layers` counts: RoPE turns q and k of some layers only.
        is_partly_rotated: whether the config's `partial_rotary_factor` counts: RoPE turns the first channels of a head
            alone. Of those that it turns, channel d is paired with the one half of them further.
        caps_logits: whether the config's `final_logit_softcapping` counts; see `capped_logits`.
        residual_scale: from a config, what the outputs of attention and MLP are multiplied by before they are added to
            the states; None where by nothing.
        activation: name of the config's entry that names the activation of the MLP.
    """

    layers: str
    embedding: str
    norm: str
    rotary: str
    head: str
    attention: AttentionFacts
    mlp: MlpFacts
    attention_norm: str
    mlp_norm: str
    output_norms: tuple[str, ...] = ()
    norm_offset: float = 0.0
    embedding_scale: Callable[[Any], float] | None = None
    states_scale: Callable[[Any], float] | None = None
    logits_divisor: Callable[[Any], float] | None = None
    experts: ExpertsFacts | None = None
    skips_rotation: bool = False
    is_partly_rotated: bool = False
    caps_logits: bool = False
    residual_scale: Callable[[Any], float] | None = None
    activation: str = "hidden_act"

    @property
    def norms(self) -> tuple[str, ...]:
        """All norms of a layer."""
        heads = [name for name in (self.attention.query_norm, self.attention.key_norm) if name]
        return (self.attention_norm, self.mlp_norm, *self.output_norms, *heads)

    def experts_in(self, config: Any, index: int) -> int:
        """How many experts a layer has in the place of the MLP."""
        return 0 if self.experts is None else self.experts.count(config, index)

    def mlps(self, experts: int = 0) -> tuple[MlpFacts, ...]:
        """The MLPs of a layer: its one, or those of so many experts."""
        if not experts:
            return (self.mlp,)
        facts = self.experts
        return tuple(
            MlpFacts(*(facts.part(expert, part) for part in (facts.gate, facts.up, facts.down)))
            for expert in range(experts)
        )

    def modules(self, experts: int = 0) -> set[str]:
        """All modules of a layer of transformers that have parameters."""
        of_mlp = {self.experts.name, self.experts.router} if experts else self.mlp.modules
        return {*self.norms, *self.attention.modules, *of_mlp}


def state_decoder(model: nn.Module, decoder: Decoder) -> None:
    """Let a model of transformers, and the decoder within it, say what it is."""
    setattr(model, STATED, decoder)
    setattr(model.base_model, STATED, decoder)


def stated_decoder(model: nn.Module) -> Decoder:
    """What `state_decoder` was told of a model.

    Raises:
        OctavoError: it was told nothing.
    """
    found = getattr(model, STATED, None)
    if found is None:
        raise OctavoError(f"{type(model).__name__}: its anatomy is not stated; call octavo.prepare(model) first")
    return found


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers of a stated model."""
    decoder, base = stated_decoder(model), model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    layers = base.get_submodule(decoder.layers)
    return [(f"{prefix}{decoder.layers}.{index}", layer) for index, layer in enumerate(layers)]


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the attentions of a stated model, in the order of its layers."""
    name = stated_decoder(model).attention.name
    return [(f"{layer_name}.{name}", layer.get_submodule(name)) for layer_name, layer in decoder_layers(model)]


def list_experts(model: nn.Module) -> None:
    """Let the layers of a stated model of transformers hold their experts as lists, see `ExpertList`."""
    decoder = stated_decoder(model)
    for index, (_, layer) in enumerate(decoder_layers(model)):
        if decoder.experts_in(model.base_model.config, index):
            list_layer_experts(layer, decoder.experts)


def _with_parameters(layer: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in layer.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def multiplies_by(norm: nn.Module) -> float | None:
    """What an RMSNorm adds to its weight before it multiplies by it: 0 or 1; None if it computes something else."""
    probe = copy.copy(norm)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(PROBE_SIZE, generator=generator) for _ in range(2))
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    probe._forward_hooks, probe._forward_pre_hooks = {}, {}
    vars(probe).pop("forward", None)  # of accelerate, say, which would run the norm itself
    try:
        found = probe(x[None])[0]
    except (RuntimeError, TypeError, AttributeError):
        return None
    normed = x / x.square().mean().sqrt()
    for offset in (0.0, 1.0):
        if torch.allclose(found, normed * (offset + weight), atol=PROBE_TOLERANCE):
            return offset
    return None


def _with_linears(layer: nn.Module, linears: set[str]) -> dict[str, nn.Module]:
    """The same, where linears may be of any library: each counts as one module, whatever is in it."""
    inside = tuple(f"{name}." for name in linears)
    found = {name: module for name, module in _with_parameters(layer).items() if not name.startswith(inside)}
    return found | {name: module for name, module in layer.named_modules() if name in linears}


def _anatomy_faults(
    decoder: Decoder, layer: nn.Module, experts: int, are_linears_float: bool
) -> Iterator[tuple[str, str]]:
    """Modules of a layer that its statement does not say, or says otherwise, and what is the matter."""
    stated = decoder.modules(experts)
    linears = (decoder.attention.modules | decoder.mlp.modules) & stated - set(decoder.norms)
    found = _with_parameters(layer) if are_linears_float else _with_linears(layer, linears)
    for name in sorted(stated - set(found)):
        yield name, "is stated and not there"
    for name in sorted(set(found) - stated):
        yield name, "is there and not stated"
    for name in sorted(set(decoder.norms) & set(found)):
        offset = multiplies_by(found[name])
        if offset is None:
            yield name, f"is stated as an RMSNorm, and {type(found[name]).__name__} computes something else"
        elif offset != decoder.norm_offset:
            forms = {0.0: "w", 1.0: "1 + w"}
            yield name, f"multiplies by {forms[offset]}, and is stated to multiply by {forms[decoder.norm_offset]}"
    head_dim = layer.get_submodule(decoder.attention.name).head_dim
    for name in (decoder.attention.query_norm, decoder.attention.key_norm):
        if name in found and found[name].weight.numel() != head_dim:
            yield name, f"norms {found[name].weight.numel()} channels, and is stated to norm the {head_dim} of a head"
    for name in sorted(linears & set(found) if are_linears_float else ()):
        if not isinstance(found[name], nn.Linear):
            yield name, f"is stated as a linear and is a {type(found[name]).__name__}"
    if experts:
        yield from experts_faults(layer, decoder.experts, experts)


def anatomy_fault(model: nn.Module, decoder: Decoder, are_linears_float: bool = True) -> str | None:
    """What about a model is not as stated: the first module, named, and what is the matter; None if all is.

    Args:
        are_linears_float: whether its linears have to be; else they may be those of another library, in codes, say.
    """
    base = model.base_model
    for name in (decoder.layers, decoder.embedding, decoder.norm, decoder.rotary):
        if name not in dict(base.named_children()):
            return f"{name}: is stated and not there"
    offset = multiplies_by(base.get_submodule(decoder.norm))
    if offset != decoder.norm_offset:
        return f"{decoder.norm}: is not of the form that is stated for norms"
    for index, layer in enumerate(base.get_submodule(decoder.layers)):
        fault = next(_anatomy_faults(decoder, layer, decoder.experts_in(base.config, index), are_linears_float), None)
        if fault is not None:
            return f"{decoder.layers}.{index}.{fault[0]}: {fault[1]}"
        if getattr(layer.get_submodule(decoder.attention.name), "is_causal", True) is False:
            return f"{decoder.layers}.{index}: its attention sees tokens that are still to come"
    fault = _rotation_fault(base.config, decoder, len(base.get_submodule(decoder.layers)))
    return fault or _cap_fault(base.config, decoder)


def _cap_fault(config: Any, decoder: Decoder) -> str | None:
    """What about the bounds of scores and logits is not as stated."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "config: attn_logit_softcapping bounds the scores of attention, which attention over codes does not"
    if getattr(config, "final_logit_softcapping", None) is not None and not decoder.caps_logits:
        return "config: final_logit_softcapping bounds logits, and they are stated to be as the last linear makes them"
    return None


def scaled_states(decoder: Decoder, config: Any, embedded: torch.Tensor) -> torch.Tensor:
    """What the first layer is given of embeddings of any shape."""
    return embedded if decoder.states_scale is None else embedded * decoder.states_scale(config)


def capped_logits(decoder: Decoder, config: Any, logits: torch.Tensor) -> torch.Tensor:
    """What the model makes of the outputs of its last linear, of any shape: it divides by a divisor that is stated,
    and takes `c tanh(x / c)` where the config states a c."""
    if decoder.logits_divisor is not None:
        logits = logits / decoder.logits_divisor(config)
    cap = getattr(config, "final_logit_softcapping", None) if decoder.caps_logits else None
    return logits if cap is None else (logits / cap).tanh() * cap


def _rotation_fault(config: Any, decoder: Decoder, layers: int) -> str | None:
    """What about RoPE is not as stated."""
    for index in range(layers):
        if not is_rotated(config, index) and not decoder.skips_rotation:
            return f"config: layer {index} is without RoPE, and none is stated to be"
        factor = partial_rotary_factor(config, index)
        if factor != 1.0 and not decoder.is_partly_rotated:
            return f"config: RoPE turns {factor:g} of the channels of a head, and is stated to turn all"
    return None


def check_anatomy(model: nn.Module, decoder: Decoder, where: str, are_linears_float: bool = True) -> None:
    """Raise an `OctavoError` that names the first module of a model that is not as stated.

    Args:
        where: what states it, for the message, as "models/llama3".
        are_linears_float: as of `anatomy_fault`.
    """
    fault = anatomy_fault(model, decoder, are_linears_float)
    if fault is not None:
        raise OctavoError(
            f"{type(model).__name__}: {fault} (in {where}); it only looks like what is served, and would be damaged"
        )


def without_adapter(module: nn.Module | None) -> nn.Module | None:
    """The module that PEFT has wrapped, or the one that is given where it has not."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def linear_of(decoder: Decoder, attention: nn.Module, part: str) -> nn.Module | None:
    """The projection that makes nothing but q, k or v of an attention module; None where one makes all.

    Of one that an adapter changes, it is the linear within PEFT's layer.

    Args:
        part: "query", "key" or "value".
    """
    facts = decoder.attention
    if facts.is_fused:
        return None
    return without_adapter(attention.get_submodule(getattr(facts, part).removeprefix(f"{facts.name}.")))


def has_foldable_bias(decoder: Decoder, attention: nn.Module) -> bool:
    """Whether a projection that makes nothing but k, or nothing but v, has a bias."""
    linears = (linear_of(decoder, attention, part) for part in ("key", "value"))
    return any(linear is not None and linear.bias is not None for linear in linears)


def fits_attention(model: nn.Module, decoder: Decoder) -> bool:
    """Whether q, k and v of a float model, of which nothing is stated, are made as a statement says."""
    base = model.base_model
    children, facts = dict(base.named_children()), decoder.attention
    if decoder.layers not in children or decoder.rotary not in children or facts.is_fused:
        return False
    for layer in children[decoder.layers]:
        attention = dict(layer.named_children()).get(facts.name)
        if not (hasattr(attention, "layer_idx") and hasattr(attention, "head_dim")):
            return False
        found = {f"{facts.name}.{name}": module for name, module in _with_parameters(attention).items()}
        has_norm = any(module.weight.dim() == 1 for module in found.values() if hasattr(module, "weight"))
        is_made = all(isinstance(found.get(name), nn.Linear) for name in facts.inputs)
        if not is_made or has_norm != (facts.key_norm is not None):
            return False
    return True
