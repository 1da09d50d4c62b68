"""A plan: what each scheme takes of memory with a model, and how much of a context or a batch fits."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common.convert.request import ConvertRequest
from ..common.errors import OctavoError
from ..common.runtime.cache.sizes import kv_bytes_per_token
from ..common.runtime.model_sizes import attention_sizes
from ..common.runtime.schemes.kv_scheme import Scheme, load_scheme
from ..counting import counted_bits
from .cache import CacheSize, cache_size
from .model import PlannedModel
from .peak import Peak, held_bytes, peak_of
from .weights import Weights, converted_weights, float_weights

TRANSFORMERS = "transformers"
"""Name of the row of the float model with transformers' own cache, which takes a prompt in one pass."""
MOST_CONTEXT = 2**24
MOST_BATCH = 2**16


@dataclass(frozen=True)
class Row:
    """What one scheme takes.

    Attributes:
        scheme: its name, or `TRANSFORMERS`.
        context, batch: tokens of each sequence, and sequences.
        bits: of an element of K and V at this context, as `counted_bits`.
        stored: the same by the bytes that are kept.
        token_bytes: that one more token takes, over all layers.
        cache: at this context and batch.
        weights: bytes of the tensors of the files; None where nobody knows.
        peak: of a run.
        longest: most tokens of each sequence in the memory, at this batch; None where no memory was given.
        largest: most sequences in it, at this context; likewise.
        is_static: whether the scheme needs calibration.
    """

    scheme: str
    context: int
    batch: int
    bits: float
    stored: float
    token_bytes: int
    cache: CacheSize
    weights: int | None
    peak: Peak
    longest: int | None
    largest: int | None
    is_static: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data, sizes in bytes."""
        return {**dataclasses.asdict(self), "peak": self.peak.parts()}


def scheme_of_row(name: str) -> Scheme:
    """The scheme of a row, by the name of a preset or a JSON file.

    Raises:
        OctavoError: there is none of that name.
    """
    return load_scheme("float" if name == TRANSFORMERS else name)


@dataclass(frozen=True)
class Planner:
    """Plans for a model whose linears are of one kind.

    Attributes:
        model: that is planned for.
        fields: of the request that makes its weights; empty: they stay floats.
        device: "cpu", "cuda" or "npu".
        process: bytes of the process, where the device is the CPU.
    """

    model: PlannedModel
    fields: dict[str, Any]
    device: str = "cpu"
    process: int = 0
    _weights: dict[str, Weights | None] = field(default_factory=dict, repr=False)

    def weights(self, name: str) -> Weights | None:
        """The weights of a row, static scales of its scheme among them where they are converted; None if unknown.

        Raises:
            OctavoError: linears are to be of a kind, and the zoo does not convert such a model.
        """
        scheme = scheme_of_row(name)
        is_coded = name != TRANSFORMERS and bool(self.fields)
        kind = (scheme.name if scheme.is_static else "float") if is_coded else TRANSFORMERS
        if kind not in self._weights:
            of_kind = scheme if scheme.is_static else load_scheme("float")
            self._weights[kind] = self._converted(of_kind) if is_coded else self._floats()
        return self._weights[kind]

    def _floats(self) -> Weights | None:
        model = self.model
        return float_weights(model.config, model.dtype, model.architecture) if model.is_known else None

    def _converted(self, scheme: Scheme) -> Weights:
        model = self.model
        if model.architecture is None:
            raise OctavoError(
                f"{model.name}: model_type {model.settings.get('model_type')!r} is none that Octavo converts; leave "
                "out --preset and --quantization to plan its cache"
            )
        request = ConvertRequest(model.name, "nowhere", **{**self.fields, "scheme": scheme})
        return converted_weights(model.config, model.dtype, model.architecture, request, model.settings)

    def _is_fused(self) -> bool:
        """Whether the decoder's kernel takes all layers of a pass of the converted model."""
        architecture = self.model.architecture
        is_dense = architecture is not None and architecture.decoder.experts is None
        return self.device == "cpu" and is_dense and self.fields.get("linear") is not None

    def cache(self, name: str, context: int, batch: int, settles: bool = False) -> CacheSize:
        """The cache of a row; `settles` as of `cache_size`. That of `TRANSFORMERS` has no room to spare."""
        size = cache_size(self.model.config, scheme_of_row(name), context, batch, self.model.dtype, settles=settles)
        return dataclasses.replace(size, allocated=size.kept) if name == TRANSFORMERS else size

    def peak(self, name: str, context: int, batch: int) -> Peak:
        """The peak of a run of a row."""
        weights, cache = self.weights(name), self.cache(name, context, batch, settles=True)
        is_whole = name == TRANSFORMERS
        linear = None if is_whole else self.fields.get("linear")
        return peak_of(
            self.model.config,
            held=0 if weights is None else held_bytes(weights, linear, self.device),
            cache=cache.allocated + cache.constants,
            tokens=context,
            batch=batch,
            dtype=self.model.dtype,
            process=self.process,
            is_fused=self._is_fused() and not is_whole,
            is_whole=is_whole,
        )

    def longest(self, name: str, batch: int, memory: int) -> int:
        """Most tokens of each of `batch` sequences whose run takes no more than `memory` bytes; 0 if none does."""
        return last_that_fits(MOST_CONTEXT, lambda context: self.peak(name, context, batch).total, memory)

    def largest(self, name: str, context: int, memory: int) -> int:
        """Most sequences of `context` tokens likewise."""
        return last_that_fits(MOST_BATCH, lambda batch: self.peak(name, context, batch).total, memory)

    def row(self, name: str, context: int, batch: int, memory: int | None = None) -> Row:
        """What a scheme takes at a context and batch."""
        scheme, weights, decoder = scheme_of_row(name), self.weights(name), self.model.decoder_config
        cache = self.cache(name, context, batch)
        _, kv_heads, head_dim = attention_sizes(decoder)
        elements = 2 * decoder.num_hidden_layers * kv_heads * head_dim * context * batch
        return Row(
            scheme=name if name == TRANSFORMERS else scheme.name,
            context=context,
            batch=batch,
            bits=counted_bits(decoder, scheme, context, self.model.dtype),
            stored=8 * cache.kept / elements,
            token_bytes=kv_bytes_per_token(decoder, scheme, self.model.dtype.itemsize),
            cache=cache,
            weights=None if weights is None else weights.nbytes,
            peak=self.peak(name, context, batch),
            longest=None if memory is None else self.longest(name, batch, memory),
            largest=None if memory is None else self.largest(name, context, memory),
            is_static=scheme.is_static,
        )

    def rows(self, names: Sequence[str], context: int, batch: int, memory: int | None = None) -> list[Row]:
        """A row for each scheme."""
        return [self.row(name, context, batch, memory) for name in names]


def last_that_fits(most: int, size: Callable[[int], int], memory: int) -> int:
    """The largest number up to `most` whose `size`, which grows with it, is within memory; 0 if none is."""
    return bisect.bisect_right(range(1, most + 1), memory, key=size)
