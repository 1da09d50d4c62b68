"""Checkpoints in codes that are refused, and flags that would change codes, each in one line that says why."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from octavo import ConvertRequest, OctavoError, convert
from octavo.common.convert.api import main
from octavo.models.llama3 import ARCHITECTURE

from ....support import TEXTS, convert_flags, edit_json
from .coded_layouts import (
    AWQ,
    FLOAT_INPUTS,
    FP8,
    FP8_TOKEN,
    GPTQ,
    INT_TOKEN,
    PASSED,
    SMALL_BLOCKS,
    UNEVEN,
    WIDE,
    change_weights,
    refused,
)
from .coded_sources import (
    Coded,
    Layout,
    args,
    awq,
    ct_config,
    fp8,
    fp8_blocks,
    gptq,
    mixed,
    packed_ct,
    plain_ct,
    write_coded,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LEAVE = "(W4A16), which stay as they are; leave it out, or decode and quantize them again by --requantize"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--w_bit", "8"), "--quantization, --w_bit, --preset or another flag of linears: the linears of"),
        (("--quantization", "w4a16"), "--quantization, --w_bit, --preset or another flag of linears: the linears of"),
        (("--preset", "ascend"), "--quantization, --w_bit, --preset or another flag of linears: the linears of"),
        (("--anti_method", "m3"), "--anti_method m3: the linears of"),
        (("--disable_names", "*.down_proj"), "--disable_names: the linears of"),
        (("--disable_level", "L2"), "--disable_level: the linears of"),
        (("--disable_last_linear", "False"), "--disable_last_linear False: the linears of"),
    ],
)
def test_flags_that_would_change_codes(
    flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coded(tmp_path / "source", PASSED["awq"])
    line = refused(tmp_path / "source", tmp_path / "out", capsys, *flags)
    assert said in line and line.endswith(LEAVE)


@pytest.mark.parametrize("flags", [("--group_size", "64"), ("--w_sym", "False"), ("--w_bit", "4")])
def test_flags_that_do_not_fit_the_usual_linears(
    flags: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is said of the W8A8 that a float checkpoint would get."""
    write_coded(tmp_path / "source", PASSED["gptq"])
    with pytest.raises(SystemExit):
        main(ARCHITECTURE, convert_flags(tmp_path / "source", tmp_path / "out", *flags))
    line = capsys.readouterr().err.strip()
    assert (
        f"{flags[0]}: the linears of {tmp_path}/source are in codes already, which stay as they are; leave it" in line
    )
    assert "quantize them again by --requantize (--help" in line and "W8A8" not in line
    with pytest.raises(SystemExit):
        main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags))
    assert "in codes already" not in capsys.readouterr().err


def test_an_embedding_that_is_the_last_linear_in_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coded(tmp_path / "source", PASSED["awq"], head=True)
    assert "--embeddings int8: the linears" in refused(
        tmp_path / "source", tmp_path / "out", capsys, "--embeddings", "int8"
    )


def test_a_float_source_has_no_codes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no linear in codes; leave it out" in refused(source, tmp_path / "out", capsys, "--requantize")
    with pytest.raises(OctavoError, match=r"^requantize: model .* has no linear in codes"):
        convert(ConvertRequest(source, tmp_path / "out", requantize=True, calibration=TEXTS))


