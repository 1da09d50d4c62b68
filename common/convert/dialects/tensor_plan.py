"""The tensors that a dialect writes: planned with dtype and shape, then read, made and written one after the other."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ...progress import progress
from ...runtime.checkpoint.files import TensorHeader
from ..output.shards import PlannedFiles, header_of
from .directory import OctavoDirectory

WEIGHTS = "model.safetensors"

Pieces = Iterator[tuple[str, torch.Tensor, int]]
"""Names, rows, and the number of the first of them."""


class TensorPlan:
    """Tensors of an output, in order, and what makes them.

    Args:
        directory: what they are made of.

    Attributes:
        headers: dtype and shape by name.
    """

    def __init__(self, directory: OctavoDirectory) -> None:
        self._directory = directory
        self.headers: dict[str, TensorHeader] = {}
        self._makers: list[Callable[[], Pieces]] = []

    def keep(self, name: str, new_name: str | None = None) -> None:
        """A float tensor as it is."""
        new_name = new_name or name
        self.headers[new_name] = self._directory.floats()[name]
        self._makers.append(lambda: ((new_name, rows, first) for rows, first in self._directory.rows(name)))

    def decode(self, module: str) -> None:
        """The weight of a linear or embedding in codes, back in the dtype of the model."""
        name, shape = f"{module}.weight", self._directory.shape(module)
        self.headers[name] = TensorHeader(self._directory.form.dtype, shape)
        self._makers.append(lambda: ((name, rows, first) for rows, first in self._directory.float_rows(module)))

    def make(self, headers: Mapping[str, TensorHeader], make: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Tensors that are made together, by name."""
        self.headers |= headers
        self._makers.append(lambda: ((name, tensor, 0) for name, tensor in make().items()))

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Small tensors that are there already."""
        self.make({name: header_of(tensor) for name, tensor in tensors.items()}, lambda: dict(tensors))

    def write(self, path: Path, most_bytes: int | None) -> None:
        """Write all of them into a directory: one file, or files of at most so many bytes and an index."""
        files = PlannedFiles(path, WEIGHTS, self.headers, most_bytes)
        if most_bytes is not None and files.total_bytes <= most_bytes:
            files = PlannedFiles(path, WEIGHTS, self.headers, None)
        files.create()
        for make in progress(self._makers, "tensor", about="writing"):
            for name, rows, first in make():
                files.write(name, rows, first)
