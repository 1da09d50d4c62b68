"""A process that cannot import Octavo and loads what conversions wrote: `python -m tests.comparison.loads IN OUT`."""

import json
import sys
from pathlib import Path

sys.modules["octavo"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, logging  # noqa: E402

from .logits import Model, logits_of  # noqa: E402


def _load(directory: str) -> Model:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model, dict  # its own cache


def main(task: Path, answer: Path) -> None:
    """Write the digests of logits of each directory of the task."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    directories = json.loads(task.read_text(encoding="utf-8"))
    found = {name: logits_of(lambda path=path: _load(path)) for name, path in directories.items()}
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
