"""The float checkpoint that is converted: found, checked and loaded."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .architecture import Architecture
from .checkpoints.ascend import DESCRIPTION_FILE, TensorHeader, read_headers, read_json
from .checkpoints.shards import TensorFiles
from .errors import OctavoError, first_line
from .layerwise import LayerwiseModel

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_source(model_path: str) -> Path:
    """The directory of a checkpoint: `model_path` itself, or the snapshot of a hub id, fetched if need be.

    Raises:
        OctavoError: it is no directory and no hub id that can be had.
    """
    if Path(model_path).is_dir():
        return Path(model_path)
    if Path(model_path).exists():
        raise OctavoError(f"--model_path {model_path}: is a file; give the directory that holds config.json")
    if model_path.count("/") > 1 or model_path.startswith((".", "/", "~")):
        raise OctavoError(f"--model_path {model_path}: no such directory")
    try:
        return Path(snapshot_download(model_path, allow_patterns=list(PATTERNS)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise OctavoError(
            f"--model_path {model_path}: no such directory, and no hub model ({first_line(error)})"
        ) from None


def read_source_config(directory: Path, architecture: Architecture) -> dict[str, Any]:
    """The config.json of a float checkpoint of this architecture.

    Raises:
        OctavoError: there is none, it is another architecture's, or the checkpoint is quantized already.
    """
    if not (directory / "config.json").is_file():
        raise OctavoError(f"--model_path {directory}: holds no config.json, so it is no Hugging Face checkpoint")
    config = read_json(directory / "config.json")
    if config.get("model_type") != architecture.model_type:
        raise OctavoError(
            f"{directory}/config.json: model_type is {config.get('model_type')!r}; models/{architecture.name} converts "
            f"{architecture.model_type!r}"
        )
    if "quantization_config" in config or (directory / DESCRIPTION_FILE).exists():
        raise OctavoError(f"--model_path {directory}: is quantized already; give the float checkpoint")
    return config


def source_files(directory: Path) -> list[Path]:
    """The safetensors files of a float checkpoint: those that its index lists, or all there are.

    Raises:
        OctavoError: there are none, or a listed one is missing.
    """
    index = directory / INDEX_FILE
    if not index.is_file():
        files = sorted(directory.glob("model*.safetensors"))
    else:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise OctavoError(f"{index}: maps no tensors to files; copy the checkpoint again")
        files = [directory / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise OctavoError(f"--model_path {directory}: {file.name} is missing; copy the checkpoint again")
    if not files:
        raise OctavoError(f"--model_path {directory}: holds no model*.safetensors; save the model as safetensors first")
    return files


def read_source_headers(directory: Path) -> dict[str, TensorHeader]:
    """Dtype and shape of every tensor of a float checkpoint.

    Raises:
        OctavoError: there are no safetensors files, one is damaged, or a tensor is of another dtype than float.
    """
    headers = read_headers(source_files(directory))
    for name, header in headers.items():
        if header.dtype not in FLOAT_DTYPES:
            raise OctavoError(
                f"--model_path {directory}: {name} is {header.dtype}; give a checkpoint in fp32, fp16 or bf16"
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
        raise OctavoError(f"--model_path {directory}: does not fit on the devices as a whole, which codebooks need")


def load_source(directory: Path, device: str) -> nn.Module:
    """The whole float model in memory: fp32 on the CPU, its own dtype elsewhere, over several devices if there are.

    Raises:
        OctavoError: config and weights disagree, a weight is NaN or Inf, or several devices do not hold the model.
    """
    dtype = torch.float32 if device == "cpu" else "auto"
    device_map = _device_map(device)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, StrictDataclassError) as error:
        raise OctavoError(f"--model_path {directory}: cannot be loaded ({first_line(error)})") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            first = sorted(map(str, info[problem]))[0]
            raise OctavoError(
                f"--model_path {directory}: {problem.replace('_', ' ')}: {first}; the checkpoint is not whole"
            )
    if device_map:
        _check_spread(model, directory)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise OctavoError(f"--model_path {directory}: {name} holds NaN or Inf; the checkpoint is damaged")
    return model.eval() if device_map else model.eval().to(device)


def layerwise_source(directory: Path, device: str) -> LayerwiseModel:
    """The float model, one decoder layer at a time.

    Raises:
        OctavoError: config and weights disagree.
    """
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, StrictDataclassError) as error:
        raise OctavoError(f"--model_path {directory}: cannot be loaded ({first_line(error)})") from None
    return LayerwiseModel(directory, config, TensorFiles(source_files(directory)), device)


def load_tokenizer(directory: Path, arguments: dict[str, Any], trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        OctavoError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code, **arguments
        )
    except (OSError, ValueError, TypeError, ImportError, KeyError, AttributeError, StrictDataclassError) as error:
        raise OctavoError(f"--model_path {directory}: its tokenizer cannot be loaded ({first_line(error)})") from None


def check_device(device: str) -> None:
    """Raise an `OctavoError` if torch cannot compute on the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise OctavoError("--device_type cuda: torch sees no CUDA device; give cpu")
    if device == "npu":
        try:
            import torch_npu  # noqa: F401, its import registers the device
        except Exception as error:  # a torch_npu without its drivers raises what it likes
            raise OctavoError(f"--device_type npu: torch_npu cannot be imported ({error}); give cpu") from None
