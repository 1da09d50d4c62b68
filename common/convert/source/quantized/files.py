"""A quantized checkpoint as tensors of a float model: each linear in codes is one `weight`, decoded when it is read."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ....errors import OctavoError, first_line
from ....runtime.checkpoint.files import TensorHeader
from ...dialects.layouts import awq, compressed_tensors, fp8_block, gptq
from ...output.shards import Placed, TensorFiles, read_rows
from .awq import read_awq
from .cache_scales import PARTS, CacheScales, cache_dtype
from .compressed_tensors import read_compressed_tensors
from .fp8 import read_fp8
from .gptq import read_gptq
from .weight import CodedLinear, CodedWeight

READERS = {
    awq.METHOD: read_awq,
    gptq.METHOD: read_gptq,
    compressed_tensors.METHOD: read_compressed_tensors,
    fp8_block.METHOD: read_fp8,
}
"""By `quant_method` of `quantization_config` in config.json."""
_FLOATS = ("F32", "F16", "BF16")
_INTEGERS = ("I8", "I32", "I64")
_DTYPES = {
    "weight": ("I8", "F8_E4M3"),
    **dict.fromkeys(("qweight", "qzeros", "weight_packed"), ("I32",)),
    **dict.fromkeys(("g_idx", "weight_g_idx", "weight_shape"), _INTEGERS),
    **dict.fromkeys(("weight_zero_point", "input_zero_point"), (*_INTEGERS, "F8_E4M3")),
    **dict.fromkeys((f"{side}_zero_point" for side in "kvq"), (*_INTEGERS, *_FLOATS)),
}
"""Dtypes of what checkpoints in codes are made of, by the ends of names; scales, which are not listed, are in float."""


def _check_dtypes(where: str, headers: dict[str, TensorHeader], names: Iterable[str]) -> None:
    """Raise an `OctavoError` that names the first tensor of another dtype than its part has."""
    for name in names:
        known = _DTYPES.get(name.rpartition(".")[2], _FLOATS)
        if headers[name].dtype not in known:
            raise OctavoError(
                f"{where}: {name} is stored as {headers[name].dtype}, and not as {' or '.join(known)}; copy it again"
            )


class CodedFiles(TensorFiles):
    """The tensors of some safetensors files, those of linears in codes as decoded weights.

    Args:
        files: sound ones.
        where: the config.json, for messages.
        config: its `quantization_config`.

    Attributes:
        linears: those in codes, by the name of their weight.
        cache_scales: static scales of K and V, which are no tensors of the model.
        method: `quant_method`.

    Raises:
        OctavoError: the checkpoint is quantized in a way that Octavo does not read.
    """

    def __init__(self, files: Iterable[Path], where: str, config: Any) -> None:
        super().__init__(files)
        self.method = config.get("quant_method") if isinstance(config, dict) else None
        if self.method not in READERS:
            known = ", ".join(READERS)
            raise OctavoError(
                f"{where}: is quantized already, by quant_method {self.method!r}; Octavo reads {known}, or the float "
                "checkpoint"
            )
        self._stored = dict(self.placed)
        headers = {name: placed.header for name, placed in self._stored.items()}
        try:
            found = READERS[self.method](where, config, headers, self._read_stored)
            dtype_of_cache = cache_dtype(config)
        except (AttributeError, TypeError, ValueError, KeyError) as error:  # of JSON that is of another form
            raise OctavoError(
                f"{where}: quantization_config is none of {self.method} ({first_line(error)}); copy it again"
            ) from None
        self.linears: dict[str, CodedLinear] = {f"{name}.weight": linear for name, linear in found.items()}
        of_cache = sorted(name for name in self.placed if name.rpartition(".")[2] in PARTS)
        self.cache_scales = CacheScales(of_cache, dtype_of_cache, self._read_stored)
        if not self.linears and not of_cache:
            raise OctavoError(f"{where}: quantization_config says {self.method}, and no linear is in codes; remove it")
        _check_dtypes(where, headers, [*of_cache, *(part for linear in found.values() for part in linear.parts)])
        self._present(where, headers)

    def _present(self, where: str, headers: dict[str, TensorHeader]) -> None:
        """Put weights in the place of the tensors that they are made of."""
        hidden = {part for linear in self.linears.values() for part in linear.parts} | set(self.cache_scales.names)
        dtypes = Counter(header.dtype for name, header in headers.items() if name not in hidden)
        dtype = next((dtype for dtype, _ in dtypes.most_common() if dtype in _FLOATS), None)
        if dtype is None:
            raise OctavoError(f"{where}: no tensor of the checkpoint is in float; copy it again")
        first = {name: self._stored[linear.parts[0]] for name, linear in self.linears.items()}
        self.placed = {name: placed for name, placed in self._stored.items() if name not in hidden}
        for name, linear in self.linears.items():
            self.placed[name] = replace(first[name], header=TensorHeader(dtype, linear.shape))

    def _read_stored(self, name: str) -> torch.Tensor:
        """A tensor as it is stored; a number as one of length 1."""
        placed: Placed = self._stored[name]
        if not placed.header.shape:
            placed = replace(placed, header=TensorHeader(placed.header.dtype, (1,)))
        return read_rows(placed, 0, placed.header.shape[0])

    def coded(self, name: str) -> CodedWeight:
        """A weight in codes, by the name of its `weight`."""
        return self.linears[name].read(self._read_stored)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """As of `TensorFiles`; of weights in codes, decoded, in float32."""
        if name not in self.linears:
            return super().rows(name, first, last)
        return self.coded(name).decoded()[first:last]
