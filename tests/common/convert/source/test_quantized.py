"""Checkpoints whose linears are in codes already, as sources: the codes stay, and the rest is calibrated on them."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import ConvertRequest, LinearScheme, OctavoError, convert
from octavo.common.convert.api import main
from octavo.common.convert.source.checkpoint import layerwise_source
from octavo.models import qwen3_moe
from octavo.models.llama3 import ARCHITECTURE
from octavo.ops.shared.codes import unpack_int4

from ....models.test_qwen3_moe import tiny_moe
from ....support import (
    TEXTS,
    assert_one_error_line,
    convert_flags,
    edit_json,
    files_below,
    quantized_tensors,
    random_ids,
    save_source,
)
from ....tolerances import TOLERANCES
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
    plain_ct,
    write_coded,
)

pytestmark = pytest.mark.usefixtures("one_thread")

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
SECOND = GPTQ | {"checkpoint_format": "gptq_v2"}
INPUTS = {"input_scale": torch.tensor([0.05]), "input_zero_point": torch.tensor([-7], dtype=torch.int8)}
TOKEN = {"strategy": "token", "dynamic": True}
INT_TOKEN, FP8_TOKEN = (args(8, kind, **TOKEN) for kind in ("int", "float"))
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
}  # fmt: skip
ACT_ORDER = Layout(partial(gptq, order=mixed), GPTQ | {"desc_act": True})
BLOCKS = Layout(fp8_blocks, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 48]})


def loaded(directory: Path) -> torch.nn.Module:
    return ARCHITECTURE.model_class.from_pretrained(directory, dtype=torch.float32).eval()


def converted(source: Path, target: Path, *flags: str) -> Path:
    assert main(ARCHITECTURE, convert_flags(source, target, *flags)) == 0
    return target


@pytest.mark.parametrize("name", PASSED)
def test_codes_stay_as_they_are(name: str, tmp_path: Path) -> None:
    layout = PASSED[name]
    linears, model = write_coded(tmp_path / "source", layout)
    stored = quantized_tensors(converted(tmp_path / "source", tmp_path / "out", *layout.flags))
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    for linear, coded in linears.items():
        assert description[f"{linear}.weight"] == layout.label
        codes = stored[f"{linear}.weight"]
        codes = unpack_int4(codes, 32) if codes.dtype == torch.uint8 else codes
        assert torch.equal(codes.float(), coded.codes.float())
        assert torch.equal(stored[f"{linear}.weight_scale"], coded.scale)
        if coded.zero is not None:
            assert torch.equal(stored[f"{linear}.weight_offset"], coded.zero)
    ids, out = random_ids(1, 40), loaded(tmp_path / "out")
    with torch.inference_mode():
        expected, found = (part(ids).logits.log_softmax(-1) for part in (model, out))
    if layout.flags:  # float inputs
        assert (found - expected).abs().max() < TOLERANCES["logits"]
    else:
        assert 0 < float((expected.exp() * (expected - found)).sum(-1).mean()) < (2.0 if "static" in name else 0.05)


def test_static_inputs_keep_their_scales(tmp_path: Path) -> None:
    layout = PASSED["int-quantized, static"]
    write_coded(tmp_path / "source", layout)
    stored = quantized_tensors(converted(tmp_path / "source", tmp_path / "out"))
    up = "model.layers.1.mlp.up_proj"
    assert (stored[f"{up}.input_scale"].item(), stored[f"{up}.input_offset"].item()) == (pytest.approx(0.05), -7)
    sums = stored[f"{up}.weight"].sum(1, dtype=torch.int32)
    assert torch.equal(stored[f"{up}.quant_bias"], 7 * sums), "no bias: less the zero point times the sum of codes"


@pytest.mark.parametrize("name", ["awq", "gptq", "int-quantized, dynamic"])
def test_the_cache_is_calibrated_on_the_decoded_model(name: str, tmp_path: Path) -> None:
    _, model = write_coded(tmp_path / "source", PASSED[name])
    save_source(tmp_path / "decoded", model)
    found, expected = (
        quantized_tensors(converted(tmp_path / part, tmp_path / f"{part} out", "--scheme", "ascend-c8", *flags))
        for part, flags in (("source", ()), ("decoded", ("--quantization", "float")))
    )
    scales = [tensor for tensor in expected if tensor.endswith("kv_cache_scale")]
    assert len(scales) == 6 and all(torch.equal(found[tensor], expected[tensor]) for tensor in scales)


def test_what_is_reported(tmp_path: Path) -> None:
    write_coded(tmp_path / "source", PASSED["awq"])
    report = convert(ConvertRequest(tmp_path / "source", tmp_path / "out", scheme="ascend-c8", calibration=TEXTS))
    assert (report.source_codes, report.linear) == ("awq", LinearScheme("W4A16", 32, symmetric=False))
    assert report.fidelity.kl < 0.05 and "21 linears in W4A16, in the codes of the source (awq)" in report.summary()


def test_kinds_of_linears_may_differ(tmp_path: Path) -> None:
    """As of GPTQModel's "dynamic": bits of some linears are others."""
    eight = {tuple(weight.shape) for weight in (torch.empty(128, 64),)}

    def code(weight: torch.Tensor) -> Any:
        return gptq(weight, bits=8 if tuple(weight.shape) in eight else 4)

    _, model = write_coded(tmp_path / "source", Layout(code, GPTQ))
    out = loaded(converted(tmp_path / "source", tmp_path / "out", *FLOAT_INPUTS))
    labels = {name: module.LABEL for name, module in out.named_modules() if hasattr(module, "LABEL")}
    assert labels["model.layers.0.mlp.up_proj"] == "W8A16" and labels["model.layers.0.mlp.down_proj"] == "W4A16"
    ids = random_ids(1, 20)
    with torch.inference_mode():
        assert (out(ids).logits - model(ids).logits).abs().max() < TOLERANCES["logits"]


