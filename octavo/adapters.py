"""`--adapter` of `octavo run`, `chat`, `serve` and `evaluate`: a LoRA adapter of PEFT on the model of a command."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .common.convert.source.checkpoint import ADAPTER_FILE, not_had
from .common.errors import OctavoError, first_line
from .common.runtime.adapters import ADAPTER_WEIGHTS, check_adapter_file


def find_adapter(adapter: str) -> Path:
    """The directory of an adapter: itself, or the snapshot of a hub id.

    Raises:
        OctavoError: there is none; PEFT is not installed.
    """
    if find_spec("peft") is None:
        raise OctavoError("--adapter: needs PEFT, which is not installed: pip install peft")
    directory = Path(adapter)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(adapter, allow_patterns=["adapter_*"]))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise OctavoError(f"--adapter {adapter}: no such directory, and {not_had('adapter', error)}") from None
    for name in (ADAPTER_FILE, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise OctavoError(f"--adapter {adapter}: holds no {name}; give what PEFT's save_pretrained wrote")
    return directory


def put_adapter(model: Any, adapter: str, directory: Path) -> None:
    """Put an adapter into a model, in place.

    Args:
        model: of transformers, or one of the zoo.
        adapter: as the user named it.
        directory: where `find_adapter` found it.

    Raises:
        OctavoError: it is of another model, or linears in codes do not bear it.
    """
    check_adapter_file(model, directory)
    try:
        info = model.load_adapter(str(directory))
    except OctavoError as error:
        raise OctavoError(f"--adapter {adapter}: {error}") from None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise OctavoError(f"--adapter {adapter}: cannot be loaded ({first_line(error)})") from None
    for problem in ("missing_keys", "unexpected_keys"):
        found = sorted(map(str, getattr(info, problem, ())))
        if found:
            raise OctavoError(f"--adapter {adapter}: {problem.replace('_', ' ')}: {found[0]}; it is of another model")
