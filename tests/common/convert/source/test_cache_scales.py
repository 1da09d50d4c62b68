"""Static scales of K and V that a quantized checkpoint keeps: left, or carried over bit for bit."""

from pathlib import Path

import pytest
import torch

from octavo import ConvertRequest, OctavoError, convert
from octavo.common.convert.dialects.rewriting import RewriteRequest, rewrite

from ....support import TEXTS, edit_json, quantized_tensors, random_ids, save_source, tiny_llama
from .coded_layouts import change_weights, converted, loaded, refused
from .coded_sources import Layout, args, ct_config, fp8, packed_ct, write_coded

pytestmark = pytest.mark.usefixtures("one_thread")
PER_TENSOR, PER_HEAD = args(8, "float", "tensor"), args(8, "float", "attn_head")
PER_CHANNEL = args(8, "int", "channel", symmetric=False)
SOURCE = ("--kv_scales", "source")
FP8 = ("--scheme", "vllm-fp8", *SOURCE)


def scales(sides: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Scales that no calibration of the tiny model finds, by name."""
    numbers = torch.linspace(0.011, 0.093, 3 * len(sides) * torch.Size(shape).numel()).to(dtype)
    names = [f"model.layers.{index}.self_attn.{side}_scale" for index in range(3) for side in sides]
    return dict(zip(names, map(torch.Tensor.clone, numbers.view(len(names), *shape)), strict=True))


def write_scaled(directory: Path, kept: dict[str, torch.Tensor], kv_cache_scheme: dict | None = PER_TENSOR) -> None:
    config = ct_config("pack-quantized", args(4, "int", "group"), kv_cache_scheme=kv_cache_scheme)
    write_coded(directory, Layout(packed_ct, config))
    change_weights(directory, lambda tensors: tensors.update(kept))


def constants(directory: Path, part: str) -> list[torch.Tensor]:
    stored = quantized_tensors(directory)
    return [stored[f"model.layers.{index}.self_attn.octavo_cache.{part}"] for index in range(3)]


def test_scales_per_tensor_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = scales("kv", 1)
    write_scaled(tmp_path / "source", kept)
    out = converted(tmp_path / "source", tmp_path / "out", *FP8)
    for side, part in (("k", "key_scale"), ("v", "value_scale")):
        expected = [kept[f"model.layers.{index}.self_attn.{side}_scale"] for index in range(3)]
        for found, scale in zip(constants(out, part), expected, strict=True):
            assert found.shape == (1, 1, 1) and torch.equal(found.view(1), scale.float())
    said = capsys.readouterr().err
    assert "k_scale and the other scales of K and V stay as they are, and that of q from the texts" in said
    assert "scheme vllm-fp8: biases of K and V are counted in and nothing is turned" in said
    converted(tmp_path / "source", tmp_path / "calibrated", "--scheme", "vllm-fp8")
    assert all(map(torch.equal, constants(out, "query_scale"), constants(tmp_path / "calibrated", "query_scale")))


def test_scales_per_head_and_those_of_q_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = scales("kv", 2, 1, 1, dtype=torch.float32) | scales("q", 4, 1, 1, dtype=torch.float32)
    write_scaled(tmp_path / "source", kept, PER_HEAD)
    out = converted(tmp_path / "source", tmp_path / "out", "--scheme", "vllm-fp8-head", *SOURCE)
    for side, part in (("k", "key_scale"), ("v", "value_scale"), ("q", "query_scale")):
        expected = [kept[f"model.layers.{index}.self_attn.{side}_scale"] for index in range(3)]
        assert all(map(torch.equal, constants(out, part), expected))
    assert "from the texts" not in capsys.readouterr().err
    assert loaded(out).scheme.rotate_key is False


def test_scales_per_channel_stay_in_ascends_format(tmp_path: Path) -> None:
    """As of Huawei's build of vLLM."""
    kept = scales("kv", 32)
    write_scaled(tmp_path / "source", kept, PER_CHANNEL)
    stored = quantized_tensors(converted(tmp_path / "source", tmp_path / "out", "--scheme", "ascend-c8", *SOURCE))
    for index in range(3):
        for side in "kv":
            expected = kept[f"model.layers.{index}.self_attn.{side}_scale"].float()
            assert torch.equal(stored[f"model.layers.{index}.self_attn.{side}_proj.kv_cache_scale"], expected)


def test_zero_points_stay(tmp_path: Path) -> None:
    points = {name.replace("scale", "zero_point"): torch.tensor([-3], dtype=torch.int8) for name in scales("kv", 1)}
    write_scaled(tmp_path / "source", scales("kv", 1) | points, args(8, "int", "tensor", symmetric=False))
    out = converted(tmp_path / "source", tmp_path / "out", "--scheme", "lmdeploy-int8-ptq", *SOURCE)
    assert all(zero.unique().tolist() == [-3] for zero in constants(out, "key_zero"))


def test_scales_of_projections_and_of_fp8(tmp_path: Path) -> None:
    """As vLLM's own fp8 and ModelOpt name them."""
    write_coded(tmp_path / "source", Layout(fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}))
    kept = scales("kv", 1)
    change_weights(tmp_path / "source", lambda tensors: tensors.update(
        {name.replace(f".{name[-7]}_scale", f".{name[-7]}_proj.{name[-7]}_scale"): scale
         for name, scale in kept.items()}
    ))  # fmt: skip
    found = constants(converted(tmp_path / "source", tmp_path / "out", *FP8), "key_scale")
    assert [scale.item() for scale in found] == [scale.item() for name, scale in kept.items() if "k_scale" in name]


