"""A converted directory read as what the dialects write: linears, static scales, floats and config, one at a time.

Nothing of it is changed. No more than one linear, or some rows of a large tensor, is in memory at once.

N output channels, K input channels, G groups of them; V tokens of the vocabulary.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ....ops.linear.reference import WEIGHT_BLOCK
from ....ops.shared.codes import expand_scale, unpack_int4
from ...architecture import architecture_of
from ...errors import OctavoError
from ...runtime.checkpoint.ascend import DESCRIPTION_FILE, SCALE_MODULES
from ...runtime.checkpoint.buffers import read_scales
from ...runtime.checkpoint.files import TensorHeader, read_json
from ...runtime.checkpoint.loading import CONFIG_FILE, CONFIG_KEY, describe_checkpoint, finder, read_config
from ...runtime.decoder import attention_modules
from ...runtime.double_linear import ZERO_STEPS, decoded_scale
from ...runtime.linear_values import is_zero
from ...runtime.quantized_linear import QuantizedLinear
from ...runtime.schemes.kv_scheme import Scheme
from ...runtime.schemes.linear_scheme import EMBEDDING, W8A16
from ...runtime.static_scales import Scales, Statistics, scales_of, settled
from ..job import source_dtype
from ..output.shards import SAFETENSORS_DTYPES, TensorFiles
from ..output.sizes import bits_per_weight
from ..source.checkpoint import FLOAT_DTYPES
from .form import Form, LinearForm, as_engines_hold

ROWS_READ = 2**13
"""Rows of a matrix that are in memory at once."""
_PARTS = ("weight", "weight_scale", "weight_offset", "row_scale", "input_scale", "input_offset", "outlier_columns",
          "outlier_weight")  # fmt: skip
_BY_ROW = ("weight", "weight_scale", "weight_offset", "row_scale", "outlier_weight")
"""Parts of a quantized linear, and those of which a row belongs to an output channel."""


@dataclass(frozen=True)
class LinearCodes:
    """Rows of a quantized linear layer: `x = (code - zero) * scale`, for weight and inputs alike.

    Attributes:
        codes: int8 or float8_e4m3fn `[N, K]`; those of int4 from -8 to 7.
        scale: float32 `[N, G]`, `[N, 1]`, or `[1, 1]` of the whole weight.
        zero: float32 as `scale`; None where it is 0 throughout.
        input_scale, input_zero: float32 `[1]` of static inputs; None of others, the zero where it is 0, too.
        outlier_columns, outlier_weight: int32 `[M]` and float `[N, M]` of W8A8_MIXED; None of other kinds.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_zero: torch.Tensor | None = None
    outlier_columns: torch.Tensor | None = None
    outlier_weight: torch.Tensor | None = None

    def float_weight(self) -> torch.Tensor:
        """What the codes stand for, float32 `[N, K]`."""
        shape = self.codes.shape
        weight = self.codes.float()
        if self.zero is not None:
            weight -= expand_scale(self.zero, *shape)
        weight *= expand_scale(self.scale, *shape)
        if self.outlier_columns is not None:
            weight.index_copy_(1, self.outlier_columns.long(), self.outlier_weight.float())
        return weight


def _weight_files(path: Path, config: Any) -> list[Path]:
    """The files that hold the tensors of a directory that `describe_checkpoint` found sound."""
    file = path / config.transformers_weights
    if file.suffix == ".safetensors":
        return [file]
    return [path / name for name in sorted(set(read_json(file)["weight_map"].values()))]


def _is_of_cache(name: str) -> bool:
    """Whether a tensor holds static scales, zeros or codebooks of a cache."""
    module, _, part = name.rpartition(".")
    return part.startswith("kv_cache_") or module.rpartition(".")[2] in SCALE_MODULES


def _biased(config: Any) -> set[str]:
    """Names of the modules that have a bias in transformers' own model of a config."""
    bare = copy.deepcopy(config)
    for key in (CONFIG_KEY, "transformers_weights", "auto_map"):
        vars(bare).pop(key, None)
    bare._attn_implementation = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(bare)
    return {name.removesuffix(".bias") for name in model.state_dict() if name.endswith(".bias")}


