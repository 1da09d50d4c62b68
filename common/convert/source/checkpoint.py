"""The checkpoint that is converted: found, checked and loaded; linears in codes are decoded as they are read."""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...architecture import Architecture, architecture_of
from ...errors import OctavoError, first_line
from ...runtime.checkpoint.files import TensorHeader, read_headers, read_json
from ...runtime.decoder import state_decoder
from ...runtime.model_sizes import MOST_SIZE
from ..output.shards import TensorFiles
from ..output.writer import LONGEST_FILE_NAME
from ..spelling import named
from .config import LOAD_ERRORS, load_source_config
from .layerwise import LayerwiseModel
from .quantized.files import CodedFiles

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
CODE_PATTERNS = ("*.py", "*.tiktoken")
"""What a tokenizer with code of its own needs besides."""
ADAPTER_FILE = "adapter_config.json"
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors$")
"""Names of the parts of a checkpoint that many processes wrote."""
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_source(model_path: str, with_code: bool = False, patterns: Sequence[str] = PATTERNS) -> Path:
    """The directory of a checkpoint: `model_path` itself, or the snapshot of a hub id, fetched if need be.

    Args:
        with_code: whether to fetch code that comes with it, too.
        patterns: files to fetch of a hub id.

    Raises:
        OctavoError: it is no directory and no hub id that can be had.
    """
    try:
        is_directory, is_there = Path(model_path).is_dir(), Path(model_path).exists()
    except OSError as error:  # a name that is too long
        raise OctavoError(f"{named('model')} {model_path[:40]}...: no such directory ({error.strerror})") from None
    if is_directory:
        return Path(model_path)
    if is_there:
        raise OctavoError(f"{named('model')} {model_path}: is a file; give the directory that holds config.json")
    if model_path.count("/") > 1 or model_path.startswith((".", "/", "~")):
        raise OctavoError(f"{named('model')} {model_path}: no such directory")
    try:
        wanted = [*patterns, *(CODE_PATTERNS if with_code else ())]
        return Path(snapshot_download(model_path, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise OctavoError(f"{named('model')} {model_path}: no such directory, and {not_had('model', error)}") from None


def not_had(what: str, error: Exception) -> str:
    """Why something is not had of the hub: there is none, or nobody could ask."""
    if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
        return f"the hub could not be asked: {first_line(error)}"
    return f"no hub {what} ({first_line(error)})"


def _weight_file(directory: Path) -> Path:
    """What transformers opens first: the file that config.json names, the single one, or the index, in this order."""
    file = directory / "config.json"
    given = read_json(file).get("transformers_weights") if file.is_file() else None
    if given is not None:
        if not isinstance(given, str) or not given.endswith((".safetensors", ".safetensors.index.json")):
            raise OctavoError(f"{file}: transformers_weights is {given!r}, which names no safetensors file; remove it")
        return _inside(directory, given, file)
    single, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
    if not (single.is_file() or index.is_file()):
        others = sorted(found.name for found in directory.glob("*.safetensors"))
        there = f" ({others[0]} is none of them)" if others else ""
        raise OctavoError(
            f"{named('model')} {directory}: holds no model*.safetensors that transformers reads, {single.name} or "
            f"{index.name}{there}; save the model as safetensors first"
        )
    return single if single.is_file() else index


def _inside(directory: Path, name: str, named_in: Path) -> Path:
    """A file of a checkpoint by the name that another one gives it."""
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
        raise OctavoError(f"{named_in}: names {name}, which lies outside of {directory}; copy the checkpoint again")
    return directory / inside


def _check_alone(directory: Path) -> None:
    """Raise an `OctavoError` if there is what transformers loads in the place of the weights, or on top of them."""
    if (directory / ADAPTER_FILE).is_file():
        raise OctavoError(
            f"{named('model')} {directory}: {ADAPTER_FILE} adds an adapter to the weights; merge it first, or remove it"
        )
    shards = [file.name for file in directory.iterdir() if _DISTRIBUTED.match(file.name)]
    if shards:
        raise OctavoError(
            f"{named('model')} {directory}: {shards[0]} is part of a distributed checkpoint, which transformers reads "
            "before any other; save the model whole first, or remove it"
        )


def listed_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint that transformers reads, in its order, whether or not they are there.

    Raises:
        OctavoError: there is neither a single file nor an index, or the index names no files or such as lie elsewhere.
    """
    first = _weight_file(directory)
    if not first.name.endswith(".index.json"):
        return [first]
    weight_map = read_json(first).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and len(name) <= LONGEST_FILE_NAME for name in names):
        raise OctavoError(f"{first}: maps no tensors to files; copy the checkpoint again")
    return [_inside(directory, name, first) for name in sorted(set(names))]


def source_files(directory: Path) -> list[Path]:
    """The safetensors files of a float checkpoint that transformers reads, in its order.

    Raises:
        OctavoError: there are none, one that is listed is missing or lies elsewhere, or there is what transformers
            loads in their place.
    """
    _check_alone(directory)
    files = listed_files(directory)
    for file in files:
        if not file.is_file():
            raise OctavoError(f"{named('model')} {directory}: {file.name} is missing; copy the checkpoint again")
    return files


def open_source(directory: Path) -> TensorFiles:
    """The tensors of a checkpoint, those of linears in codes as weights that are decoded.

    Raises:
        OctavoError: there are no sound files, or it is quantized in a way that Octavo does not read.
    """
    files, config = source_files(directory), directory / "config.json"
    quantized = read_json(config).get("quantization_config") if config.is_file() else None
    return TensorFiles(files) if quantized is None else CodedFiles(files, str(config), quantized)


def read_source_headers(directory: Path) -> dict[str, TensorHeader]:
    """Dtype and shape of every tensor of a checkpoint, of weights in codes as they are once decoded.

    Raises:
        OctavoError: there are no safetensors files, one is damaged, or a tensor is of another dtype than float.
    """
    headers = read_headers(source_files(directory))
    files = open_source(directory)
    if isinstance(files, CodedFiles):
        headers = {name: placed.header for name, placed in files.placed.items()}
    for name, header in headers.items():
        if header.dtype not in FLOAT_DTYPES:
            raise OctavoError(
                f"{named('model')} {directory}: {name} is {header.dtype}; give a checkpoint in fp32, fp16 or bf16"
            )
    return headers


def _device_map(device: str) -> str | None:
    """How accelerate spreads a whole model: over all devices of a kind, where it is installed and there are several."""
    if device == "cpu" or getattr(torch, device).device_count() < 2 or find_spec("accelerate") is None:
        return None
    return "auto"


def _check_spread(model: nn.Module, directory: Path) -> None:
    """Raise an `OctavoError` if accelerate left a part outside of the devices, where nothing is differentiated."""
    if {"cpu", "disk"} & set(map(str, model.hf_device_map.values())):
        raise OctavoError(
            f"{named('model')} {directory}: does not fit on the devices as a whole, which codebooks and bases "
            f"need; give {named('device')} cpu, or a scheme without them"
        )


def _decoded_model(source: LayerwiseModel, device: str) -> nn.Module:
    """The whole model in memory of one whose layers are loaded one by one.

    Raises:
        OctavoError: it has experts, which are not put together.
    """
    if source.facts.experts is not None:
        raise OctavoError(
            f"{named('scheme')}: codebooks and bases need the whole model, and experts in codes are not decoded "
            "together; give the float checkpoint"
        )
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    state = {name: source.tensor(name).float() for name in model.state_dict() if name not in source.tied}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    state_decoder(model, source.facts)
    return model.eval().to(device)


def load_source(directory: Path, device: str, architecture: Architecture | None = None) -> nn.Module:
    """The whole float model in memory: fp32 on the CPU, its own dtype elsewhere, over several devices if there are.

    One with linears in codes is decoded, in fp32 everywhere.

    Raises:
        OctavoError: config and weights disagree, a weight is NaN or Inf, or several devices do not hold the model.
    """
    if isinstance(open_source(directory), CodedFiles):
        return _decoded_model(layerwise_source(directory, device, architecture), device)
    dtype = torch.float32 if device == "cpu" else "auto"
    device_map = _device_map(device)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=load_source_config(directory),
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise OctavoError(f"{named('model')} {directory}: cannot be loaded ({first_line(error)})") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            first = sorted(map(str, info[problem]))[0]
            raise OctavoError(
                f"{named('model')} {directory}: {problem.replace('_', ' ')}: {first}; the checkpoint is not whole"
            )
    if device_map:
        _check_spread(model, directory)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise OctavoError(f"{named('model')} {directory}: {name} holds NaN or Inf; the checkpoint is damaged")
    state_decoder(model, (architecture or architecture_of(model.config)).decoder)
    return model.eval() if device_map else model.eval().to(device)


def layerwise_source(directory: Path, device: str, architecture: Architecture | None = None) -> LayerwiseModel:
    """The float model, one decoder layer at a time.

    Raises:
        OctavoError: config and weights disagree.
    """
    files = open_source(directory)
    config = load_source_config(directory)
    return LayerwiseModel(directory, config, files, device, architecture or architecture_of(config))


def load_tokenizer(directory: Path, arguments: dict[str, Any], trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        OctavoError: it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code, **arguments
        )
    except Exception as error:  # the library for tokenizers raises just that of a file that it cannot read
        lacks_trust = not trust_remote_code and "trust_remote_code" in str(error)
        way_out = f"; it has code of its own, which {named('trust_remote_code')} lets run" if lacks_trust else ""
        raise OctavoError(
            f"{named('model')} {directory}: its tokenizer cannot be loaded ({first_line(error)}){way_out}"
        ) from None
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise OctavoError(f"{directory}/tokenizer_config.json: model_max_length is no number; mend or remove it")
    if max(tokenizer.get_vocab().values(), default=0) >= MOST_SIZE:  # its library makes lists as long as that
        raise OctavoError(f"{named('model')} {directory}: its tokenizer has an id beyond {MOST_SIZE}; copy it again")
    return tokenizer


def check_device(device: str) -> None:
    """Raise an `OctavoError` if torch cannot compute on the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise OctavoError(f"{named('device')} cuda: torch sees no CUDA device; give cpu")
    if device == "npu":
        try:
            import torch_npu  # noqa: F401, its import registers the device
        except Exception as error:  # a torch_npu without its drivers raises what it likes
            raise OctavoError(f"{named('device')} npu: torch_npu cannot be imported ({error}); give cpu") from None
