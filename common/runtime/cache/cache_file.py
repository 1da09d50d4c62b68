"""A cache as one safetensors file: what `QuantizedCache.save` writes and `load` reads.

Tensors, for layer `i` and `side` key or value; B batch, G KV heads, D head_dim:

    layers.{i}.{side}.{codes,scale,zero,outliers,channels,second,wide}   rows in use, as `CodeStorage` keeps them
    layers.{i}.{side}.{front,tail}                           tokens in float, as `SegmentStore` keeps them
    layers.{i}.key_mean                                      where the scheme smooths K
    layers.{i}.constant.*                                    static scales, zeros and codebooks (`LayerScales`)
    layers.{i}.frequencies                                   angles per token of the rotary pairs [R / 2]

The metadata holds `format`, as JSON under `cache` the scheme, the sizes and counts, and a `checksum` of all that.
"""

import json
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import OctavoError, first_line
from ..static_scales import LayerScales
from ..strict_json import parse_json

CACHE_FORMAT = "octavo-cache-1"
_CACHE_FORMATS = "octavo-cache-"
_SAVE_AGAIN = "save the cache again"
Tensors = dict[str, torch.Tensor]


def _cache_checksum(facts: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the facts, and of the names and bytes of all tensors, in the order of the names."""
    total = zlib.crc32(facts.encode())
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def write_cache_file(file: Path, facts: dict[str, Any], tensors: Tensors) -> None:
    """Write facts and tensors, whole or not at all: what stood there stays until all is written.

    Raises:
        OctavoError: it cannot be written.
    """
    # Of views, of which several may be of one storage, each a copy of its own.
    tensors = {name: part.detach().to("cpu", copy=True).contiguous() for name, part in tensors.items()}
    text = json.dumps(facts)
    metadata = {"format": CACHE_FORMAT, "checksum": _cache_checksum(text, tensors), "cache": text}
    beside = file.parent / f".{file.name}.{os.getpid()}.{threading.get_ident()}.part"
    try:
        try:
            save_file(tensors, beside, metadata=metadata)
            os.replace(beside, file)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OctavoError(f"{file}: the cache cannot be written ({first_line(error)})") from None


def read_cache_file(file: Path) -> tuple[dict[str, Any], Tensors]:
    """What `write_cache_file` wrote.

    Raises:
        OctavoError: the file is missing, no cache, of another version, or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            found = metadata.get("format", "")
            if found != CACHE_FORMAT:
                is_ours = found.startswith(_CACHE_FORMATS)
                what = (
                    f"is a cache of format {found}, and this is code for {CACHE_FORMAT}" if is_ours else "is no cache"
                )
                raise OctavoError(f"{file}: {what}; give a file of QuantizedCache.save of this version")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError) as error:
        raise OctavoError(f"{file}: cannot be read as a cache ({first_line(error)}); {_SAVE_AGAIN}") from None
    text = metadata.get("cache", "")
    if metadata.get("checksum") != _cache_checksum(text, tensors):
        raise OctavoError(f"{file}: is damaged, its checksum is of other contents; {_SAVE_AGAIN}")
    try:
        facts = parse_json(text)
    except ValueError as error:
        raise OctavoError(f"{file}: is damaged, its metadata are no JSON ({error}); {_SAVE_AGAIN}") from None
    return facts, tensors


def part_of(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}


def named(prefix: str, parts: Tensors) -> Tensors:
    """The same tensors under names that begin with `prefix`."""
    return {prefix + name: part for name, part in parts.items()}


def constants_of(scales: LayerScales) -> Tensors:
    """Static scales as tensors by name."""
    (key, key_zero), (value, value_zero) = (pair or (None, None) for pair in (scales.key, scales.value))
    parts = {"key": key, "key_zero": key_zero, "value": value, "value_zero": value_zero, "query": scales.query,
             "key_levels": scales.key_levels, "value_levels": scales.value_levels, "key_mean": scales.key_mean,
             "key_basis": scales.key_basis, "value_basis": scales.value_basis}  # fmt: skip
    return named("constant.", {name: part for name, part in parts.items() if part is not None})


def scales_from(tensors: Tensors, is_folded: bool) -> LayerScales:
    """The inverse of `constants_of`."""
    found = part_of(tensors, "constant.").get
    key, value = (
        (found(side), found(f"{side}_zero")) if found(side) is not None else None for side in ("key", "value")
    )
    return LayerScales(
        key, value, found("query"), found("key_levels"), found("value_levels"), is_folded, found("key_mean"),
        found("key_basis"), found("value_basis"),
    )  # fmt: skip