def _shaped(path: Path) -> tuple[Any, dict[str, TensorHeader], nn.Module]:
    """Config, headers and an empty model of a converted directory.

    Raises:
        OctavoError: it is none, or damaged.
    """
    if not path.is_dir():
        raise OctavoError(f"--model_path {path}: no such directory")
    if finder(str(path), {})(DESCRIPTION_FILE) is None:
        raise OctavoError(
            f"--model_path {path}: holds no {DESCRIPTION_FILE}; give a directory that a conversion of Octavo wrote"
        )
    config = read_config(str(path), {})
    architecture = architecture_of(config)
    headers = describe_checkpoint(config, str(path), architecture.model_class._tied_weights_keys or (), {})
    with torch.device("meta"):
        model = architecture.model_class(copy.deepcopy(config))
    return config, headers, model


class OctavoDirectory:
    """A converted directory.

    Attributes:
        path: the directory.
        settings: its config.json.
        form: what it is, without its tensors.

    Raises:
        OctavoError: it is no directory of a conversion, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config, self._headers, self._model = _shaped(path)
        self.settings = read_json(path / CONFIG_FILE)
        self._layout = getattr(config, CONFIG_KEY)
        self._files = TensorFiles(_weight_files(path, config))
        self._statistics: Statistics | None = None
        self.form = self._form(config)

    def _form(self, config: Any) -> Form:
        labels = self._layout["quantized_linears"]
        linears = {name: self._linear_form(name, label) for name, label in labels.items() if label != EMBEDDING}
        biased = _biased(config)
        return Form(
            architecture=architecture_of(config),
            config=config,
            scheme=self._model.scheme,
            linears=linears,
            float_linears=tuple(n for n, module in self._model.named_modules() if isinstance(module, nn.Linear)),
            has_coded_embedding=EMBEDDING in labels.values(),
            added_biases=tuple(name for name in self._layout["biases"] if name not in biased),
            folds=any(layer.folded for layer in self._stored_scales),
            dtype=self._dtype(config),
        )

    def _dtype(self, config: Any) -> str:
        """Of the matrices in float, or else what config.json states: vectors may be in another than matrices were."""
        matrices = {name: header for name, header in self.floats().items() if len(header.shape) > 1}
        stated = [name for name, dtype in FLOAT_DTYPES.items() if dtype == config.dtype]
        return stated[0] if stated and not matrices else source_dtype(matrices or self.floats())

    def _linear_form(self, name: str, label: str) -> LinearForm:
        module: QuantizedLinear = self._model.get_submodule(name)
        rows, groups = self._headers[f"{name}.weight_scale"].shape
        count, width = module.out_features, module.in_features
        symmetric, symmetric_inputs = (
            not self.has(f"{name}.{part}") or is_zero(self._files.read(f"{name}.{part}"))
            for part in ("weight_offset", "input_offset")
        )
        return LinearForm(
            label,
            count,
            width,
            width // groups if groups > 1 else 0,
            symmetric,
            rows == 1 < count,
            self.has(f"{name}.bias"),
            symmetric_inputs,
        )

    def floats(self) -> dict[str, TensorHeader]:
        """Dtype and shape by name of what is in float, biases of quantized linears included, in the files' order."""
        linears = self._layout["quantized_linears"]
        return {
            name: header
            for name, header in self._headers.items()
            if not _is_of_cache(name) and (name.rpartition(".")[0] not in linears or name.endswith(".bias"))
        }

    # Names

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self._headers

    def shape(self, module: str) -> tuple[int, int]:
        """N and K of a quantized linear, or V and the channels of an embedding in int8."""
        found = self._model.get_submodule(module)
        return found.out_features, found.in_features

    def bits_per_weight(self) -> tuple[float | None, float | None]:
        """Of the quantized linears of the layers, and of embedding and last linear; None where there are none."""
        labels, form = self._layout["quantized_linears"], self.form
        sizes = {name: math.prod(self.shape(name)) for name in labels}
        ends = {name: sizes.pop(name) for name in (form.embedding, form.head) if name in sizes}
        return bits_per_weight(self._headers, sizes), bits_per_weight(self._headers, ends)

    def embedding_form(self) -> LinearForm:
        """The embedding in int8, as the last linear that is tied to it has it."""
        return self._linear_form(self.form.embedding, W8A16)

    # Tensors

    def read(self, name: str) -> torch.Tensor:
        """A float tensor as it is stored."""
        return self._files.read(name)

    def rows(self, name: str) -> Iterator[tuple[torch.Tensor, int]]:
        """A float tensor in parts: rows, number of the first of them."""
        count = self._headers[name].shape[0]
        for first in range(0, count, ROWS_READ):
            yield self._files.rows(name, first, min(count, first + ROWS_READ)), first

    def linear(self, name: str, first: int = 0, last: int | None = None) -> LinearCodes:
        """A quantized linear layer, or some rows of it."""
        last = self._headers[f"{name}.weight"].shape[0] if last is None else last
        parts = {part: self._part(name, part, first, last) for part in _PARTS if self.has(f"{name}.{part}")}
        codes, scale = parts["weight"], parts["weight_scale"].float()
        if "row_scale" in parts:
            scale = decoded_scale(parts["weight_scale"], parts["row_scale"])
            parts["weight_offset"] = parts["weight_offset"].float() / ZERO_STEPS
        if codes.dtype == torch.uint8:
            codes = unpack_int4(codes, WEIGHT_BLOCK)
        zero, input_zero = (
            None if found is None or is_zero(found) else found.float()
            for found in (parts.get("weight_offset"), parts.get("input_offset"))
        )
        input_scale = parts.get("input_scale")
        outliers = parts.get("outlier_columns"), parts.get("outlier_weight")
        return LinearCodes(
            codes, scale, zero, None if input_scale is None else input_scale.float(), input_zero, *outliers
        )

    def linear_rows(self, name: str) -> Iterator[LinearCodes]:
        """A quantized linear layer in parts of some rows."""
        count = self._headers[f"{name}.weight"].shape[0]
        for first in range(0, count, ROWS_READ):
            yield self.linear(name, first, min(count, first + ROWS_READ))

    def scale(self, name: str) -> torch.Tensor:
        """The scales of a quantized weight, as of `LinearCodes`."""
        scale = self._files.read(f"{name}.weight_scale")
        if self.has(f"{name}.row_scale"):
            return decoded_scale(scale, self._files.read(f"{name}.row_scale"))
        return scale.float()

    def _part(self, name: str, part: str, first: int, last: int) -> torch.Tensor:
        """Rows of a part of a linear, or all of one that has no row for each output channel."""
        tensor, rows = f"{name}.{part}", self._headers[f"{name}.weight"].shape[0]
        has_rows = part in _BY_ROW and self._headers[tensor].shape[0] == rows
        return self._files.rows(tensor, first, last) if has_rows else self.read(tensor)

    def float_rows(self, name: str) -> Iterator[tuple[torch.Tensor, int]]:
        """The weight of a linear or embedding in codes, in the dtype of the model, as `rows` gives it."""
        dtype, first = SAFETENSORS_DTYPES[self.form.dtype], 0
        for part in self.linear_rows(name):
            yield part.float_weight().to(dtype), first
            first += len(part.codes)

    # Scales of the cache

    @cached_property
    def _stored_scales(self) -> Scales:
        found = {name: self._files.read(name) for name in self._headers if _is_of_cache(name)}
        self._model.load_state_dict(found, strict=False, assign=True)
        return read_scales(attention_modules(self._model), self._model.scheme, self._model.octavo_decoder)

    def scales(self) -> Scales:
        """The static scales of every layer, for K and V as the scheme of `form` has them."""
        return self._stored_scales if self._statistics is None else scales_of(self.form.scheme, self._statistics)

    def with_cache(self, scheme: Scheme, statistics: Statistics | None) -> "OctavoDirectory":
        """The same weights with another cache: a scheme without static scales, or scales derived anew.

        Args:
            scheme: of attention and cache; biases are counted in and nothing is turned, as engines hold K and V.
            statistics: of the model that was converted.

        Raises:
            OctavoError: the scheme needs statistics and there are none, or they are of another model.
        """
        if scheme.is_static and statistics is None:
            raise OctavoError(f"--scheme {scheme.name}: its scales come from calibration; give --statistics FILE")
        other, scheme = copy.copy(self), scheme.of_model(self.form.layers)
        if statistics is not None:
            statistics.check_model(self.form.config)
            scheme = settled(scheme, scales_of(scheme, statistics))
            scheme, other._statistics = as_engines_hold(scheme), statistics
        other.form = replace(self.form, scheme=scheme, folds=False)
        return other
