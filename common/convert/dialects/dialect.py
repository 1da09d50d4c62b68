"""What a dialect is: a name, what it cannot say, a writer, the command that serves what it wrote, and who reads it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...runtime.checkpoint.loading import CONFIG_KEY
from ..output.writer import write_json
from ..source.config import CODE_KEYS, GENERATION_FILE, carried_generation_config, without_keys
from ..source.tokenizer import carry_tokenizer
from .directory import OctavoDirectory
from .form import Form

RUN, PARSED, NAMES = "run", "parsed", "names"
"""How far a reader was tried: it generated from what is written here; its own code read config and names; or names,
dtypes and shapes are compared with what its source or its documents say."""


@dataclass(frozen=True)
class Engine:
    """A reader of a dialect.

    Attributes:
        name: of the engine.
        versions: those that the statement holds for.
        level: `RUN`, `PARSED` or `NAMES`.
        reads: what of the dialect it reads, in a few words.
        beware: what it does otherwise than it says; "" if nothing is known.
    """

    name: str
    versions: str
    level: str
    reads: str
    beware: str = ""


@dataclass(frozen=True)
class Target:
    """Where a dialect writes.

    Attributes:
        path: a directory that is still empty, and becomes the output once everything is in it.
        place: what it will be called then.
        most_bytes: of a file of tensors; None puts all of them into one.
        trust_remote_code: whether code of the tokenizer may run.
    """

    path: Path
    place: Path
    most_bytes: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Dialect:
    """A way of writing a quantized checkpoint.

    Attributes:
        name: as `--format` has it.
        about: what it is, for help and documents.
        engines: its readers.
        check: from a form, why it cannot be written, each with the nearest thing that can; nothing where it can.
        write: fills a target; returns what the user has to know of it, in lines.
        serve: from a form and the output's place, the commands that serve it, in lines.
    """

    name: str
    about: str
    engines: tuple[Engine, ...]
    check: Callable[[Form], Iterator[str]]
    write: Callable[[OctavoDirectory, Target], list[str]]
    serve: Callable[[Form, Path], list[str]]


def native_settings(directory: OctavoDirectory) -> dict[str, Any]:
    """The config.json of a directory as that of transformers' own class: nothing of Octavo's, no code."""
    settings = without_keys(directory.settings, CODE_KEYS)
    for key in (CONFIG_KEY, "transformers_weights"):
        settings.pop(key, None)
    return {**settings, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[directory.form.config.model_type]]}


def write_texts(directory: OctavoDirectory, target: Target, settings: dict[str, Any]) -> None:
    """config.json, the tokenizer and the config of generation."""
    write_json(target.path / "config.json", settings)
    carry_tokenizer(directory.path, target.path, target.trust_remote_code, ())
    generation = carried_generation_config(directory.path)
    if generation is not None:
        write_json(target.path / GENERATION_FILE, generation)
