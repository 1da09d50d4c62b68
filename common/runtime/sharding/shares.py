"""Which part of each stored tensor a rank holds, by the anatomy of a decoder.

A rank has whole heads: `H / R` query heads and the KV heads that these read, `G / R` or, where there are more ranks
than KV heads, one that several ranks hold; and an equal part of the channels between the linears of the MLP, or of each
expert. So it is a model of the same layers with fewer heads and narrower MLPs, and sums over all ranks what the last
linears of attention and MLP make. Linears that read the states are cut by output channels, those two by input channels.
Norms, router, embedding and last linear are whole on every rank.

R ranks, H query heads, G KV heads, D head_dim, N output channels, K input channels.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from ....ops.linear.reference import WEIGHT_BLOCK
from ...errors import OctavoError
from ..checkpoint.ascend import described_name
from ..checkpoint.files import TensorHeader
from ..decoder import Decoder
from ..model_sizes import KV_SHARE, attention_sizes
from ..schemes.linear_scheme import (
    FP8_DYNAMIC,
    HELD_LABELS,
    INT4_LABELS,
    W4A16_DOUBLE,
    W8A8_DYNAMIC,
    W8A8_MIXED,
    WEIGHT_ONLY,
)
from .ranks import Ranks

Range = tuple[int, int]
_OF_OUTPUTS = ("weight", "weight_scale", "weight_offset", "row_scale", "quant_bias", "deq_scale", "bias",
               "outlier_weight")  # fmt: skip
"""Parts of a linear that have a row for each output channel, or are one for all."""
_INT4_BYTES = "U8"
MAX_CHANNELS = WEIGHT_BLOCK
"""Input channels of weight 0 that a linear with a scale per token has behind those of its share: they are given the
token's maximum over all ranks, so that its scale, and with it every code, is that of the whole token."""


