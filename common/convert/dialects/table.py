"""Every dialect that there is a writer for, by its name."""

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
)
"""Readers of what a conversion writes itself."""
FORMATS = (OWN_FORMAT, *DIALECTS)
"""What `--format` may be."""


def dialect_of(name: str) -> Dialect:
    """The dialect of a name.

    Raises:
        OctavoError: there is none; the message lists those there are.
    """
    if name not in DIALECTS:
        raise OctavoError(f"{named('format')} {name}: is none of {', '.join(DIALECTS)}")
    return DIALECTS[name]
