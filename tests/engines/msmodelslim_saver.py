"""msmodelslim's newer saver, of which single functions are run on linears of ours."""

import json
import types
from pathlib import Path
from typing import Any

import torch
from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import AscendV1Saver
from safetensors.torch import load_file, save_file

GIVEN = ("weight", "weight_scale", "weight_offset", "input_scale", "input_offset", "bias")


class Saver:
    """What a function of the saver asks of it."""

    def __init__(self, is_bfloat16: bool) -> None:
        self._global_torch_dtype_is_bf16 = is_bfloat16
        self.tensors: dict[str, torch.Tensor] = {}
        self.labels: dict[str, str] = {}

    def update_quant_type(self, label: str) -> None:
        """Which label the whole has."""

    def write_tensor(self, name: str, label: str, tensor: torch.Tensor) -> None:
        """Keep a tensor and its label."""
        self.tensors[name], self.labels[name] = tensor.contiguous(), label


def module_of(tensors: dict[str, torch.Tensor], linear: str, kind: str) -> Any:
    """A linear as the saver is given it: scales of inputs are `[1]`, of channels `[N]`, of groups `[N, K / G]`."""
    parts = {part: tensors.get(f"{linear}.{part}") for part in GIVEN}
    if not kind.endswith("group"):
        parts |= {part: parts[part][:, 0] for part in ("weight_scale", "weight_offset")}
    groups = tensors[f"{linear}.weight_scale"].shape[1]
    return types.SimpleNamespace(**parts, group_size=parts["weight"].shape[1] // groups)


def save(directory: Path, kind: str, out: Path) -> None:
    """Run a function of the saver, `AscendV1Saver.on_KIND`, on the codes, scales and zero points of every linear.

    OUT gets the tensors that it makes of them, and OUT.json their labels.
    """
    (file,) = directory.glob("quant_model_weight_*.safetensors")
    tensors = load_file(file)
    config = json.loads((directory / "config.json").read_text())
    saver = Saver(config["dtype"] == "bfloat16")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        linear = name.removesuffix(".weight")
        getattr(AscendV1Saver, f"on_{kind}")(saver, linear, module_of(tensors, linear, kind))
    save_file(saver.tensors, out)
    Path(f"{out}.json").write_text(json.dumps(saver.labels))
