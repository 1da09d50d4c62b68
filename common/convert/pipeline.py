"""One decoder layer after another from float to codes: what a conversion computes, and what it needs to go on.

Three streams of states go through the layers: calibration texts and held-back texts through the float model, and the
held-back texts through the quantized one. S tokens, E hidden size.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from ..architecture import Architecture
from ..runtime.cache.quantized_cache import QuantizedCache
from ..runtime.checkpoint.ascend import in_file_order, scale_tensors
from ..runtime.checkpoint.buffers import read_scales
from ..runtime.checkpoint.files import TensorHeader
from ..runtime.compatibility import cache_argument
from ..runtime.decoder import attention_modules, decoder_layers
from ..runtime.quantized_linear import QuantizedLinear
from ..runtime.schemes.kv_scheme import Scheme, load_scheme
from ..runtime.schemes.linear_scheme import LinearInputs
from ..runtime.static_scales import LayerScales, Scales, Statistics, scales_of_layer, statistics_facts
from .calibration.observe import (
    InputObserver,
    InputObservers,
    attention_tensors,
    input_tensors,
    observing_attention,
)
from .calibration.streams import Stream, Texts
from .measure.costs import Cost
from .measure.fidelity import Comparison, Fidelity
from .outliers.smooth import smooth_head, smooth_layer
from .output.shards import SAFETENSORS_DTYPES, header_of
from .plan import Plan, quantized_config
from .source.layerwise import MOST_LOGITS, LayerwiseModel, assign_state, layer_arguments, with_real_rotary
from .weights.input_range import outlier_score
from .weights.quantize import output_error, quantize_linear

SEARCH_ROWS = 512
"""Inputs of a linear layer that searches for the best smoothing are done on."""
PROBE_TOKENS = 512
"""Held-back tokens on which the cost of each linear and attention is measured."""
ROWS_COPIED = 2**14


class Conversion:
    """A model on its way from float to codes.

    Args:
        architecture: of the model.
        source: the float model.
        plan: what to make of it.
        texts: see `Texts`.
        known: statistics that only a pass of the whole model gives (codebooks).
        measures: whether to measure what each linear and attention costs.
    """

    def __init__(
        self,
        architecture: Architecture,
        source: LayerwiseModel,
        plan: Plan,
        texts: Texts,
        known: dict[str, torch.Tensor] | None = None,
        measures: bool = False,
    ) -> None:
        self.source, self.plan, self.measures = source, plan, measures
        self.statistics = dict(known or {})
        self.costs: list[Cost] = []
        self._keeps_moments = plan.linear.w_method == "GPTQ"
        self._config = quantized_config(source, plan)
        with torch.device("meta"):
            model = architecture.model_class(self._config)
        self.quantized = with_real_rotary(model, source.device)
        self._calibration = Stream.of(source, texts.calibration)
        self._for_scales = None if texts.for_scales is None else Stream.of(source, texts.for_scales)
        self._float = Stream.of(source, texts.held_back)
        self._coded = Stream(self._float.ids, self._float.masks, list(self._float.hidden))

    # What is written.

    def planned(self) -> dict[str, TensorHeader]:
        """Dtype and shape of every tensor of the output, in the order of the files."""
        tied = self.tied()
        found = {
            name: TensorHeader(self._stored_dtype(name, tensor), tuple(tensor.shape))
            for name, tensor in self.quantized.state_dict().items()
            if name not in tied
        }
        return in_file_order(self.quantized, found)

    def tied(self) -> list[str]:
        """Names of what the output shares with another tensor."""
        return sorted(self.quantized.all_tied_weights_keys) if self._config.tie_word_embeddings else []

    def labels(self) -> dict[str, str]:
        """Label by name of the quantized linears."""
        return dict.fromkeys(self.plan.linears, self.plan.linear.label)

    def _stored_dtype(self, name: str, tensor: torch.Tensor) -> str:
        parent, _, part = name.rpartition(".")
        module = self.quantized.get_submodule(parent)
        if isinstance(module, QuantizedLinear):
            of_model = part in module.OF_MODEL
            return (self.source.source_dtype(name) or self.plan.dtype) if of_model else header_of(tensor).dtype
        is_added = part == "bias"
        return self.source.source_dtype(name) or (self.plan.dtype if is_added else header_of(tensor).dtype)

    def _as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A float tensor in the dtype of the output; codes and scales as they are."""
        model_tensor = self.quantized.get_submodule(name.rpartition(".")[0]).state_dict()[name.rpartition(".")[2]]
        return tensor.to(SAFETENSORS_DTYPES[self._stored_dtype(name, model_tensor)])

    # Layer by layer.

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Convert a decoder layer, and take all streams through it; return its tensors, named for the file."""
        name = self.source.layer_name(index)
        with torch.no_grad(), self.source.layer(index) as layer:
            quantized = self.plan.of(name)
            if self.plan.anti_method and quantized:
                self._smooth(layer, index, quantized)
            inputs = self._calibrated(layer, index, quantized)
            scales = self._scales(index)
            linears = {part: self._quantized_linear(layer, part, inputs[part]) for part in quantized}
            tensors = self._tensors(layer, name, linears, scales)
            before = self._float.hidden
            self._float.hidden = self._float.through(layer, index)
            coded_layer = self._coded_layer(index, name, tensors)
            if self.measures:
                probe = Stream(self._float.ids, self._float.masks, before, self._float.arguments)
                self.costs += self._linear_costs(layer, index, probe, inputs)
                self.costs += self._attention_cost(coded_layer, index, before)
            self._coded.hidden = self._coded_outputs(coded_layer, index, self._coded.hidden, self.plan.scheme)
            coded_layer.to("meta")
        return tensors

    def _observed(
        self, layer: nn.Module, index: int, linears: list[str], keeps_moments: bool = False
    ) -> tuple[dict[str, LinearInputs], list]:
        """What the inputs of linears of a layer are like, and what the layer makes of the calibration texts."""
        observers = InputObservers({part: layer.get_submodule(part) for part in linears}, keeps_moments)
        try:
            outputs = self._calibration.through(layer, index)
        finally:
            observers.remove()
        return observers.inputs(), outputs

    def _smooth(self, layer: nn.Module, index: int, quantized: list[str]) -> None:
        every = [part for part, module in layer.named_modules() if isinstance(module, nn.Linear)]
        found, _ = self._observed(layer, index, every)
        smaller = {id(inputs): inputs.thinned(SEARCH_ROWS) for inputs in found.values()}
        found = {part: smaller[id(inputs)] for part, inputs in found.items()}
        smooth_layer(layer, found, self.plan.anti_method, quantized, self._output_error, self.source.facts)

    def _calibrated(self, layer: nn.Module, index: int, quantized: list[str]) -> dict[str, LinearInputs]:
        """Statistics of a layer's attention and of the inputs of its linears; calibration texts go through it."""
        attentions = [attention_modules(self.source.model)[index]]
        attention = attentions[0][1]
        with observing_attention(self.source.model, attentions):
            if self._for_scales is not None:
                self._for_scales.hidden = self._for_scales.through(layer, index)
                found = attention_tensors(attention)
            inputs, outputs = self._observed(layer, index, quantized, self._keeps_moments)
            if self._for_scales is None:
                found = attention_tensors(attention)
        self._calibration.hidden = outputs
        prefix = self.source.layer_name(index)
        found |= input_tensors({f"{prefix}.{part}": seen for part, seen in inputs.items()})
        Statistics(found, {}).check_finite()
        self.statistics |= {name: tensor for name, tensor in found.items() if name not in self.statistics}
        return inputs

    def _scales(self, index: int) -> LayerScales:
        return scales_of_layer(self.plan.scheme, self.found(), index)

    def found(self) -> Statistics:
        """All statistics."""
        return Statistics(self.statistics, statistics_facts(self.source.config, self._calibration.tokens))

    def _quantized_linear(self, layer: nn.Module, part: str, inputs: LinearInputs) -> dict[str, torch.Tensor]:
        return quantize_linear(layer.get_submodule(part), inputs, self.plan.linear, self.plan.deq_scale_dtype)

    def _tensors(
        self, layer: nn.Module, name: str, linears: dict[str, dict[str, torch.Tensor]], scales: LayerScales
    ) -> dict[str, torch.Tensor]:
        """All tensors of a layer of the output."""
        replaced = {f"{part}.{end}" for part in linears for end in ("weight", "bias")}
        tensors = {part: tensor for part, tensor in layer.state_dict().items() if part not in replaced}
        for part, parts in linears.items():
            tensors |= {f"{part}.{end}": tensor for end, tensor in parts.items()}
        attention = [(self.source.facts.attention.name, layer.get_submodule(self.source.facts.attention.name))]
        tensors |= scale_tensors(attention, self.plan.scheme, [scales])
        for part, tensor in self.quantized.get_submodule(name).state_dict().items():
            if part not in tensors and part.endswith(".bias"):  # not every shift pays
                tensors[part] = torch.zeros(tensor.shape)
        return {f"{name}.{part}": self._as_stored(f"{name}.{part}", tensor) for part, tensor in tensors.items()}

    # The quantized model.

    def _coded_layer(self, index: int, name: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
        """The layer that a load of the output gives, in float32."""
        layer = decoder_layers(self.quantized)[index][1]
        assign_state(layer, {part.removeprefix(f"{name}."): self._computed(part, t) for part, t in tensors.items()})
        return layer

    def _computed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as a model in float32 holds it, on the device."""
        parent, _, part = name.rpartition(".")
        module = self.quantized.get_submodule(parent)
        of_model = isinstance(module, QuantizedLinear) and part not in module.OF_MODEL
        keeps = of_model or not tensor.is_floating_point()
        return tensor.to(self.source.device) if keeps else tensor.to(self.source.device).float()

    def _coded_outputs(
        self, layer: nn.Module, index: int, hidden: list[torch.Tensor], scheme: Scheme, most_tokens: int | None = None
    ) -> list[torch.Tensor]:
        """What a quantized layer makes of states, each text with a new cache of a scheme; see `Stream.through`."""
        stored: Scales = [LayerScales()] * len(self.source)
        if scheme.is_static:
            facts = self.source.facts
            attention = [(facts.attention.name, layer.get_submodule(facts.attention.name))]
            stored[index] = read_scales(attention, scheme, facts)[0]
        outputs, tokens = [], 0
        for state, mask in zip(hidden, self._coded.masks, strict=True):
            if most_tokens is not None and tokens >= most_tokens:
                break
            tokens += state.shape[1]
            cache = QuantizedCache(self._config, scheme, scales=stored)
            given = {cache_argument(self.quantized.base_model): cache}
            arguments = layer_arguments(self.quantized, state, attention_mask=mask, **given)
            outputs.append(layer(state, **arguments[index]))
        return outputs

    # What each part costs.

    def _linear_costs(
        self, layer: nn.Module, index: int, probe: Stream, inputs: dict[str, LinearInputs]
    ) -> Iterator[Cost]:
        expected = probe.through(layer, index, PROBE_TOKENS)
        name = self.source.layer_name(index)
        for part, seen in inputs.items():
            parent, _, child = part.rpartition(".")
            plain = layer.get_submodule(part)
            coded = copy.copy(self.quantized.get_submodule(f"{name}.{part}"))
            coded.folds_bias = False
            setattr(layer.get_submodule(parent), child, coded)
            try:
                found = probe.through(layer, index, PROBE_TOKENS)
            finally:
                setattr(layer.get_submodule(parent), child, plain)
            yield Cost(f"{name}.{part}", outlier_score(seen), _relative_error(expected, found))

    def _attention_cost(self, layer: nn.Module, index: int, hidden: list[torch.Tensor]) -> Iterator[Cost]:
        if not self.plan.scheme.of_layer(index).is_quantized:
            return
        name = attention_modules(self.source.model)[index][0]
        expected, found = (
            self._coded_outputs(layer, index, hidden, scheme, PROBE_TOKENS)
            for scheme in (load_scheme("float"), self.plan.scheme)
        )
        yield Cost(name, None, _relative_error(expected, found))

    # Behind the layers.

    def others(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Tensors outside of the layers that stay in float: name, rows, number of the first of them."""
        for name in self.planned():
            is_made = name == self.source.norm_name and self.source.facts.head in self.plan.linears
            if (
                is_made
                or name.startswith(f"{self.source.layers_name}.")
                or name.rpartition(".")[0] in self.plan.linears
            ):
                continue
            file_name = self.source.file_name(name)
            count = self.source.files.placed[file_name].header.shape[0]
            for first in range(0, count, ROWS_COPIED):
                rows = self.source.files.rows(file_name, first, min(count, first + ROWS_COPIED))
                self.source.check_finite(name, rows)
                yield name, rows, first

    def head(self) -> tuple[dict[str, torch.Tensor], Fidelity | None]:
        """Convert the last linear, if it is to be, with the norm before it.

        Returns:
            their tensors, and how far the model is from the float one.
        """
        with torch.no_grad():
            norm = self.source.final_norm()
            weight = self.source.tensor(f"{self.source.facts.head}.weight")
            if self.source.facts.head not in self.plan.linears:
                return {}, self._fidelity(norm, weight, norm, None)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            assign_state(linear, {"weight": weight.to(self.source.device, torch.float32, copy=True)})
            coded_norm = copy.deepcopy(norm)
            if self.plan.anti_method:
                seen = self._head_inputs(norm).thinned(SEARCH_ROWS)
                smooth_head(
                    coded_norm, linear, seen, self.plan.anti_method, self._output_error, self.source.facts.norm_offset
                )
            inputs = self._head_inputs(coded_norm, self._keeps_moments)
            parts = quantize_linear(linear, inputs, self.plan.linear, self.plan.deq_scale_dtype)
            self.statistics |= input_tensors({self.source.facts.head: inputs})
            name = self.source.norm_name
            tensors = {
                f"{self.source.facts.head}.{part}": self._as_stored(f"{self.source.facts.head}.{part}", t)
                for part, t in parts.items()
            }
            tensors |= {name: self._as_stored(name, coded_norm.weight)}
            assign_state(coded_norm, {"weight": tensors[name].to(self.source.device).float()})
            coded = self.quantized.get_submodule(self.source.facts.head)
            assign_state(
                coded, {part: self._computed(f"{self.source.facts.head}.{part}", t) for part, t in parts.items()}
            )
            return tensors, self._fidelity(norm, weight, coded_norm, coded)

    def _head_inputs(self, norm: nn.Module, keeps_moments: bool = False) -> LinearInputs:
        """What the inputs of the last linear are like behind a norm."""
        observer = InputObserver(keeps_moments)
        for state in self._calibration.hidden:
            observer(norm(state))
        return observer.inputs()

    def _output_error(self, weight: torch.Tensor, inputs: LinearInputs, exact: torch.Tensor) -> torch.Tensor:
        return output_error(weight, inputs, self.plan.linear, exact)

    def _fidelity(
        self, norm: nn.Module, weight: torch.Tensor, coded_norm: nn.Module, coded: nn.Module | None
    ) -> Fidelity | None:
        """Compare the float model with the quantized one, whose last norm and linear (None: in float) are given."""
        comparison = Comparison()
        rows = max(1, MOST_LOGITS // len(weight))
        for ids, plain, other in zip(self._float.ids, self._float.hidden, self._coded.hidden, strict=True):
            plain, other, targets = norm(plain)[0, :-1], coded_norm(other)[0, :-1], ids[0, 1:]
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                comparison.add(*self._logits(plain[part], other[part], weight, coded), targets[part])
        return comparison.fidelity() if comparison.tokens else None

    def _logits(
        self, plain: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, coded: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the float and of the quantized model; a weight that they share is made float32 once for both."""
        if coded is not None:
            return self.source.logits(plain, weight), coded(other)
        both = self.source.logits(torch.cat((plain, other)), weight)
        return both[: len(plain)], both[len(plain) :]

    # Going on after an interruption.

    def _streams(self) -> dict[str, Stream]:
        streams = {"calibration": self._calibration, "float": self._float, "coded": self._coded}
        return streams if self._for_scales is None else streams | {"for_scales": self._for_scales}

    def state(self) -> dict[str, torch.Tensor]:
        """What the layers that follow need of those that are done."""
        states = {f"{name}.{i}": t for name, stream in self._streams().items() for i, t in enumerate(stream.hidden)}
        return states | {f"statistics.{name}": tensor for name, tensor in self.statistics.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        for name, stream in self._streams().items():
            stream.hidden = [state[f"{name}.{i}"].to(self.source.device) for i in range(len(stream.hidden))]
        self.statistics = {
            name.removeprefix("statistics."): tensor for name, tensor in state.items() if name.startswith("statistics.")
        }


def _relative_error(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean over tokens of `|found - expected|^2 / |expected|^2`."""
    pairs = zip(expected, found, strict=True)
    ratios = [((b - a).square().sum(dim=-1) / a.square().sum(dim=-1).clamp_min(1e-30)).flatten() for a, b in pairs]
    return float(torch.cat(ratios).mean())
