"""Checkpoints in codes of every layout that is read, and what the tests of them do: convert, load, damage."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.common.convert.api import main
from octavo.models.llama3 import ARCHITECTURE

from ....support import assert_one_error_line, convert_flags, files_below
from .coded_sources import (
    Layout,
    args,
    awq,
    ct_config,
    fp8,
    fp8_blocks,
    gptq,
    mixed,
    packed_ct,
    packed_in_order,
    plain_ct,
    uneven,
)

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
SECOND = GPTQ | {"checkpoint_format": "gptq_v2"}
INPUTS = {"input_scale": torch.tensor([0.05]), "input_zero_point": torch.tensor([-7], dtype=torch.int8)}
TOKEN = {"strategy": "token", "dynamic": True}
INT_TOKEN, FP8_TOKEN = (args(8, kind, **TOKEN) for kind in ("int", "float"))
FP8_GROUP = args(8, "float", "group", dynamic=True) | {"group_size": 128}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
WIDE = {
    "hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 2, "initializer_range": 0.05,
}  # fmt: skip
"""Sizes that blocks of 128 x 128 fit."""
FLOAT_INPUTS = ("--cpu_activations", "float")
PASSED: dict[str, Layout] = {
    "awq": Layout(awq, AWQ, "W4A16", FLOAT_INPUTS),
    "gptq": Layout(gptq, GPTQ, "W4A16", FLOAT_INPUTS),
    "gptq with zeros": Layout(partial(gptq, symmetric=False), GPTQ | {"sym": False}, "W4A16", FLOAT_INPUTS),
    "gptq v2": Layout(partial(gptq, symmetric=False, less=0), SECOND, "W4A16", FLOAT_INPUTS),
    "gptq of 8 bits": Layout(partial(gptq, bits=8), GPTQ | {"bits": 8}, "W8A16", FLOAT_INPUTS),
    "gptq of 3 bits": Layout(partial(gptq, bits=3, symmetric=False), GPTQ | {"bits": 3}, "W4A16", FLOAT_INPUTS),
    "gptq of 2 bits": Layout(partial(gptq, bits=2, symmetric=False), GPTQ | {"bits": 2}, "W4A16", FLOAT_INPUTS),
    "pack-quantized": Layout(packed_ct, ct_config("pack-quantized", args(4, "int", "group")), "W4A16", FLOAT_INPUTS),
    "pack-quantized with zeros": Layout(
        partial(packed_ct, symmetric=False), ct_config("pack-quantized", args(4, "int", "group", False)), "W4A16",
        FLOAT_INPUTS,
    ),
    "pack-quantized of 8 bits": Layout(
        partial(packed_ct, bits=8, group=0), ct_config("pack-quantized", args(8, "int", "channel")), "W8A16",
        FLOAT_INPUTS,
    ),
    "int-quantized, dynamic": Layout(
        plain_ct, ct_config("int-quantized", args(8, "int", "channel"), INT_TOKEN), "W8A8_DYNAMIC"
    ),
    "int-quantized, static": Layout(
        partial(plain_ct, inputs=INPUTS),
        ct_config("int-quantized", args(8, "int", "channel"), args(8, "int", "tensor", symmetric=False)), "W8A8",
    ),
    "float-quantized, dynamic": Layout(
        fp8, ct_config("float-quantized", args(8, "float", "channel"), FP8_TOKEN), "WFP8AFP8_DYNAMIC"
    ),
    "float-quantized, static": Layout(
        partial(fp8, per_tensor=True, input_scale=torch.tensor(0.02)),
        ct_config("float-quantized", args(8, "float", "tensor"), args(8, "float", "tensor")), "WFP8AFP8",
    ),
    "fp8": Layout(
        partial(fp8, per_tensor=True), {"quant_method": "fp8", "activation_scheme": "dynamic"}, "WFP8AFP8_DYNAMIC"
    ),
    "fp8 per channel": Layout(partial(fp8, name="weight_scale_inv"), FP8, "WFP8AFP8_DYNAMIC"),
    "gptq, act-order": Layout(partial(gptq, order=mixed), GPTQ | {"desc_act": True}, "W4A16_ORDERED", FLOAT_INPUTS),
    "gptq of 8 bits, act-order": Layout(
        partial(gptq, bits=8, symmetric=False, order=mixed), GPTQ | {"bits": 8, "desc_act": True}, "W8A16_ORDERED",
        FLOAT_INPUTS,
    ),
    "pack-quantized, act-order": Layout(
        packed_in_order, ct_config("pack-quantized", args(4, "int", "group", actorder="group")), "W4A16_ORDERED",
        FLOAT_INPUTS,
    ),
    "fp8 in blocks": Layout(
        fp8_blocks, FP8 | {"weight_block_size": [128, 128]}, "WFP8AFP8_BLOCK", sizes=WIDE,
    ),
    "float-quantized in blocks": Layout(
        partial(fp8_blocks, name="weight_scale"),
        ct_config("float-quantized", args(8, "float", "block", block_structure=[128, 128]), FP8_GROUP),
        "WFP8AFP8_BLOCK", sizes=WIDE,
    ),
}  # fmt: skip
UNEVEN = Layout(partial(gptq, order=uneven), GPTQ | {"desc_act": True})
SMALL_BLOCKS = Layout(partial(fp8_blocks, block=48), FP8 | {"weight_block_size": [48, 48]})


def loaded(directory: Path) -> torch.nn.Module:
    return ARCHITECTURE.model_class.from_pretrained(directory, dtype=torch.float32).eval()


def converted(source: Path, target: Path, *flags: str) -> Path:
    assert main(ARCHITECTURE, convert_flags(source, target, *flags)) == 0
    return target


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refused(source: Path, target: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The line that a conversion ends with, which leaves nothing behind."""
    before = files_below(target.parent)
    assert main(ARCHITECTURE, convert_flags(source, target, *flags)) == 1
    captured = capsys.readouterr().err
    assert_one_error_line(captured)
    assert files_below(target.parent) == before
    return captured.strip().splitlines()[-1]
