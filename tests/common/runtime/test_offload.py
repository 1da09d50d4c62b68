"""Models of which accelerate moves parts in and out: the same logits and tokens, and what it cannot move is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.common.convert import api as conversion
from octavo.common.errors import OctavoError
from octavo.common.runtime import offload
from octavo.common.runtime.bias_fold import RotaryTable
from octavo.common.runtime.passes import whole_passes
from octavo.models.llama3 import ARCHITECTURE

from ...support import convert_flags, random_ids, save_source, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = random_ids(2, 12)
MAP = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip
KINDS = {
    "ascend-c8": ("--quantization", "w8a8_dynamic", "--scheme", "ascend-c8"),
    "ascend-fa": ("--quantization", "w4a16", "--group_size", "32", "--scheme", "ascend-fa"),
    "of its own": ("--quantization", "w8a8", "--scheme", "vllm-fp8-head"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`directory(*flags)`: a tiny Llama converted with these flags."""
    root = tmp_path_factory.mktemp("offload")
    source = save_source(root / "source", tiny_llama())

    def convert(*flags: str) -> Path:
        target = root / "-".join(flags)
        if not target.exists():
            assert conversion.main(ARCHITECTURE, convert_flags(source, target, *flags)) == 0
        return target

    return convert


def loaded(directory: Path, **arguments: Any) -> torch.nn.Module:
    return ARCHITECTURE.model_class.from_pretrained(directory, **arguments).eval()


@pytest.mark.parametrize("takes_codes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_layers_on_disk_compute_what_layers_in_memory_do(
    kind: str, takes_codes: bool, directory: Callable[..., Path], tmp_path: Path
) -> None:
    source = directory(*KINDS[kind])
    model = loaded(source)
    away = loaded(source, device_map=MAP, offload_folder=tmp_path, offload_buffers=takes_codes)
    layer = away.model.layers[1]
    for _ in range(2):  # what was made in the first pass is of no use in the next
        with whole_passes(model.base_model):
            expected = model(IDS).logits
        torch.testing.assert_close(away(IDS).logits, expected, rtol=0, atol=1e-4)
    assert layer.input_layernorm.weight.is_meta
    assert any(part.is_meta for part in layer.mlp.up_proj.buffers()) == takes_codes
    tokens = away.generate(IDS, max_new_tokens=6, do_sample=False)
    with whole_passes(model.base_model):
        assert torch.equal(tokens, model.generate(IDS, max_new_tokens=6, do_sample=False))


@torch.inference_mode()
def test_a_map_to_one_device_changes_nothing(directory: Callable[..., Path]) -> None:
    source = directory(*KINDS["ascend-c8"])
    expected = loaded(source)(IDS).logits
    for device_map in ("auto", {"": "cpu"}):
        assert torch.equal(loaded(source, device_map=device_map)(IDS).logits, expected)


def test_an_embedding_that_is_taken_away_is_no_last_linear(tmp_path: Path) -> None:
    source, target = save_source(tmp_path / "source", tiny_llama(tie_word_embeddings=True)), tmp_path / "converted"
    flags = convert_flags(source, target, "--quantization", "w8a8_dynamic", "--embeddings", "int8")
    assert conversion.main(ARCHITECTURE, flags) == 0
    away = {**MAP, "model.embed_tokens": "disk"}
    with pytest.raises(OctavoError, match="lm_head is the embedding as well, in codes that are not in memory"):
        loaded(target, device_map=away, offload_folder=tmp_path / "away", offload_buffers=True)


def test_a_missing_accelerate_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "find_spec", lambda name: None)
    with pytest.raises(OctavoError, match="device_map needs accelerate, which is not installed: pip install"):
        loaded(source, device_map="auto")
    assert loaded(source).device.type == "cpu"


def test_angles_are_kept_for_each_device() -> None:
    """Meta stands for a second device, which there is not here."""
    made = []

    def rotary(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(x.device.type)
        return torch.zeros(1, positions.shape[1], 8), torch.zeros(1, positions.shape[1], 8)  # where the rotary lies

    table = RotaryTable(rotary)
    for _ in range(2):
        for device in (torch.device("cpu"), torch.device("meta")):
            assert table.rows(10, device).device == device
    assert made == ["cpu", "meta"]
