"""What a conversion is to do: the request checked against the model, and the plan that follows from them."""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from ..errors import OctavoError
from ..runtime.checkpoint.files import TensorHeader
from ..runtime.checkpoint.loading import check_settings, check_stored_sizes
from ..runtime.decoder import attention_modules
from ..runtime.schemes.kv_scheme import load_scheme
from ..runtime.schemes.linear_scheme import W8A8, LinearScheme
from ..runtime.static_scales import Statistics, sharpest, statistics_facts
from .calibration.streams import Texts
from .calibration.texts import LONGEST_SAMPLE, default_texts, hold_back, read_calibration_file, tokenize
from .calibration.whole import is_of_whole, whole_statistics
from .choices import check_treatment, choose_codes, choose_linears, chosen_scheme, needs_texts
from .output.bundle import code_digest
from .output.writer import check_output
from .pipeline import Conversion
from .plan import Plan, scheme_of_codes
from .request import VLLM_ASCEND_0_23, ConvertRequest, check_activations
from .source.checkpoint import (
    FLOAT_DTYPES,
    check_device,
    find_source,
    layerwise_source,
    load_source,
    load_tokenizer,
    read_source_headers,
    source_files,
)
from .source.config import chosen_architecture, read_source_config
from .source.quantized.cache_scales import lacks_query
from .source.quantized.files import CodedFiles
from .spelling import named
from .targets import called_by, check_target, engine_dtype

RANDOM_TOKENS = 512
"""Tokens of `kv_scales="random"`."""


def source_dtype(headers: dict[str, TensorHeader]) -> str:
    """The dtype of a checkpoint, as safetensors spells it: that of most of its tensors."""
    return Counter(header.dtype for header in headers.values()).most_common(1)[0][0]