@dataclass(frozen=True)
class Share:
    """The part of a tensor that a rank holds.

    Attributes:
        dim: along which it is cut.
        ranges: what is held of it, in elements as they are stored, one behind the other.
        extra: elements behind these, which stand for 0.
        is_empty: whether all of it is zeros, since another rank adds it.
        zero: name of the tensor whose values are the codes that stand for 0, `[N, 1]`, for `extra`.
        columns: of a `quant_bias`, the input channels whose zero point it takes off, if it is empty, and else those
            whose it no longer does; see `SharedBias`.
    """

    dim: int = 0
    ranges: tuple[Range, ...] = ()
    extra: int = 0
    is_empty: bool = False
    zero: str | None = None
    columns: Range | None = None

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part, from that of the whole."""
        if self.is_empty or self.columns is not None:
            return shape
        size = sum(stop - start for start, stop in self.ranges) + self.extra
        return (*shape[: self.dim], size, *shape[self.dim + 1 :])


@dataclass(frozen=True)
class _Linear:
    """How a linear is cut.

    Attributes:
        rows, columns: of its output or its input channels, one behind the other; one of them is empty.
    """

    rows: tuple[Range, ...] = ()
    columns: tuple[Range, ...] = ()


class Shares:
    """The parts of a checkpoint that a rank holds.

    Args:
        ranks: all of them, and which this is.
        decoder: the anatomy of the model.
        config: of the whole model.
        prefix: of the decoder within the model, as "model".
        labels: of the quantized linears by their names.

    Raises:
        OctavoError: heads or channels cannot be shared among so many ranks.
    """

    def __init__(self, ranks: Ranks, decoder: Decoder, config: Any, prefix: str, labels: Mapping[str, str]) -> None:
        self.ranks, self._decoder, self._config, self._labels = ranks, decoder, config, labels
        self._pattern = re.compile(rf"{re.escape(f'{prefix}.{decoder.layers}')}\.(\d+)\.(.+)\.([^.]+)")
        heads, kv_heads, self._width = attention_sizes(config)
        rank, size = ranks.rank, ranks.size
        if heads % size or (size % kv_heads and kv_heads % size):
            raise OctavoError(
                f"tp_plan: {heads} query heads on {kv_heads} KV heads cannot be shared among {size} ranks: the number "
                "of ranks divides the query heads, and the KV heads or they it"
            )
        self._heads, self._kv_heads = (rank * heads // size, (rank + 1) * heads // size), self._kv_range(kv_heads)
        self._all_heads, self._all_kv_heads = heads, kv_heads
        self._linears: dict[int, dict[str, _Linear]] = {}
        for index in range(config.num_hidden_layers):
            experts = decoder.experts_in(config, index)
            self._linears.setdefault(experts, self._linears_of(experts))

    def _kv_range(self, kv_heads: int) -> Range:
        first = self.ranks.rank * kv_heads // self.ranks.size
        return first, first + max(1, kv_heads // self.ranks.size)

    def _channels(self, experts: int) -> tuple[int, Range]:
        """How many channels an MLP, or an expert, has in the middle, and which of them are this rank's."""
        field = "moe_intermediate_size" if experts else "intermediate_size"
        count, size = getattr(self._config, field), self.ranks.size
        if count % size:
            raise OctavoError(
                f"tp_plan: {field} {count} cannot be shared among {size} ranks, of which it is no multiple"
            )
        part = count // size
        return count, (self.ranks.rank * part, (self.ranks.rank + 1) * part)

    def _linears_of(self, experts: int) -> dict[str, _Linear]:
        """How the linears of a layer with so many experts are cut, by their names within it."""
        attention, width = self._decoder.attention, self._width
        query, key = ((first * width, last * width) for first, last in (self._heads, self._kv_heads))
        found = {
            attention.query: _Linear(rows=(query,)),
            attention.key: _Linear(rows=(key,)),
            attention.value: _Linear(rows=(key,)),
            attention.output: _Linear(columns=(query,)),
        }
        if attention.is_fused:
            of_key, of_value = self._all_heads * width, (self._all_heads + self._all_kv_heads) * width
            rows = query, *((key[0] + start, key[1] + start) for start in (of_key, of_value))
            found[attention.query] = _Linear(rows=rows)
        count, own = self._channels(experts)
        for mlp in self._decoder.mlps(experts):
            found |= {mlp.gate: _Linear(rows=(own,)), mlp.up: _Linear(rows=(own,)), mlp.down: _Linear(columns=(own,))}
            if mlp.is_fused:
                found[mlp.gate] = _Linear(rows=(own, (own[0] + count, own[1] + count)))
        return found

    def of(self, name: str, headers: Mapping[str, TensorHeader]) -> Share | None:
        """The part of a stored tensor that is this rank's; None where it is whole.

        Raises:
            OctavoError: it cannot be cut where it would have to be.
        """
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        index, module, part = int(found[1]), found[2], found[3]
        linear = self._linears[self._decoder.experts_in(self._config, index)].get(module)
        if described_name(name).rpartition(".")[2].startswith("kv_cache_"):
            first, last = self._kv_heads
            return Share(ranges=((first * self._width, last * self._width),))
        if linear is None:
            return self._of_scales(module.removeprefix(f"{self._decoder.attention.name}."), part, headers[name].shape)
        whole = name.removesuffix(f".{part}")
        if self._labels.get(whole) in HELD_LABELS:
            raise OctavoError(
                f"tp_plan: {whole}: {self._labels[whole]} is not shared among ranks; convert with --requantize"
            )
        if linear.rows:
            rows = headers[name.removesuffix(part) + "weight"].shape[0]
            is_cut = part in _OF_OUTPUTS and headers[name].shape[0] == rows
            return Share(ranges=linear.rows) if is_cut else None
        return self._of_columns(name, part, linear.columns[0], headers)

    def _of_scales(self, module: str, part: str, shape: tuple[int, ...]) -> Share | None:
        """Of static scales of attention, which have a row for each head or are one for all."""
        if module in ("fa_q", "fa_k", "fa_v"):
            return Share(ranges=(self._heads if module == "fa_q" else self._kv_heads,))
        if module != "octavo_cache" or part.endswith("levels"):
            return None
        own, count = (
            (self._heads, self._all_heads) if part.startswith("query") else (self._kv_heads, self._all_kv_heads)
        )
        return Share(ranges=(own,)) if shape[0] == count else None

    def _of_columns(self, name: str, part: str, own: Range, headers: Mapping[str, TensorHeader]) -> Share | None:
        """Of a linear that is cut by input channels."""
        linear = name.removesuffix(f".{part}")
        label = self._labels.get(linear)
        if part == "quant_bias":
            behind = own[1], headers[f"{linear}.weight"].shape[1]
            return Share(is_empty=True, columns=own) if self.ranks.rank else Share(columns=behind)
        if part == "bias":
            return Share(is_empty=True) if self.ranks.rank else None
        if label == W8A8_MIXED:
            raise OctavoError(
                f"tp_plan: {linear}: {label} keeps columns in float that lie on one rank or another, and is not shared "
                "among ranks; convert with W8A8_DYNAMIC"
            )
        scale = headers.get(f"{linear}.weight_scale")
        groups = 1 if scale is None or label not in WEIGHT_ONLY else scale.shape[1]
        if part == "weight":
            return self._of_weight(linear, own, groups, headers)
        if part in ("weight_scale", "weight_offset") and groups > 1:
            return Share(1, (self._groups(linear, own, groups),))
        return None

    def _groups(self, linear: str, own: Range, groups: int) -> Range:
        """Which groups of input channels are a rank's.

        Raises:
            OctavoError: a group lies on two ranks.
        """
        size = self.ranks.size
        if groups % size:
            wide = (own[1] - own[0]) * size
            raise OctavoError(
                f"tp_plan: {linear}: {groups} groups of {wide // groups} input channels cannot be shared among {size} "
                f"ranks; convert with a --group_size that divides {wide // size}, or with another number of ranks"
            )
        return self.ranks.rank * groups // size, (self.ranks.rank + 1) * groups // size

    def _of_weight(self, linear: str, own: Range, groups: int, headers: Mapping[str, TensorHeader]) -> Share:
        label = self._labels.get(linear)
        if groups > 1:
            self._groups(linear, own, groups)
        extra = MAX_CHANNELS if has_token_scale(label, groups) else 0
        if extra and label == W4A16_DOUBLE:
            raise OctavoError(
                f"tp_plan: {linear}: {label} of one group has no code of 0 to pad with; convert with --group_size 32"
            )
        zero = f"{linear}.weight_offset" if extra and label in WEIGHT_ONLY else None
        if label in INT4_LABELS and headers[f"{linear}.weight"].dtype == _INT4_BYTES:
            if (own[1] - own[0]) % WEIGHT_BLOCK:
                raise OctavoError(
                    f"tp_plan: {linear}: int4 lies in blocks of {WEIGHT_BLOCK} input channels, and the "
                    f"{own[1] - own[0]} of each of {self.ranks.size} ranks are no multiple; take fewer ranks"
                )
            own, extra = (own[0] // 2, own[1] // 2), extra // 2
        return Share(1, (own,), extra, zero=zero)

    def extra_inputs(self, headers: Mapping[str, TensorHeader]) -> dict[str, int]:
        """`MAX_CHANNELS` by name of the quantized linears that have so many more input channels than their share."""
        shares = {name: self.of(f"{name}.weight", headers) for name in self._labels}
        return {name: MAX_CHANNELS for name, share in shares.items() if share is not None and share.extra}

    def config(self) -> Any:
        """Make the config that of this rank's model, in place."""
        config, size = self._config, self.ranks.size
        config.head_dim = self._width
        config.num_attention_heads = self._all_heads // size
        config.num_key_value_heads = self._kv_heads[1] - self._kv_heads[0]
        setattr(config, KV_SHARE, f"KV heads {self._kv_heads[0]} to {self._kv_heads[1] - 1} of {self._all_kv_heads}")
        for experts in self._linears:
            field = "moe_intermediate_size" if experts else "intermediate_size"
            setattr(config, field, getattr(config, field) // size)
        return config


def has_token_scale(label: str | None, groups: int) -> bool:
    """Whether a linear may quantize its inputs by a scale per token, over all of its channels."""
    return label in (W8A8_DYNAMIC, FP8_DYNAMIC) or (label in WEIGHT_ONLY and groups == 1)


class SharedTensor:
    """A part of a stored tensor, read when it is asked for by `[...]`, as a slice of safetensors is.

    Args:
        stored: the slice of the whole.
        share: which part.
        zero: of the tensor that `share` names, as `stored`.
    """

    def __init__(self, stored: Any, share: Share, zero: Any = None) -> None:
        self._stored, self._share, self._zero = stored, share, zero

    def get_dtype(self) -> str:
        """As of a slice of safetensors."""
        return self._stored.get_dtype()

    def get_shape(self) -> list[int]:
        """As of a slice of safetensors."""
        return list(self._share.shape_of(tuple(self._stored.get_shape())))

    def __getitem__(self, index: Any) -> torch.Tensor:
        share = self._share
        if share.is_empty:
            return torch.zeros_like(self._stored[...])[index]
        cut = (slice(None),) * share.dim
        parts = [self._stored[(*cut, slice(start, stop))] for start, stop in share.ranges]
        if share.extra:
            parts.append(self._zeros(parts[0]))
        return torch.cat(parts, dim=share.dim)[index] if len(parts) > 1 else parts[0][index]

    def _zeros(self, part: torch.Tensor) -> torch.Tensor:
        """Codes that stand for 0, behind `part` `[N, ...]`."""
        shape = len(part), self._share.extra
        if self._zero is None:
            return torch.zeros(shape, dtype=torch.float32).to(part.dtype)
        codes = self._zero[...].float()
        if part.dtype == torch.uint8:  # two to a byte, by their numbers from 0
            codes = (codes + 8) * 17
        return codes.to(part.dtype).expand(shape)


class SharedBias(SharedTensor):
    """The `quant_bias` of a rank of a W8A8 linear that is cut by input channels, int32 `[N]`, read as `SharedTensor`.

    It holds the bias, which the first rank adds, and takes off what the zero point of the inputs adds to the products,
    `offset * sum(codes of a row)`. Each rank takes off what its own channels add: if one did it for all, parts of a sum
    would be many times as large as the sum, and be rounded as such to the dtype of the model.

    Args:
        stored: the slice of the whole.
        share: which part.
        weight, offset: of the linear, as `stored`.
    """

    def __init__(self, stored: Any, share: Share, weight: Any, offset: Any) -> None:
        super().__init__(stored, share)
        self._weight, self._offset = weight, offset

    def __getitem__(self, index: Any) -> torch.Tensor:
        start, stop = self._share.columns
        added = self._offset[...].to(torch.int64) * self._weight[:, start:stop].sum(dim=1, dtype=torch.int64)
        whole = self._stored[...]
        found = -added if self._share.is_empty else whole + added
        limits = torch.iinfo(torch.int32)
        return found.clamp(limits.min, limits.max).to(whole.dtype)[index]


def shared_tensors(shares: Shares, headers: Mapping[str, TensorHeader], files: list[str]) -> dict[str, Any]:
    """What a rank reads of the tensors of some safetensors files, by name, each when it is asked for."""
    stored: dict[str, Any] = {}
    for file in files:
        opened = safe_open(file, framework="pt")
        stored |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
    found = {}
    for name, part in stored.items():
        share = shares.of(name, headers)
        if share is not None and share.columns is not None:
            of_linear = (stored[name.removesuffix("quant_bias") + other] for other in ("weight", "input_offset"))
            found[name] = SharedBias(part, share, *of_linear)
        else:
            found[name] = part if share is None else SharedTensor(part, share, stored.get(share.zero))
    return found
