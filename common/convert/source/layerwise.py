"""A float model of which one decoder layer is in memory at a time, so that models larger than memory can be converted.

B = 1: texts are not batched. S tokens, E hidden size, V vocabulary.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from ...architecture import Architecture
from ...errors import OctavoError, first_line
from ...runtime.decoder import (
    Decoder,
    attention_modules,
    capped_logits,
    check_anatomy,
    list_experts,
    scaled_states,
    state_decoder,
    stated_decoder,
)
from ...runtime.experts import ExpertList, list_layer_experts
from ...runtime.model_sizes import attention_sizes
from ...runtime.schemes.kv_scheme import Scheme
from ...runtime.static_scales import LayerScales
from ..output.shards import TensorFiles
from ..spelling import named
from .probes import ends_fault, rope_fault
from .quantized.cache_scales import CacheScales
from .quantized.files import CodedFiles
from .quantized.weight import CodedLinear, CodedWeight

MOST_LOGITS = 2**23
"""Logits that are held at a time."""
MOST_HEAD = 2**23
"""Elements of the last linear's weight that are in float32 at a time."""
IGNORED = "inv_freq"
"""A buffer of rotary embeddings in old checkpoints, which models compute themselves."""


def with_real_rotary(model: nn.Module, device: torch.device) -> nn.Module:
    """A stated model on the meta device with its rotary embedding, whose buffers are in no file, in memory."""
    rotary = model.base_model.get_submodule(stated_decoder(model).rotary)
    vars(rotary).update(vars(type(rotary)(model.config).to(device)))
    return model.eval().requires_grad_(False)