def test_inputs_that_are_quantized_anyway(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "--cpu_activations: W8A8 quantizes inputs on every device; leave it out"
    assert said in refused(source, tmp_path / "out", capsys, *FLOAT_INPUTS)
    write_coded(tmp_path / "source", PASSED["int-quantized, dynamic"])
    line = refused(tmp_path / "source", tmp_path / "out", capsys, *FLOAT_INPUTS)
    assert "--cpu_activations: W8A8_DYNAMIC quantizes inputs on every device; leave it out" in line


def test_nothing_is_said_before_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coded(tmp_path / "source", PASSED["awq"])
    with pytest.raises(OctavoError, match="float_outliers: the linears of"):
        convert(ConvertRequest(tmp_path / "source", tmp_path / "out", float_outliers=1))
    with pytest.raises(OctavoError, match="format modelopt: "):
        convert(ConvertRequest(tmp_path / "source", tmp_path / "out", format="modelopt", scheme="int8-token"))
    assert "calibrating" not in capsys.readouterr().err


def static_blocks(weight: torch.Tensor) -> Coded:
    coded = fp8_blocks(weight)
    coded.stored["input_scale"] = torch.tensor(0.05)
    return coded


BAD_INPUTS = args(8, "int", "token", symmetric=False, dynamic=True)
UNHELD: dict[str, tuple[Layout, str]] = {
    "uneven groups": (UNEVEN, "q_proj has groups of input channels (g_idx) that are not of one size; no kind"),
    "small blocks": (
        SMALL_BLOCKS, "q_proj is fp8 with a scale for each block of 48 x 48 weights, and blocks here are of 128 x 128",
    ),
    "blocks that a row does not fill": (
        Layout(fp8_blocks, FP8 | {"weight_block_size": [128, 128]}),
        "q_proj has 64 input channels, which blocks of 128 do not fill",
    ),
    "static blocks": (
        Layout(
            static_blocks, FP8 | {"weight_block_size": [128, 128]}, sizes=WIDE,
        ),
        "q_proj is fp8 in blocks with static inputs",
    ),
    "blocks, and inputs per token": (
        Layout(
            partial(fp8_blocks, name="weight_scale"),
            ct_config("float-quantized", args(8, "float", "block", block_structure=[128, 128]), FP8_TOKEN), sizes=WIDE,
        ),
        "q_proj is in blocks, and no fp8 with dynamic inputs in groups of 128",
    ),
    "groups of 16": (
        Layout(partial(packed_ct, group=16), ct_config("pack-quantized", args(4, "int", "group"))),
        "has groups of 16 of 64 input channels, which are no multiple of 32",
    ),
    "fp8 and float inputs": (
        Layout(fp8, ct_config("float-quantized", args(8, "float", "channel"))), "is fp8 with inputs in float",
    ),
    "inputs with zero points": (
        Layout(plain_ct, ct_config("int-quantized", args(8, "int", "channel"), BAD_INPUTS)),
        "has dynamic inputs with zero points",
    ),
    "inputs of 4 bits": (
        Layout(plain_ct, ct_config("int-quantized", args(8, "int", "channel"), INT_TOKEN | {"num_bits": 4})),
        "has inputs in int of 4 bits, token, dynamic True",
    ),
    "packed, and inputs": (
        Layout(packed_ct, ct_config("pack-quantized", args(4, "int", "group"), INT_TOKEN)),
        "has packed weights and quantized inputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNHELD)
def test_codes_that_no_kind_of_linear_holds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout, said = UNHELD[name]
    write_coded(tmp_path / "source", layout)
    line = refused(tmp_path / "source", tmp_path / "out", capsys)
    assert said in line
    assert line.endswith("--requantize decodes them and quantizes them again as --quantization says")


CT = ct_config("pack-quantized", args(4, "int", "group"))
CONFIGS: dict[str, tuple[Layout, str]] = {
    "another method": (Layout(awq, {"quant_method": "hqq"}), "is quantized already, by quant_method 'hqq'; Octavo"),
    "gemv": (Layout(awq, AWQ | {"version": "gemv"}), "awq in version 'gemv' and 4 bits; Octavo reads 'gemm'"),
    "marlin": (Layout(gptq, GPTQ | {"checkpoint_format": "marlin"}), "checkpoint_format is 'marlin'; Octavo reads"),
    "older marlin": (Layout(gptq, GPTQ | {"is_marlin_format": True}), "checkpoint_format is 'marlin'; Octavo reads"),
    "sparse": (Layout(packed_ct, CT | {"sparsity_config": {"format": "sparse-bitmask"}}), "reads dense weights only"),
    "rotated": (Layout(packed_ct, CT | {"transform_config": {"config_groups": {"R3": {}}}}), "transform_config rotat"),
    "not compressed": (Layout(packed_ct, CT | {"quantization_status": "frozen"}), "quantization_status is 'frozen'"),
    "outputs": (
        Layout(packed_ct, CT | {"config_groups": {"group_0": {"targets": [], "output_activations": INT_TOKEN}}}),
        "group_0 quantizes outputs of linears",
    ),
    "groups that are none": (
        Layout(packed_ct, CT | {"config_groups": ["group_0"]}), "quantization_config is none of compressed-tensors (",
    ),
    "no group": (Layout(packed_ct, CT | {"config_groups": {}}), "none of config_groups is for model.layers.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_not_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout, said = CONFIGS[name]
    write_coded(tmp_path / "source", layout)
    line = refused(tmp_path / "source", tmp_path / "out", capsys)
    assert said in line and "config.json" in line


UP = "model.layers.1.mlp.up_proj"
DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "awq without zeros": ("awq", lambda t: t.pop(f"{UP}.qzeros"), f"{UP} lacks one of qweight, qzeros, scales"),
    "awq of other widths": (
        "awq", lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:, :64].clone()}), "do not go together",
    ),
    "gptq of other widths": (
        "gptq", lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"][:48].clone()}), "do not go together",
    ),
    "gptq that is mixed and does not say so": (
        "gptq", lambda t: t[f"{UP}.g_idx"].copy_(mixed(64)), "g_idx mixes groups up, and config.json says desc_act",
    ),
    "groups beyond": ("gptq", lambda t: t[f"{UP}.g_idx"].fill_(9), "names groups beyond the 2 that there are"),
    "a zero of 16": ("gptq", lambda t: t[f"{UP}.qzeros"].fill_(-1), "holds a zero point of 16, which is no code of 4"),
    "a negative scale": ("awq", lambda t: t[f"{UP}.scales"].neg_(), "holds a scale that is negative, NaN or Inf"),
    "fp8 without scales": ("fp8", lambda t: t.pop(f"{UP}.weight_scale"), "has no weight_scale_inv and no weight_scale"),
    "fp8 NaN": (
        "fp8", lambda t: t[f"{UP}.weight"].view(torch.uint8)[0].fill_(0x7F), f"{UP}.weight holds NaN or Inf",
    ),
    "packed of another width": (
        "pack-quantized", lambda t: t[f"{UP}.weight_shape"].add_(32), f"{UP}.weight_packed is not 4 bits of the",
    ),
    "scales in integers": (
        "gptq", lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].to(torch.int32)}),
        f"{UP}.scales is stored as I32, and not as F32 or F16 or BF16",
    ),
    "words in bytes": (
        "awq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].to(torch.int8)}),
        f"{UP}.qweight is stored as I8, and not as I32",
    ),
    "static without scales": (
        "int-quantized, static", lambda t: t.pop(f"{UP}.input_scale"), "has static inputs and no input_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_codes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout, change, said = DAMAGES[name]
    write_coded(tmp_path / "source", PASSED[layout])
    change_weights(tmp_path / "source", change)
    assert said in refused(tmp_path / "source", tmp_path / "out", capsys)


def test_codes_that_are_of_no_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coded(tmp_path / "source", PASSED["fp8"])
    name = "model.embed_tokens.weight"
    change_weights(tmp_path / "source", lambda t: t.update(
        {name: t[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    ))  # fmt: skip
    assert f"{name} is in codes, and of no linear" in refused(tmp_path / "source", tmp_path / "out", capsys)


def test_a_config_in_name_only(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source, tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", quantization_config={"quant_method": "gptq"})
    line = refused(tmp_path / "source", tmp_path / "out", capsys)
    assert "quantization_config says gptq, and no linear is in codes; remove it" in line
