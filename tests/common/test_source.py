"""Where the whole float model is put; no machine of several devices is needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo.common import source
from octavo.common.source import load_source

from ..support import save_source, tiny_llama


@pytest.mark.parametrize(
    ("devices", "has_accelerate", "expected"),
    [(2, True, "auto"), (1, True, None), (2, False, None)],
)
def test_accelerate_spreads_a_model_over_several_devices(
    devices: int, has_accelerate: bool, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}
    load = AutoModelForCausalLM.from_pretrained

    def on_cpu(*args: Any, device_map: str | None, **kwargs: Any) -> Any:
        given["device_map"] = device_map
        return load(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(source, "find_spec", lambda name: object() if has_accelerate else None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", on_cpu)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    load_source(save_source(tmp_path / "tiny", tiny_llama()), "cuda")
    assert given["device_map"] == expected
