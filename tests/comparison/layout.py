"""What the tree writes beside figures, kept in layout.json: names, labels, dtypes and shapes, and what configs say."""

import json
from pathlib import Path
from typing import Any

from .record import Record

LAYOUT_FILE = Path(__file__).with_name("layout.json")
LAID_OUT = (
    "c8, head in int8",
    "fa of qwen3",
    "c8 of qwen2 bf16 tied",
    "fa of mistral",
    "anti_method m2",
    "w4a16 in groups of 128",
    "w8a8_mixed of llama",
    "wfp8afp8 of llama",
    "recipe balanced",
    "scheme kvquant-2 of qwen2",
    "a scheme of one's own",
    "several files",
)
"""Conversions that layout.json holds."""
_DESCRIPTION = "quant_model_description.json"
_CONFIG = (
    "architectures", "auto_map", "octavo", "transformers_weights", "tie_word_embeddings", "torch_dtype", "rope_theta",
)  # fmt: skip
"""What a conversion sets in config.json; the rest is the source's and differs between versions of transformers."""


def _of_conversion(made: dict[str, Any]) -> dict[str, Any]:
    description = made["files"][_DESCRIPTION]
    config = made["files"]["config.json"]
    tensors = {
        name: f"{description.get(name)} {tensor['dtype']} {tensor['shape']}" for name, tensor in made["tensors"].items()
    }
    return {
        "files": sorted(made["files"]),
        "config": {name: config[name] for name in _CONFIG if name in config},
        "description without tensor": {name: v for name, v in description.items() if name not in made["tensors"]},
        "tensors": dict(sorted(tensors.items())),
        "statistics": {name: f"{t['dtype']} {t['shape']}" for name, t in sorted(made["statistics"].items())},
    }


def layout_of(record: Record) -> dict[str, Any]:
    """The layout of each conversion of a record that wrote something."""
    return {name: _of_conversion(made) for name, made in record["conversions"].items() if "files" in made}


def layout_text(record: Record) -> str:
    """The same as layout.json holds it: a line for each tensor."""
    return json.dumps(layout_of(record), indent=0) + "\n"
