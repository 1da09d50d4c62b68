"""The tokenizer of a checkpoint in a GGUF file: byte-level BPE, as Llama 3, Qwen and SmolLM have it."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import OctavoError
from ..source.checkpoint import load_tokenizer

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
PATTERNS = {
    f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2",
    f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
}
"""What llama.cpp calls a way of cutting text into words, by the pattern in tokenizer.json."""


def imported_gguf() -> ModuleType:
    """The package that GGUF files are written with.

    Raises:
        OctavoError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise OctavoError('--format gguf: needs the package gguf; install it by pip install "gguf>=0.19"') from None
    return gguf


def _cut(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """What llama.cpp calls the way in which a pre-tokenizer cuts text; None if it has none such."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return PATTERNS.get(parts[0].get("pattern", {}).get("Regex"))
    return None


def _of_normalizer(tokenizer: Any) -> list[str]:
    """What there is to say of a tokenizer that changes text before it cuts it, which llama.cpp does not.

    Raises:
        OctavoError: it changes more than how signs are composed.
    """
    kind = type(tokenizer.backend_tokenizer.normalizer).__name__
    if kind not in ("NoneType", "NFC"):
        raise OctavoError(
            f"--format gguf: the tokenizer normalizes text ({kind}), which llama.cpp does not for byte-level BPE; "
            "serve the directory itself, by models/*/run.py"
        )
    if kind == "NFC":
        return ["llama.cpp leaves NFC out, which the tokenizer makes of text: decomposed signs get other token ids"]
    return []


def add_tokenizer(writer: Any, directory: Path, count: int, trust_remote_code: bool) -> list[str]:
    """Put a tokenizer into a file: tokens, merges, special ones, and the chat template.

    Returns:
        what of it llama.cpp does otherwise, in lines.

    Args:
        writer: a `GGUFWriter`.
        directory: that holds tokenizer.json.
        count: of tokens that the model has rows for.

    Raises:
        OctavoError: it is of a kind that is not written.
    """
    gguf, file = imported_gguf(), directory / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model, cut = data.get("model") or {}, _cut(data.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or cut is None:
        raise OctavoError(
            f"--format gguf: {file} is no byte-level BPE as Llama 3, Qwen and SmolLM have it; convert the float model "
            "with llama.cpp's own script"
        )
    tokenizer = load_tokenizer(directory, {}, trust_remote_code)
    notes = _of_normalizer(tokenizer)
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {index: token.special for index, token in tokenizer.added_tokens_decoder.items()}
    tokens, types = [], []
    for index in range(count):
        tokens.append(names.get(index, f"[PAD{index}]"))
        kind = gguf.TokenType.NORMAL if index in names else gguf.TokenType.UNUSED
        if index in added:
            kind = gguf.TokenType.CONTROL if added[index] else gguf.TokenType.USER_DEFINED
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=count).add_to_gguf(writer, quiet=True)
    return notes
