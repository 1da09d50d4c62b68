"""Every dialect that there is a writer for, by its name."""

import argparse

from ...errors import OctavoError
from ..request import OWN_FORMAT
from ..spelling import named
from ..targets import READERS, TRIED
from .awq import AWQ
from .compressed_tensors import COMPRESSED_TENSORS
from .dialect import NAMES, PARSED, RUN, Dialect, Engine
from .fastdeploy import FASTDEPLOY
from .gguf import GGUF
from .gptq import GPTQ
from .modelopt import MODELOPT
from .onnxruntime_genai import ONNXRUNTIME_GENAI
from .vllm_ascend_w4a8 import VLLM_ASCEND_W4A8

_WRITTEN = (COMPRESSED_TENSORS, AWQ, GPTQ, MODELOPT, GGUF, ONNXRUNTIME_GENAI, FASTDEPLOY, VLLM_ASCEND_W4A8)
DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in _WRITTEN}

_LEVELS = {"mindie": NAMES, "vllm-ascend-0.23": PARSED, "vllm-ascend": PARSED}
"""How far each target was tried."""


def _engine_of(target: str) -> Engine:
    """What an engine on Ascend reads, as `targets.py` says it."""
    known = READERS[target]
    caches = "C8 and FAQuant" if known.reads_fa else "C8"
    return Engine(
        known.name, TRIED[target], _LEVELS[target], f"{', '.join(known.labels)}; {caches}; with `--target {target}`"
    )


OWN_ENGINES = (
    Engine("Octavo, through transformers", "5.17 to 5.24", RUN, "everything"),
    *map(_engine_of, READERS),
    Engine(
        "msmodelslim",
        "26.1",
        NAMES,
        "nothing, but writes the same: what its quantizer, run on the CPU, makes of a model in W8A8, W8A8_DYNAMIC, "
        "W8A8_MIX, W8A16, C8 and FAQuant has our names, labels, dtypes (floats: the model's, ours float32) and shapes; "
        "in W4A16 its codes have another layout",
    ),
)
"""Readers of what a conversion writes itself, and the tool whose dialect it is."""
FORMATS = (OWN_FORMAT, *DIALECTS)
"""What `--format` may be."""
_CALLED = {
    "trtllm": "TensorRT-LLM", "llamacpp": "llama.cpp", "hf": "transformers", "huggingface": "transformers",
    "onnxruntime": "onnxruntime-genai", "ort": "onnxruntime-genai",
}  # fmt: skip
"""What engines are called, in letters and digits, beside their names."""


def format_named(name: str) -> str:
    """A value of `--format`, as it is.

    Raises:
        argparse.ArgumentTypeError: it is an engine's name; the message has the formats which that reads.
    """
    found = [] if name in FORMATS else formats_of(name)
    if found:
        raise argparse.ArgumentTypeError(f"{name} is an engine; give --format {' or '.join(found)}")
    return name


def formats_of(engine: str) -> list[str]:
    """The formats that an engine reads, however its name is written; none if it is none that is known."""
    readers = {OWN_FORMAT: OWN_ENGINES} | {name: dialect.engines for name, dialect in DIALECTS.items()}
    wanted = _plain(_CALLED.get(_plain(engine), engine))
    return [name for name, engines in readers.items() if wanted in {_plain(each.name) for each in engines}]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def dialect_of(name: str) -> Dialect:
    """The dialect of a name.

    Raises:
        OctavoError: there is none; the message lists those there are, or those that an engine of that name reads.
    """
    if name not in DIALECTS and (found := formats_of(name)):
        raise OctavoError(f"{named('format')} {name}: is an engine; give {' or '.join(found)}")
    if name not in DIALECTS:
        raise OctavoError(f"{named('format')} {name}: is none of {', '.join(DIALECTS)}")
    return DIALECTS[name]