def test_groups_of_config_by_name(tmp_path: Path) -> None:
    config = ct_config("mixed-precision", args(8, "int", "channel"), INT_TOKEN)
    config["config_groups"]["group_1"] = {"targets": ["re:.*mlp.*"], "weights": args(4, "int", "group")}

    def code(weight: torch.Tensor) -> Any:
        return packed_ct(weight) if 128 in weight.shape else plain_ct(weight)

    write_coded(tmp_path / "source", Layout(code, config))
    out = loaded(converted(tmp_path / "source", tmp_path / "out"))
    labels = {name: module.LABEL for name, module in out.named_modules() if hasattr(module, "LABEL")}
    assert (
        labels["model.layers.0.mlp.up_proj"] == "W4A16" and labels["model.layers.0.self_attn.q_proj"] == "W8A8_DYNAMIC"
    )


@pytest.mark.parametrize("name", ["awq", "gptq of 8 bits"])
def test_a_last_linear_in_codes(name: str, tmp_path: Path) -> None:
    linears, model = write_coded(tmp_path / "source", PASSED[name], head=True)
    assert "lm_head" in linears
    out = loaded(converted(tmp_path / "source", tmp_path / "out", *FLOAT_INPUTS))
    ids = random_ids(1, 20)
    with torch.inference_mode():
        assert PASSED[name].label == out.lm_head.LABEL
        assert (out(ids).logits - model(ids).logits).abs().max() < TOLERANCES["logits"]


