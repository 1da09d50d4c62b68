"""The tokenizer of an output: what the source's is loaded from, shown to load to the same, and no code unasked."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import OctavoError, first_line
from ...runtime.checkpoint.files import read_json
from ..output.writer import write_json
from ..spelling import named
from .checkpoint import load_tokenizer
from .config import CODE_KEYS, LOAD_ERRORS, without_keys

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_DATA = (
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
)
"""Files that transformers, of this version or of one before, loads a tokenizer from; a class may name others."""
TEMPLATES = "additional_chat_templates"
COMPARED = (
    "special_tokens_map",
    "chat_template",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "model_input_names",
)


def _is_inside(file: Path, directory: Path) -> bool:
    """Whether a file lies in a checkpoint: in its directory, or where the hub's cache keeps a snapshot's files."""
    directory, target = directory.resolve(), file.resolve()
    homes = [directory]
    if directory.parent.name == "snapshots":
        homes.append(directory.parents[1] / "blobs")
    return any(home in target.parents for home in homes)


def _data_files(directory: Path, tokenizer: Any) -> list[Path]:
    """The files of a checkpoint that its tokenizer's data is in."""
    names = {*TOKENIZER_DATA, *(name for name in type(tokenizer).vocab_files_names.values() if name)}
    if (directory / TOKENIZER_CONFIG).is_file():
        versions = read_json(directory / TOKENIZER_CONFIG).get("fast_tokenizer_files")
        names |= set(map(str, versions)) if isinstance(versions, list) else set()
    files = [directory / name for name in sorted(names)] + sorted((directory / TEMPLATES).glob("*.jinja"))
    return [file for file in files if file.is_file() and file.suffix != ".py" and _is_inside(file, directory)]


def _without_code(directory: Path, keeps_own: bool) -> None:
    """Take references to code out of a tokenizer's config; its own class is kept if its code lies beside it."""
    file = directory / TOKENIZER_CONFIG
    if not file.is_file():
        return
    config = read_json(file)
    bare = without_keys(config, CODE_KEYS)
    own = config.get("auto_map")
    if keeps_own and isinstance(own, dict) and "AutoTokenizer" in own:
        bare["auto_map"] = {"AutoTokenizer": own["AutoTokenizer"]}
    if bare != config:
        write_json(file, bare)


def _backend(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


def _are_same(tokenizer: Any, other: Any, texts: Sequence[str]) -> bool:
    """Whether two tokenizers are of one kind and hold the same."""
    return (
        type(tokenizer).__name__ == type(other).__name__
        and tokenizer.get_vocab() == other.get_vocab()
        and all(getattr(tokenizer, name, None) == getattr(other, name, None) for name in COMPARED)
        and _backend(tokenizer) == _backend(other)
        and all(tokenizer(text)["input_ids"] == other(text)["input_ids"] for text in texts)
    )


def _loads_to(tokenizer: Any, directory: Path, trust_remote_code: bool, texts: Sequence[str]) -> bool:
    try:
        return _are_same(tokenizer, load_tokenizer(directory, {}, trust_remote_code), texts)
    except OctavoError:
        return False


def _copy(files: Iterable[Path], source: Path, target: Path) -> list[Path]:
    """Copy files to their place below another directory."""
    made = []
    for file in files:
        copied = target / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)
        made.append(copied)
    return made


def _remove(files: Iterable[Path], target: Path) -> None:
    """Take copied files back."""
    for file in files:
        file.unlink()
    if (target / TEMPLATES).is_dir():
        (target / TEMPLATES).rmdir()


def carry_tokenizer(directory: Path, target: Path, trust_remote_code: bool, texts: Sequence[str]) -> None:
    """Put the tokenizer of a checkpoint into an output, and see to it that it loads to the same there.

    Its files are copied as they are, so that readers other than this transformers find what they know. Where a
    tokenizer has code of its own, which `trust_remote_code` lets run, or does not load to the same from those files, it
    is saved by its own class. Otherwise no code gets into the output.

    Args:
        target: holds the output's config.json, which has a say in what a tokenizer is loaded as.
        texts: that both must make the same ids of.

    Raises:
        OctavoError: the tokenizer cannot be loaded, or does not load to the same from what it saves.
    """
    tokenizer = load_tokenizer(directory, {}, trust_remote_code)
    is_own = not type(tokenizer).__module__.startswith("transformers.")
    copied = _copy(_data_files(directory, tokenizer), directory, target)
    if not is_own:
        _without_code(target, keeps_own=False)
        if _loads_to(tokenizer, target, trust_remote_code, texts):
            return
        _remove(copied, target)
    try:
        tokenizer.save_pretrained(target)
    except (*LOAD_ERRORS, NotImplementedError) as error:
        raise OctavoError(
            f"{named('model')} {directory}: its tokenizer cannot be saved ({first_line(error)}); convert a copy that "
            "has a tokenizer.json"
        ) from None
    _without_code(target, keeps_own=is_own)
    if not _loads_to(tokenizer, target, trust_remote_code, texts):
        raise OctavoError(
            f"{named('model')} {directory}: its tokenizer, a {type(tokenizer).__name__}, does not load to the same "
            "from what it saves; convert a copy that has a tokenizer.json"
        )