def random_samples(config: PreTrainedConfig) -> list[dict[str, torch.Tensor]]:
    """Random tokens, as of vLLM's warm-up with calculate_kv_scales."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, RANDOM_TOKENS), generator=generator)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def say(text: str) -> None:
    """Print a line on stderr, apart from the summary."""
    print(text, file=sys.stderr)


def _texts(request: ConvertRequest) -> list[str]:
    if isinstance(request.calibration, Path):
        return read_calibration_file(request.calibration)
    return default_texts() if request.calibration is None else list(request.calibration)


class Job:
    """One conversion: what is asked for, found and checked, and the plan that follows from it.

    Raises:
        OctavoError: anything that the user can mend.
    """

    def __init__(self, request: ConvertRequest) -> None:
        self.request = request
        check_output(request.output, named("output"))
        self.scheme = chosen_scheme(request)
        check_treatment(request, self.scheme)
        check_device(request.device)
        self.directory = find_source(request.model, request.trust_remote_code)
        self.architecture = chosen_architecture(self.directory, request.architecture)
        self.config = read_source_config(self.directory, self.architecture)
        self.headers = read_source_headers(self.directory)
        check_settings(f"{self.directory}/config.json", self.config)
        check_stored_sizes(f"{self.directory}/config.json", self.config, self.headers)
        self.texts = _texts(request)
        samples, self.held_back = hold_back(self._tokenized())
        if request.max_kl is not None and all(sample["input_ids"].shape[1] < 2 for sample in self.held_back):
            raise OctavoError(
                f"{named('max_kl')} {request.max_kl}: the held-back texts have one token each; give longer ones"
            )
        self.source = layerwise_source(self.directory, request.device, self.architecture)
        self.scheme = self.scheme.of_model(self.source.config.num_hidden_layers)
        self.source_scales = self.source.static_scales(self.scheme) if request.kv_scales == "source" else ()
        self.coded = choose_codes(request, self.source.coded_linears(), self.source.facts.head)
        self.linear = scheme_of_codes(self.coded) if self.coded else request.linear or LinearScheme()
        if request.linear is not None:
            check_activations(request, self.linear, named("cpu_activations"))
        self.linears = list(self.coded) if self.coded else self._float_linears()
        if request.anti_method and not self.linears:
            given = f"{named('anti_method')} {request.anti_method}"
            raise OctavoError(f"{given}: {named('float_linears')} leaves every linear in float")
        plan = self.plan(())
        if request.pdmix and all(label != W8A8 for label, *_ in plan.kinds):
            raise OctavoError(
                f"{named('pdmix')}: no linear is in static W8A8, which W8A8_MIX is made of; leave it out, or give "
                f"{named('label')} w8a8"
            )
        check_target(request.target, plan, self.source)
        made, is_static = [] if self.coded else self.linears, self.scheme.is_static and not self._keeps_all_scales
        is_asked = needs_texts(request, made)
        self.calibrates = is_asked or is_static
        self.samples = samples if self.calibrates else samples[:1]
        # Layer by layer ranges alone are observed; bases and sharp layers have passes of their own.
        self.observed = samples if is_asked or (is_static and self.scheme.has_ranges) else samples[:1]

    def _float_linears(self) -> list[str]:
        """Names of the linears to quantize, all of them in float in the source."""
        stated = self.architecture.floats(self.source.config, FLOAT_DTYPES[source_dtype(self.headers)])
        return choose_linears(self.source.model, self.request, stated, self.source.facts.head)

    @property
    def _keeps_all_scales(self) -> bool:
        """Whether nothing is left of static scales for calibration to find, as that of a q that is quantized, too."""
        return bool(self.source_scales) and not lacks_query(self.scheme, self.source_scales)

    def announce(self) -> None:
        """Say what nothing in the request asks for, once all of it is found to be possible."""
        if self.request.calibration is None:
            purpose = "calibrating" if self.calibrates else "nothing here needs one; measuring what is lost"
            say(f"{named('no calibration')}: {purpose} on the small text that comes with Octavo")
        files, scheme = self.source.files, self.scheme
        names = files.cache_scales.names if isinstance(files, CodedFiles) else ()
        if names and not self.source_scales:
            way = f"; {named('kv_scales')} source keeps them" if scheme.is_static else ""
            say(f"{names[0]} and {len(names) - 1} more scales of a cache are left: {scheme.name} has its own{way}")
        if self.source_scales:
            query = ", and that of q from the texts, since the source keeps none" if not self._keeps_all_scales else ""
            say(f"{names[0]} and the other scales of K and V stay as they are{query}")
            if scheme != load_scheme(self.request.scheme):
                say(f"scheme {scheme.name}: biases of K and V are counted in and nothing is turned, as scales have it")

    def _tokenized(self) -> list[dict[str, torch.Tensor]]:
        """All texts as samples of `[1, S]` ids and mask."""
        request = self.request
        tokenizer = load_tokenizer(self.directory, request.tokenizer_arguments, request.trust_remote_code)
        longest = min(LONGEST_SAMPLE, self.config.get("max_position_embeddings", LONGEST_SAMPLE))
        return tokenize(tokenizer, self.texts, longest, request.input_ids_name, request.attention_mask_name)

    def plan(self, floats: Iterable[str], wide: Iterable[str] = ()) -> Plan:
        """What to make of the model, but for some linears and attentions, which stay in float.

        Args:
            wide: linears that are in int8 where others are in int4.

        Raises:
            OctavoError: nothing is left to quantize.
        """
        floats = set(floats)
        linears = tuple(name for name in self.linears if name not in floats)
        names = [name for name, _ in attention_modules(self.source.model)]
        layers = tuple(index for index, name in enumerate(names) if name in floats)
        scheme = self.scheme
        if layers:
            scheme = dataclasses.replace(scheme, float_layers=tuple(sorted({*scheme.float_layers, *layers})))
        in_codes = linears or self.request.embeddings == "int8"
        counted = scheme.counted(len(names))
        if not (in_codes or any(counted.of_layer(index).is_quantized for index in range(len(names)))):
            raise OctavoError("every linear and attention stays in float; nothing would be quantized")
        stored = source_dtype(self.headers)
        return Plan(
            scheme,
            self.linear,
            linears,
            self.request.anti_method,
            stored,
            self.request.cpu_activations,
            self.request.embeddings == "int8",
            engine_dtype(self.config, stored),
            self.request.target == VLLM_ASCEND_0_23,
            called_by(self.request.target, self.request.pdmix),
            self.coded,
            self.source_scales,
            frozenset(wide) & {*linears},
        )

    def conversion(
        self, plan: Plan, known: dict[str, torch.Tensor] | None = None, measures: bool = False
    ) -> Conversion:
        """The model at its start."""
        random = random_samples(self.source.config) if self.request.kv_scales == "random" else None
        texts = Texts(self.observed, self.held_back, random)
        return Conversion(self.architecture, self.source, plan, texts, known, measures)

    @cached_property
    def of_whole(self) -> dict[str, torch.Tensor]:
        """Statistics that only the whole model in memory can give, if the scheme needs any."""
        if not self.scheme.needs_whole:
            return {}
        model = load_source(self.directory, self.request.device, self.architecture)
        found = whole_statistics(model, self.samples, [self.scheme])
        return {name: tensor for name, tensor in found.tensors.items() if is_of_whole(name)}

    def settle(self, sharp: Iterable[int] | None = None) -> list[int]:
        """Decide which layers are sharp, if the scheme leaves that to calibration; returns their numbers.

        Layers that a survey leaves in float later are not replaced by others.

        Args:
            sharp: what was decided earlier, in a run that was cut off.
        """
        if not self.scheme.sharp_share:
            return []
        if sharp is None:
            sharp = sharpest(self.scheme, Statistics(self.of_whole, statistics_facts(self.source.config, 0)))
        narrow, wide = self.scheme.key.dtype, self.scheme.sharp_dtype
        say(f"sharp layers: {', '.join(map(str, sorted(sharp)))}: K in {wide} there, and in {narrow} in the others")
        self.scheme = self.scheme.with_sharp(sharp)
        return sorted(sharp)

    def odd_groups(self, plan: Plan) -> Iterator[tuple[int, int]]:
        """Input channels and size of the groups of linears that cannot have those that were asked for."""
        for name in () if plan.coded else plan.linears:
            in_features = self.source.model.get_submodule(name).in_features
            asked = plan.scheme_of(name)
            group = in_features // asked.num_groups(in_features)
            if asked.group_size and group != asked.group_size and name not in plan.wide:
                yield in_features, group

    def identity(self) -> dict[str, Any]:
        """What the bytes of the output follow from, so that nothing else is resumed in the place of it."""
        files = source_files(self.directory)
        ids = [sample["input_ids"].tolist() for sample in (*self.samples, *self.held_back)]
        return {
            **self.request.decisive_fields(),
            "scheme": self.scheme.to_dict(),
            "files of model": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "config.json": self.config,
            "calibration texts": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
            "code of Octavo": code_digest(),
            "versions of torch and transformers": [torch.__version__, transformers.__version__],
            "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        }
