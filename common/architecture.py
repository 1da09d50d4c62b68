"""What the shared scripts need to know of an architecture; each `models/` folder states one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[1]


def down_and_head(config: Any, dtype: torch.dtype) -> list[str]:
    """The recipe of MindIE-LLM (qwen/convert_quant_weights_72b.py) and msmodelslim for static W8A8, for most models."""
    return ["*.mlp.down_proj", "lm_head"]


@dataclass(frozen=True)
class Architecture:
    """One architecture of the zoo.

    Attributes:
        name: folder under `models/`.
        model_type: as in the config.json of the checkpoints it converts.
        model_class: the quantized model class, in `models/{name}/{module}.py`.
        float_linears: from a config and the dtype of the checkpoint, globs of the linear layers that the recipe leaves
            in float.
    """

    name: str
    model_type: str
    model_class: type
    float_linears: Callable[[Any, torch.dtype], list[str]] = down_and_head

    @property
    def module(self) -> str:
        """Name of the modeling file, without `.py`."""
        return self.model_class.__module__.rpartition(".")[2]

    @property
    def source(self) -> Path:
        """The modeling file in this tree."""
        return REPOSITORY / "models" / self.name / f"{self.module}.py"

    @property
    def auto_map(self) -> dict[str, str]:
        """What makes transformers load the modeling file that lies beside the weights."""
        return {"AutoModelForCausalLM": f"{self.module}.{self.model_class.__name__}"}