def test_they_survive_the_way_to_an_engine_and_back(tmp_path: Path) -> None:
    kept = scales("kv", 1)
    write_scaled(tmp_path / "source", kept)
    out = converted(tmp_path / "source", tmp_path / "out", *FP8)
    rewrite(RewriteRequest(out, tmp_path / "engine", "compressed-tensors"))
    again = converted(tmp_path / "engine", tmp_path / "again", *FP8)
    ids = random_ids(1, 20)
    with torch.inference_mode():
        assert torch.equal(*(loaded(part)(ids).logits for part in (out, again)))


def test_scales_alone_beside_float_linears(tmp_path: Path) -> None:
    save_source(tmp_path / "source", tiny_llama())
    change_weights(tmp_path / "source", lambda tensors: tensors.update(scales("kv", 1)))
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": PER_TENSOR}
    edit_json(tmp_path / "source" / "config.json", quantization_config=config)
    found = constants(
        converted(tmp_path / "source", tmp_path / "out", *FP8, "--w_bit", "16", "--a_bit", "16"), "key_scale"
    )
    assert found[0].item() == scales("kv", 1)["model.layers.0.self_attn.k_scale"].item()


@pytest.mark.parametrize(("flags", "said"), [
    (("--scheme", "vllm-fp8"), "5 more scales of a cache are left: vllm-fp8 has its own; --kv_scales source keeps"),
    (("--scheme", "int8-token"), "k_scale and 5 more scales of a cache are left: int8-token has its own"),
])  # fmt: skip
def test_scales_that_are_left_are_named(
    flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scaled(tmp_path / "source", scales("kv", 1))
    converted(tmp_path / "source", tmp_path / "out", *flags)
    assert said in capsys.readouterr().err


def without(kept: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {other: scale for other, scale in kept.items() if other != name}


V1 = "model.layers.1.self_attn.v_scale"
REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict | None, tuple[str, ...], str]] = {
    "none": ({}, PER_TENSOR, FP8, "--kv_scales source: the source keeps no static scales of K and V; leave it out"),
    "one is missing": (
        without(scales("kv", 1), V1), PER_TENSOR, FP8, f"--kv_scales source: the source has no {V1}; leave it out",
    ),
    "dynamic": (
        scales("kv", 1), PER_TENSOR, ("--scheme", "int8-token", *SOURCE),
        "--kv_scales source: scheme int8-token has no static scales; leave it out",
    ),
    "other codes": (
        scales("kv", 1), PER_TENSOR, ("--scheme", "ascend-c8", *SOURCE),
        "k_scale is for codes in fp8_e4m3, and key of scheme ascend-c8 is in int8; choose another --scheme",
    ),
    "codes that are not said": (
        scales("kv", 1), None, FP8,
        "k_scale is for codes in what is not said, and key of scheme vllm-fp8 is in fp8_e4m3; choose another --scheme",
    ),
    "another granularity": (
        scales("kv", 1), PER_TENSOR, ("--scheme", "vllm-fp8-head", *SOURCE),
        "k_scale holds 1 numbers, and key of scheme vllm-fp8-head takes 2, per head; choose another --scheme",
    ),
    "zero points": (
        scales("kv", 32) | {"model.layers.0.self_attn.k_zero_point": torch.full((32,), 5, dtype=torch.int8)},
        PER_CHANNEL, ("--scheme", "ascend-c8", *SOURCE),
        "k_zero_point is not 0, and key of scheme ascend-c8 has no zero points; choose another --scheme",
    ),
    "not calibrated": (
        scales("kv", 1) | {V1: torch.tensor([-1.0])}, PER_TENSOR, FP8,
        f"{V1} is no positive number throughout; the checkpoint is damaged, or not calibrated",
    ),
    "codebooks": (
        scales("kv", 1), PER_TENSOR, ("--scheme", "kvquant-4", *SOURCE),
        "--kv_scales source: the codebooks of kvquant-4 come from texts; leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_scales_that_a_scheme_cannot_hold(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, kv_cache_scheme, flags, said = REFUSED[name]
    write_scaled(tmp_path / "source", kept, kv_cache_scheme)
    assert said in refused(tmp_path / "source", tmp_path / "out", capsys, *flags)


def test_a_float_source_keeps_none(source: Path, tmp_path: Path) -> None:
    asked = ConvertRequest(source, tmp_path / "out", scheme="vllm-fp8", kv_scales="source", calibration=TEXTS)
    with pytest.raises(OctavoError, match=r"^kv_scales source: the source keeps no static scales of K and V"):
        convert(asked)
