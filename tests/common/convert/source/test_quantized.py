"""Checkpoints whose linears are in codes already, as sources: the codes stay, and the rest is calibrated on them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import ConvertRequest, LinearScheme, OctavoError, convert
from octavo.common.convert.api import main
from octavo.common.convert.source.checkpoint import layerwise_source
from octavo.common.runtime.sharding.ranks import Ranks
from octavo.common.runtime.w8a8_linear import decode_deq_scale
from octavo.models import qwen3_moe
from octavo.models.llama3 import ARCHITECTURE
from octavo.ops.shared.codes import unpack_int4

from ....models.test_qwen3_moe import tiny_moe
from ....support import TEXTS, convert_flags, edit_json, quantized_tensors, random_ids, save_source
from ....tolerances import TOLERANCES
from .coded_layouts import (
    FLOAT_INPUTS,
    GPTQ,
    INPUTS,
    INT_TOKEN,
    PASSED,
    SMALL_BLOCKS,
    UNEVEN,
    change_weights,
    converted,
    loaded,
    refused,
)
from .coded_sources import Layout, args, ct_config, gptq, packed_ct, plain_ct, write_coded

pytestmark = pytest.mark.usefixtures("one_thread")
UP = "model.layers.1.mlp.up_proj"


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
        expected = coded.codes.float()
        if layout.label.endswith("_ORDERED"):
            columns = stored[f"{linear}.input_order"].long()
            assert (columns.diff() < 0).any() and sorted(columns.tolist()) == list(range(len(columns)))
            expected = expected[:, columns]
        assert torch.equal(codes.float(), expected)
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_static_inputs_keep_their_scales_as_engines_hold_them(dtype: str, tmp_path: Path) -> None:
    layout = PASSED["int-quantized, static"]
    write_coded(tmp_path / "source", layout)
    edit_json(tmp_path / "source" / "config.json", dtype=dtype)
    stored = quantized_tensors(converted(tmp_path / "source", tmp_path / "out"))
    up = "model.layers.1.mlp.up_proj"
    held = INPUTS["input_scale"].to(getattr(torch, dtype)).float()
    assert torch.equal(stored[f"{up}.input_scale"], held) and stored[f"{up}.input_offset"].item() == -7
    deq_scale = decode_deq_scale(stored[f"{up}.deq_scale"])
    assert torch.equal(deq_scale, held * stored[f"{up}.weight_scale"].squeeze(1)), "both are of the same scale"
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


@pytest.mark.parametrize("layout", [UNEVEN, SMALL_BLOCKS], ids=["uneven groups", "small blocks"])
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


@pytest.mark.parametrize("name", ["gptq, act-order", "fp8 in blocks"])
def test_kinds_of_our_own_stay_in_our_own_format(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coded(tmp_path / "source", PASSED[name])
    line = refused(tmp_path / "source", tmp_path / "out", capsys, "--format", "gptq")
    assert (
        f"--format gptq: model.layers.0.self_attn.q_proj is in {PASSED[name].label}, codes of the source that" in line
    )
    assert line.endswith("convert with --requantize, or serve the directory itself")
    line = refused(tmp_path / "source", tmp_path / "out", capsys, "--target", "mindie")
    assert f"MindIE has no linears of {PASSED[name].label}; give one of" in line and "--requantize makes others" in line


@pytest.mark.parametrize("name", ["gptq, act-order", "fp8 in blocks"])
def test_ranks_do_not_share_kinds_of_our_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coded(tmp_path / "source", PASSED[name])
    out = converted(tmp_path / "source", tmp_path / "out")
    ranks = Ranks(0, 2, torch.device("cpu"))
    monkeypatch.setattr("octavo.common.runtime.model.ranks_asked_for", lambda arguments: arguments.clear() or ranks)
    with pytest.raises(OctavoError, match=f"{PASSED[name].label} is not shared among ranks; convert with --requantize"):
        ARCHITECTURE.model_class.from_pretrained(out, tp_plan="auto")
