"""What a conversion is to make of a model."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedConfig

from ..errors import OctavoError
from ..runtime.checkpoint.loading import CONFIG_KEY
from ..runtime.schemes.kv_scheme import Scheme
from ..runtime.schemes.linear_scheme import (
    EMBEDDING,
    EMBEDDING_SCHEME,
    FP8_LABELS,
    GROUP_SIZES,
    W8A16,
    WEIGHT_ONLY,
    LinearScheme,
)
from ..runtime.static_scales import LayerScales
from .outliers.subgraphs import shifted_subgraphs
from .source.layerwise import LayerwiseModel
from .source.quantized.weight import CodedLinear
from .spelling import named
from .weights.quantize import deq_scale_dtype

WIDE_GROUP = 128
"""Input channels that share a scale of linears in int8 where others are in int4: 8.5 bits a weight."""
OFFSETS = "m2"
"""The treatment of outliers that shifts inputs."""


@dataclass(frozen=True)
class Plan:
    """What to make of a model.

    Attributes:
        scheme: of attention and cache.
        linear: of the linear layers that are quantized; of those in `coded`, what most of them are.
        linears: their names.
        anti_method: treatment of outliers: "", "m1", "m2", "m3", "m4" or "m6".
        dtype: of the source, as safetensors spells it.
        cpu_activations: what weight-only linears multiply with on the CPU, see `ConvertRequest`.
        quantizes_embeddings: whether the embedding and the last linear are in int8.
        engine_dtype: of the model where engines run it, see there.
        is_of_vllm: whether scales of K and V have the names of vLLM's models, see `c8_place`.
        called: labels that the description has in the place of ours, by ours.
        coded: those of `linears` that the source holds in codes, which stay as they are: all of them or none.
        wide: those of `linears` that are in int8, W8A16 in groups, where the others are in int4.
        source_scales: static scales of each layer that the source keeps, and calibration does not replace; empty if it
            is to find all of them.
    """

    scheme: Scheme
    linear: LinearScheme
    linears: tuple[str, ...]
    anti_method: str
    dtype: str
    cpu_activations: str
    quantizes_embeddings: bool
    engine_dtype: torch.dtype = torch.bfloat16
    is_of_vllm: bool = False
    called: Mapping[str, str] = field(default_factory=dict)
    coded: Mapping[str, CodedLinear] = field(default_factory=dict)
    source_scales: tuple[LayerScales, ...] = ()
    wide: frozenset[str] = frozenset()

    def scheme_of(self, linear: str) -> LinearScheme:
        """How one of `linears` is quantized that is not in codes."""
        if linear not in self.wide:
            return self.linear
        return replace(self.linear, label=W8A16, group_size=WIDE_GROUP, symmetric=True)

    def label_of(self, linear: str) -> str:
        """The label of one of `linears`."""
        return self.coded[linear].label if linear in self.coded else self.scheme_of(linear).label

    def described(self, label: str) -> str:
        """What the description calls a label."""
        return self.called.get(label, label)

    @property
    def kinds(self) -> list[tuple[str, int, bool]]:
        """Label, group size and whether weights are symmetric, of the linears that differ in these, each once."""
        if not self.linears:
            return []
        coded = (self.coded[name] for name in self.linears if name in self.coded)
        found = [(linear.label, linear.group, linear.symmetric) for linear in coded]
        made = [] if found else [self.scheme_of(name) for name in self.linears]
        return list(dict.fromkeys([*found, *((each.label, each.group_size, each.symmetric) for each in made)]))

    def scales_of(self, linear: str, out_features: int, in_features: int) -> tuple[int, int]:
        """Rows and columns of the scales of the weight of one of `linears`.

        Raises:
            OctavoError: its channels make no groups.
        """
        if linear in self.coded:
            return self.coded[linear].scales
        groups = self.scheme_of(linear).num_groups(in_features)
        return (1 if self.linear.per_tensor else out_features), groups

    def has_one_scale(self, linear: str) -> bool:
        """Whether one scale is for the whole weight of one of `linears`."""
        return self.coded[linear].scales[0] == 1 if linear in self.coded else self.linear.per_tensor

    @property
    def has_weight_only(self) -> bool:
        """Whether there are linears for which `cpu_activations` counts."""
        return self.quantizes_embeddings or any(self.label_of(name) in WEIGHT_ONLY for name in self.linears)

    @property
    def needs_hessian(self) -> bool:
        """Whether calibration works out the mean of x x^T of the inputs of linears."""
        return self.linear.w_method == "GPTQ" and not self.coded

    @property
    def uses_inputs(self) -> bool:
        """Whether anything of the linears follows from their inputs."""
        by_inputs = self.linear.needs_inputs or self.anti_method or self.linear.w_method != "MinMax"
        return bool(self.linears and by_inputs and not self.coded)

    def own_head(self, source: LayerwiseModel) -> tuple[str, ...]:
        """Name of the last linear if it is in int8 with a weight of its own; empty if it is not."""
        is_own = self.quantizes_embeddings and source.facts.head not in source.tied_modules
        return (source.facts.head,) if is_own else ()

    def labels(self, source: LayerwiseModel) -> dict[str, str]:
        """Label by name of all that is in codes and stored."""
        labels = {name: self.label_of(name) for name in self.linears}
        if self.quantizes_embeddings:
            labels |= {**dict.fromkeys(self.own_head(source), EMBEDDING_SCHEME.label), source.embedding_name: EMBEDDING}
        return labels

    def of(self, module: str) -> list[str]:
        """Names within a module of its linears that are quantized."""
        return [name.removeprefix(f"{module}.") for name in self.linears if name.startswith(f"{module}.")]


def scheme_of_codes(coded: Mapping[str, CodedLinear]) -> LinearScheme:
    """What most of the linears are that a source holds in codes, as far as a scheme says it."""
    found = Counter((linear.label, linear.scales[0] == 1, linear.group) for linear in coded.values())
    label, per_tensor, group = found.most_common(1)[0][0]
    has_groups = label in WEIGHT_ONLY and group in GROUP_SIZES
    symmetric = label not in WEIGHT_ONLY or all(linear.symmetric for linear in coded.values())
    return LinearScheme(label, group if has_groups else 0, symmetric, label in FP8_LABELS and per_tensor)


def added_biases(source: LayerwiseModel, plan: Plan) -> list[str]:
    """Modules to which the treatment of outliers gives a bias that they may not have."""
    if plan.anti_method != OFFSETS:
        return []
    names = []
    for index in range(len(source)):
        layer = source.layer_name(index)
        quantized = plan.of(layer)
        for subgraph in shifted_subgraphs(source.facts, source.experts_in(index)):
            if any(part in quantized for part in subgraph.consumers):
                names += [f"{layer}.{part}" for part in (subgraph.producer, *subgraph.consumers)]
    return names


def quantized_config(source: LayerwiseModel, plan: Plan) -> PreTrainedConfig:
    """The config with which the architecture's class makes room for the quantized model."""
    config = copy.deepcopy(source.config)
    config._attn_implementation = None
    modules = dict(source.model.named_modules())
    scales = {}
    if plan.quantizes_embeddings:
        rows, width = modules[source.embedding_name].weight.shape
        try:
            groups = EMBEDDING_SCHEME.num_groups(width)
        except OctavoError as error:
            raise OctavoError(f"{named('embeddings')} int8: {error}; leave it out") from None
        scales = {name: [rows, groups] for name in (source.embedding_name, *plan.own_head(source))}
    for name in plan.linears:
        try:
            rows, groups = plan.scales_of(name, modules[name].out_features, modules[name].in_features)
        except OctavoError as error:
            raise OctavoError(
                f"{name}: {error}; leave it in float by {named('float_linears')}, or give {named('group_size=0')}"
            ) from None
        if (rows, groups) != (modules[name].out_features, 1):
            scales[name] = [rows, groups]
    layout = {
        "quantized_linears": plan.labels(source),
        "weight_scales": scales,
        "deq_scale": "I64" if deq_scale_dtype(plan.engine_dtype) == torch.int64 else "F32",
        "biases": added_biases(source, plan),
        "cpu_activations": plan.cpu_activations,
        "is_of_vllm": plan.is_of_vllm,
    }
    setattr(config, CONFIG_KEY, {"scheme": plan.scheme.to_dict(), **layout})
    config.tie_word_embeddings = bool(source.tied) and source.facts.head not in plan.linears
    return config
