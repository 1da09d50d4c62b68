"""Where the whole float model is put; no machine of several devices is needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo.common.convert.source import checkpoint as source
from octavo.common.convert.source.checkpoint import load_source
from octavo.common.errors import OctavoError

from ....support import save_source, tiny_llama


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices to which modules are moved, without moving them."""
    found: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: found.append(device) or module)
    return found


def spread(monkeypatch: pytest.MonkeyPatch, devices: int, has_accelerate: bool, placed: dict[str, Any]) -> list[Any]:
    """A machine with so many GPUs, on which accelerate places modules as told; the device maps that loads ask for."""
    asked = []
    load = AutoModelForCausalLM.from_pretrained

    def on_cpu(*args: Any, device_map: str | None, **kwargs: Any) -> Any:
        asked.append(device_map)
        model, info = load(*args, **kwargs)
        model.hf_device_map = placed
        return model, info

    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(source, "find_spec", lambda name: object() if has_accelerate else None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", on_cpu)
    return asked


@pytest.mark.parametrize(
    ("device", "devices", "has_accelerate", "expected"),
    [("cuda", 2, True, "auto"), ("cuda", 1, True, None), ("cuda", 2, False, None), ("cpu", 2, True, None)],
)
def test_accelerate_spreads_a_model_over_several_devices(
    device: str,
    devices: int,
    has_accelerate: bool,
    expected: str | None,
    moves: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = save_source(tmp_path / "tiny", tiny_llama())
    asked = spread(monkeypatch, devices, has_accelerate, {"": 0})
    load_source(directory, device)
    assert asked == [expected] and moves == ([] if expected else [device])


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_that_the_devices_cannot_hold_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_source(tmp_path / "tiny", tiny_llama())
    spread(monkeypatch, 2, True, {"model.embed_tokens": 0, "model.layers.0": place})
    with pytest.raises(OctavoError, match="does not fit on the devices"):
        load_source(directory, "cuda")