def assign_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put tensors in the place of all parameters and buffers of a module that a state dict has."""
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)


def give_back_freed() -> None:
    """Give memory that is freed back to the system, which glibc keeps in pieces as large as the codes of a layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class LayerwiseModel:
    """A float model whose decoder layers are loaded one by one, in float32.

    Args:
        directory: of the checkpoint, for messages.
        config: of the model.
        files: its tensors.
        device: where layers are computed.
        architecture: what states the model's anatomy.

    Attributes:
        tied: names of tensors that are another one, and that one's.

    Raises:
        OctavoError: config and tensors do not fit together.
    """

    def __init__(
        self,
        directory: Path,
        config: PreTrainedConfig,
        files: TensorFiles,
        device: str,
        architecture: Architecture,
    ) -> None:
        self._where = f"{named('model')} {directory}"
        self.files, self.device = files, torch.device(device)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            state_decoder(model, architecture.decoder)
            check_anatomy(model, architecture.decoder, f"models/{architecture.name}")
            self._check_embedding(model, architecture.decoder)
            with torch.device("meta"):
                list_experts(model)
            self.model = with_real_rotary(model, self.device)
            self._check_ends()
        except OctavoError:
            raise
        except (
            ValueError,
            RuntimeError,
            KeyError,
            TypeError,
            AttributeError,
            AssertionError,
            ZeroDivisionError,
        ) as error:
            raise OctavoError(f"{self._where}: cannot be loaded ({first_line(error)})") from None
        finally:
            logging.set_verbosity(verbosity)
        self.facts = architecture.decoder
        self.decoder = self.model.base_model
        self.layers = self.decoder.get_submodule(self.facts.layers)
        self.layers_name = self._outer_name(self.facts.layers)
        self.tied: dict[str, str] = {}
        self._cut_merged_experts()
        self._file_names = self._matched()

    def _check_embedding(self, model: nn.Module, decoder: Decoder) -> None:
        """Raise an `OctavoError` if the embedding does more than look rows up, and no factor of it is stated."""
        embedding = model.base_model.get_submodule(decoder.embedding)
        is_scaled = type(embedding).forward is not nn.Embedding.forward
        if is_scaled != (decoder.embedding_scale is not None):
            form = (
                "computes more than a row of its weight, and no embedding_scale is stated"
                if is_scaled
                else "multiplies by nothing, unlike stated (a factor of the decoder itself is states_scale)"
            )
            raise OctavoError(f"{self._where}: {decoder.embedding}: {type(embedding).__name__} {form}")

    def _check_ends(self) -> None:
        """Raise an `OctavoError` if what the model computes around its layers, RoPE included, is not as stated."""
        fault = ends_fault(self.model, self.device) or rope_fault(self.model, self.device)
        if fault is not None:
            raise OctavoError(f"{self._where}: {type(self.model).__name__}: {fault}")

    def _outer_name(self, name: str) -> str:
        """Name in the model of a module of its decoder."""
        return f"{self.model.base_model_prefix}.{name}"

    def experts_in(self, index: int) -> int:
        """How many experts a decoder layer has in the place of its MLP."""
        return self.facts.experts_in(self.config, index)

    def experts_of(self, layer: nn.Module, index: int) -> ExpertList | None:
        """The experts of a decoder layer that is in memory; None if it has none."""
        return layer.get_submodule(self.facts.experts.name) if self.experts_in(index) else None

    def _cut_merged_experts(self) -> None:
        """Know by their names the linears of experts that a save merged into one tensor, as transformers holds them."""
        for index in range(len(self)):
            count, facts = self.experts_in(index), self.facts.experts
            layer = self.layer_name(index)
            for name in (layer, layer.removeprefix(f"{self.model.base_model_prefix}.")) if count else ():
                for parameter, parts in facts.merged.items():
                    linears = [facts.part(expert, part) for expert in range(count) for part in parts]
                    self.files.cut(f"{name}.{facts.name}.{parameter}", [f"{name}.{part}.weight" for part in linears])

    def _stored_names(self) -> dict[str, str]:
        """The name in the files of each tensor of the model, as it is or without the model's prefix."""
        prefix = f"{self.model.base_model_prefix}."
        stored = self.files.placed
        return {name: name if name in stored else name.removeprefix(prefix) for name in self.model.state_dict()}

    def _equal(self, name: str, other: str) -> bool:
        """Whether two tensors of the files hold the same values."""
        shape, other_shape = (self.files.placed[part].header.shape for part in (name, other))
        if shape != other_shape or len(shape) != 2:
            return False
        count, step = shape[0], max(1, MOST_HEAD // max(1, shape[1]))
        for first in range(0, count, step):
            rows = [self.files.rows(part, first, min(count, first + step)).float() for part in (name, other)]
            if not torch.equal(*rows):
                return False
        return True

    def _tie(self, names: dict[str, str]) -> None:
        """Decide what is tied as a load by transformers does, and say in `names` where it lies.

        A tensor that is stored and differs from what config.json ties it to is not tied; where only one of two is
        stored, it is both.
        """
        if not self.config.tie_word_embeddings:
            return
        stored = self.files.placed
        for target, origin in self.model.all_tied_weights_keys.items():
            if names[target] in stored and names[origin] in stored:
                if not self._equal(names[target], names[origin]):
                    continue
            elif names[target] in stored:
                names[origin] = names[target]
            self.tied[target] = origin

    def _is_empty_bias(self, name: str) -> bool:
        """Whether it is a bias of a linear in codes that is 0 throughout, which AutoGPTQ wrote where there was none."""
        is_coded = isinstance(self.files, CodedFiles) and f"{name.removesuffix('.bias')}.weight" in self.files.linears
        return name.endswith(".bias") and is_coded and not bool(self.files.read(name).any())

    def _matched(self) -> dict[str, str]:
        """The name in the files of each tensor of the model, those tied to another left out."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        stored = self.files.placed
        names = self._stored_names()
        known = set(names.values())
        self._tie(names)
        names = {name: file_name for name, file_name in names.items() if name not in self.tied}
        missing = sorted(name for name, file_name in names.items() if file_name not in stored)
        ignored = f"{self.facts.rotary}.{IGNORED}"
        unexpected = sorted(
            name
            for name in stored
            if name not in known and not name.endswith(ignored) and not self._is_empty_bias(name)
        )
        for problem, found in (("missing", missing), ("unexpected", unexpected)):
            if found:
                raise OctavoError(f"{self._where}: {problem} keys: {found[0]}; the checkpoint is not whole")
        for name, file_name in sorted(names.items()):
            shape = stored[file_name].header.shape
            if shape != shapes[name]:
                raise OctavoError(
                    f"{self._where}: mismatched keys: {name} is {list(shape)} and config.json makes it "
                    f"{list(shapes[name])}; the checkpoint is not whole"
                )
        return names

    @property
    def config(self) -> PreTrainedConfig:
        """The model's."""
        return self.model.config

    def __len__(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def layer_name(self, index: int) -> str:
        """Name of a decoder layer, as `model.layers.3`."""
        return f"{self.layers_name}.{index}"

    def file_name(self, name: str) -> str:
        """Name in the files of a tensor of the model; of one that is tied, that of what it is tied to."""
        return self._file_names[self.tied.get(name, name)]

    def source_dtype(self, name: str) -> str | None:
        """The dtype that a tensor has in the files, as spelled there; None if there is none of that name."""
        name = self.tied.get(name, name)
        return self.files.placed[self._file_names[name]].header.dtype if name in self._file_names else None

    def coded_linears(self) -> dict[str, CodedLinear]:
        """What is known of the linears that the checkpoint holds in codes, by name, in the order of the model.

        Raises:
            OctavoError: one of them is no linear of the model.
        """
        known = self.files.linears if isinstance(self.files, CodedFiles) else {}
        found = {name: known[file] for name, file in self._file_names.items() if file in known}
        for name in found:
            if not isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.Linear):
                raise OctavoError(f"{self._where}: {name} is in codes, and of no linear; give the float checkpoint")
        return {name.removesuffix(".weight"): linear for name, linear in found.items()}

    def static_scales(self, scheme: Scheme) -> tuple[LayerScales, ...]:
        """The static scales of K, V and q that the checkpoint keeps, as a scheme has them, layer by layer.

        Raises:
            OctavoError: see `CacheScales.of_layers`.
        """
        kept = self.files.cache_scales if isinstance(self.files, CodedFiles) else CacheScales((), None, self.files.read)
        attentions = [name for name, _ in attention_modules(self.model)]
        return kept.of_layers(scheme, attentions, self.model.base_model_prefix, attention_sizes(self.config))

    def coded_weight(self, name: str) -> CodedWeight:
        """The weight in codes of one of `coded_linears`."""
        return self.files.coded(self.file_name(f"{name}.weight"))

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the model, in the files' dtype; one that is in codes there, decoded to float32.

        Raises:
            OctavoError: it holds NaN or Inf.
        """
        found = self.files.read(self.file_name(name))
        self.check_finite(name, found)
        return found

    def check_finite(self, name: str, tensor: torch.Tensor) -> None:
        """Raise an `OctavoError` if (a part of) the tensor of that name holds NaN or Inf."""
        ends = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor  # NaN is both; no room of its size
        if not torch.isfinite(ends).all():
            raise OctavoError(f"{self._where}: {name} holds NaN or Inf; the checkpoint is damaged")

    def _filled(self, module: nn.Module, name: str) -> nn.Module:
        give_back_freed()
        state = {part: self.tensor(f"{name}.{part}").to(self.device).float() for part in module.state_dict()}
        assign_state(module, state)
        return module

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer in memory, in its place in the model; whatever is done to it is forgotten afterwards."""
        empty = self.layers[index]
        with torch.device("meta"):
            fresh = type(empty)(self.config, index)
            if self.experts_in(index):
                list_layer_experts(fresh, self.facts.experts)
        self.layers[index] = self._filled(fresh.eval(), self.layer_name(index))
        try:
            yield fresh
        finally:
            self.layers[index] = empty

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """`[1, S]` token ids to `[1, S, E]`."""
        return self.states_of(self.rows_of(ids))

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding of `[1, S]` token ids, float32 `[1, S, E]`."""
        size = self.config.vocab_size
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise OctavoError(f"{self._where}: the tokenizer has more than the {size} tokens that config.json counts")
        return (
            self.files.gathered(self.file_name(f"{self.embedding_name}.weight"), ids[0])[None].to(self.device).float()
        )

    def states_of(self, found: torch.Tensor) -> torch.Tensor:
        """What the first layer is given of such rows."""
        if self.facts.embedding_scale is not None:
            found = found * self.facts.embedding_scale(self.config)
        return scaled_states(self.facts, self.config, found)

    def final_norm(self) -> nn.Module:
        """The norm behind the last layer, in memory."""
        return self._filled(self.decoder.get_submodule(self.facts.norm), self._outer_name(self.facts.norm))

    @property
    def embedding_name(self) -> str:
        """Name of the embedding of tokens."""
        return self._outer_name(self.facts.embedding)

    @property
    def tied_modules(self) -> set[str]:
        """Names of the modules whose weight is another one's."""
        return {name.rpartition(".")[0] for name in self.tied}

    @property
    def norm_name(self) -> str:
        """Name of the weight of that norm."""
        return self._outer_name(f"{self.facts.norm}.weight")

    def logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Float32 logits `[S, V]` of normed states `[S, E]`, by parts of the `[V, E]` head in any dtype."""
        step = max(1, MOST_HEAD // hidden.shape[-1])
        parts = [hidden @ part.to(self.device).float().T for part in head.split(step)]
        return capped_logits(self.facts, self.config, torch.cat(parts, dim=-1))