@pytest.mark.parametrize("layout", [ACT_ORDER, BLOCKS], ids=["act-order", "blocks"])
def test_what_no_kind_holds_is_decoded_if_asked_for(layout: Layout, tmp_path: Path) -> None:
    linears, model = write_coded(tmp_path / "source", layout)
    source = layerwise_source(tmp_path / "source", "cpu")
    for linear, coded in linears.items():
        assert torch.equal(source.tensor(f"{linear}.weight"), coded.weight)
    flags = ("--requantize", "--quantization", "float", "--scheme", "int8-token")
    out = loaded(converted(tmp_path / "source", tmp_path / "out", *flags))
    assert not any(hasattr(module, "LABEL") for module in out.modules())
    ids = random_ids(1, 20)
    with torch.inference_mode():
        expected, found = (part(ids).logits.log_softmax(-1) for part in (model, out))
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.01
    eight = converted(tmp_path / "source", tmp_path / "w8", "--requantize", "--quantization", "w8a16")
    assert quantized_tensors(eight)["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


def test_act_order_of_one_group_is_none(tmp_path: Path) -> None:
    """desc_act with group_size -1 orders nothing that scales depend on."""
    config, one = GPTQ | {"desc_act": True, "group_size": -1}, partial(torch.zeros, dtype=torch.long)

    def code(weight: torch.Tensor) -> Any:
        coded = gptq(weight, order=one)
        for end in ("qzeros", "scales"):
            coded.stored[end] = coded.stored[end][:1].contiguous()
        coded.scale, coded.zero = coded.scale[:, :1], coded.zero[:, :1]
        coded.weight = coded.codes.float() * coded.scale
        return coded

    linears, _ = write_coded(tmp_path / "source", Layout(code, config))
    stored = quantized_tensors(converted(tmp_path / "source", tmp_path / "out"))
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight_scale"], linears["model.layers.0.mlp.up_proj"].scale)


def test_scales_of_a_cache_in_the_source_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheme = args(8, "float", "tensor")
    write_coded(
        tmp_path / "source",
        Layout(packed_ct, ct_config("pack-quantized", args(4, "int", "group"), kv_cache_scheme=scheme)),
    )
    change_weights(tmp_path / "source", lambda tensors: tensors.update(
        {f"model.layers.{i}.self_attn.{side}_scale": torch.ones(1) for i in range(3) for side in "kv"}
    ))  # fmt: skip
    converted(tmp_path / "source", tmp_path / "out", "--scheme", "fp8")
    assert "model.layers.0.self_attn.k_scale and 5 more scales of a cache are left: " in capsys.readouterr().err


def test_a_scale_of_zero_makes_zeros(tmp_path: Path) -> None:
    up = "model.layers.1.mlp.up_proj"
    write_coded(tmp_path / "source", PASSED["gptq"])
    change_weights(tmp_path / "source", lambda tensors: tensors[f"{up}.scales"][0].zero_())
    out = loaded(converted(tmp_path / "source", tmp_path / "out"))
    assert out.get_submodule(up).float_weight()[:, :32].abs().max() < 1e-30


def test_a_bias_of_zeros_that_the_model_has_not_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As AutoGPTQ wrote them."""
    write_coded(tmp_path / "source", PASSED["gptq"])
    change_weights(tmp_path / "source", lambda tensors: tensors.update({f"{UP}.bias": torch.zeros(128)}))
    stored = quantized_tensors(converted(tmp_path / "source", tmp_path / "out"))
    assert f"{UP}.bias" not in stored
    change_weights(tmp_path / "source", lambda tensors: tensors[f"{UP}.bias"].fill_(1))
    assert f"unexpected keys: {UP}.bias" in refused(tmp_path / "source", tmp_path / "other", capsys)


def test_codebooks_are_fitted_on_the_decoded_model(tmp_path: Path) -> None:
    _, model = write_coded(tmp_path / "source", PASSED["awq"])
    save_source(tmp_path / "decoded", model)
    found, expected = (
        quantized_tensors(converted(tmp_path / part, tmp_path / f"{part} out", "--scheme", "kvquant-4", *flags))
        for part, flags in (("source", ()), ("decoded", ("--quantization", "float")))
    )
    levels = [name for name in expected if name.endswith("_levels")]
    assert levels and all(torch.equal(found[name], expected[name]) for name in levels)


def test_experts_in_codes(tmp_path: Path) -> None:
    """They lie in a checkpoint one by one, as in Qwen's own of GPTQ."""
    for part in ("source", "decoded"):
        save_source(tmp_path / part, tiny_moe())
    linears = {}

    def code(tensors: dict[str, torch.Tensor], stored: bool) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            linears[name] = gptq(tensors.pop(name))
            ends = linears[name].stored if stored else {"weight": linears[name].weight}
            tensors |= {f"{name.removesuffix('.weight')}.{end}": tensor.clone() for end, tensor in ends.items()}

    for part, stored in (("source", True), ("decoded", False)):
        change_weights(tmp_path / part, partial(code, stored=stored))
    edit_json(tmp_path / "source" / "config.json", quantization_config=GPTQ)
    flags = convert_flags(tmp_path / "source", tmp_path / "out", "--scheme", "float", *FLOAT_INPUTS)
    assert main(qwen3_moe.ARCHITECTURE, flags) == 0
    down = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert torch.equal(unpack_int4(quantized_tensors(tmp_path / "out")[down], 32), linears[down].codes)
    model_class, ids = qwen3_moe.ARCHITECTURE.model_class, random_ids(1, 20)
    with torch.inference_mode():
        found, expected = (
            model_class.from_pretrained(tmp_path / part, dtype=torch.float32).eval()(ids).logits
            for part in ("out", "decoded")
        )
    assert (found - expected).abs().max() < TOLERANCES["logits"]


def test_attentions_that_cost_most_may_stay_in_float(tmp_path: Path) -> None:
    write_coded(tmp_path / "source", PASSED["awq"])
    asked = ConvertRequest(
        tmp_path / "source", tmp_path / "out", scheme="ascend-c8", calibration=TEXTS, float_costliest=1
    )
    report = convert(asked)
    assert len(report.linears) == 21, "linears in codes are none of them"
    assert len(report.scheme.float_layers) == 1 and report.chosen_floats[0].endswith("self_attn")


# What is refused.


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


BAD_INPUTS = args(8, "int", "token", symmetric=False, dynamic=True)
UNHELD: dict[str, tuple[Layout, str]] = {
    "act-order": (ACT_ORDER, "q_proj has groups of input channels that act-order (g_idx) mixes up; no kind of linear"),
    "blocks": (BLOCKS, "q_proj is fp8 with a scale for each block of 48 x 48 weights, and fp8 here has one per output"),
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
