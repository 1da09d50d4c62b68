"""Files of a checkpoint: JSON, and what the headers of safetensors say of the tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...errors import OctavoError
from ..strict_json import parse_json


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of a tensor without reading it: dtype as spelled there ("I8", "F32"), and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_json(file: Path, is_strict: bool = False) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Args:
        file: its path.
        is_strict: see `parse_json`.

    Raises:
        OctavoError: unreadable, or no object.
    """
    try:
        data = parse_json(file.read_text(encoding="utf-8"), is_strict)
    except (OSError, ValueError) as error:
        raise OctavoError(f"{file}: cannot be read ({error}); copy it again or convert the model again") from None
    if not isinstance(data, dict):
        raise OctavoError(f"{file}: is no JSON object; copy it again or convert the model again")
    return data


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Dtype and shape of every tensor in some safetensors files, without reading the tensors.

    Raises:
        OctavoError: a file is missing, truncated or no safetensors file.
    """
    headers = {}
    for file in files:
        try:
            # torch maps files copy-on-write, which fails for one larger than memory
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    part = opened.get_slice(name)
                    headers[name] = TensorHeader(part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise OctavoError(f"{file}: is truncated or damaged ({error}); copy it again or convert again") from None
    return headers
