"""What SmolLM3 has that no other architecture has: layers without RoPE, whose keys are not those of rotary pairs."""

from pathlib import Path

import pytest
import torch

from octavo.common.convert.calibration.observe import calibrate
from octavo.common.doctor.report import diagnose
from octavo.common.errors import OctavoError
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.static_scales import scales_of

from ..support import edit_json, random_ids, save_source
from .test_architectures import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_statistics_of_layers_without_rope_are_by_channel() -> None:
    model = KINDS["smollm3"].build()
    assert model.config.no_rope_layers == [1, 0, 1]
    keys: list[torch.Tensor] = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *call: keys.append(call[2]))
    found = calibrate(model, [], [{"input_ids": random_ids(1, 60)}])
    hook.remove()
    shapes = [tuple(found.tensors[f"layers.{index}.k.radius"].shape) for index in range(3)]
    assert shapes == [(2, 8), (2, 16), (2, 8)]
    largest = keys[0].abs().amax(dim=(0, 1)).view(2, 16)
    torch.testing.assert_close(found.tensors["layers.1.k.radius"], largest)
    assert "layers.0.k.folded.radius" in found.tensors and "layers.1.k.folded.radius" not in found.tensors
    scale, _ = scales_of(load_scheme("ascend-c8"), found)[1].key
    torch.testing.assert_close(scale[:, 0], largest / 127)


def test_statistics_are_of_the_layers_that_a_config_leaves_without_rope() -> None:
    model = KINDS["smollm3"].build()
    found = calibrate(model, [], [{"input_ids": random_ids(1, 20)}])
    found.check_model(model.config)
    model.config.no_rope_layers = [1, 1, 0]
    with pytest.raises(OctavoError, match=r"layers\.1\.[qk]\.radius is of shape"):
        found.check_model(model.config)


def test_the_doctor_knows_that_their_bias_stays(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", KINDS["smollm3"].build())
    assert not diagnose(str(source))["facts"]["bias_can_be_folded"]
    edit_json(source / "config.json", no_rope_layers=[1, 1, 1])
    assert diagnose(str(source))["facts"]["bias_can_be_folded"]
