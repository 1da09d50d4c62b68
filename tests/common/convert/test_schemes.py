"""Conversions to schemes beyond Ascend's two: flags, files of one's own, layers that differ, and damaged constants."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from octavo.common.convert.api import main
from octavo.common.convert.job import Job
from octavo.common.convert.request import ConvertRequest
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.models import qwen2
from octavo.models.llama3 import ARCHITECTURE
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ...metrics import rmse_in_std
from ...models.loading import load_without_octavo, save_expected
from ...support import (
    assert_one_error_line,
    convert_flags,
    files_below,
    quantized_tensors,
    random_ids,
    randomized,
    save_source,
    tiny_config,
    tiny_llama,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT_LINEARS = ("--w_bit", "16", "--a_bit", "16")
DESCRIPTION = "quant_model_description.json"
OWN: dict[str, Any] = {
    "name": "mine",
    "key": {"dtype": "int8", "granularity": "channel"},
    "value": {"dtype": "int4", "granularity": "token", "dynamic": True, "symmetric": False},
    "layers": {"0": "ascend-c8", "1": {"window": 16, "rotate_value": True}},
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A scheme of one's own as a file."""
    file = tmp_path_factory.mktemp("schemes") / "my scheme.json"
    file.write_text(json.dumps(OWN))
    return str(file)


@pytest.mark.parametrize(
    ("asked", "sees_all"),
    [
        ({"scheme": "octavo-4c", "linear": None}, False),
        ({"scheme": "octavo-2tc", "linear": "w8a16"}, False),
        ({"scheme": "octavo-4c", "linear": "w8a8"}, True),
        ({"scheme": "octavo-4c", "linear": None, "save_statistics": "statistics.safetensors"}, True),
        ({"scheme": "ascend-c8"}, True),
        ({"scheme": "ascend-fa"}, True),
        ({"scheme": "kvquant-2"}, True),
        ({"scheme": "octavo-4", "linear": "w8a16"}, False),
    ],
    ids=str,
)
def test_all_texts_are_observed_layer_by_layer_where_ranges_are_asked_for(
    asked: dict[str, Any], sees_all: bool, source: Path, tmp_path: Path
) -> None:
    asked = {**asked, "save_statistics": tmp_path / asked["save_statistics"]} if "save_statistics" in asked else asked
    job = Job(ConvertRequest(str(source), tmp_path / "out", calibration=["one text", "and others"] * 4, **asked))
    is_calibrated = load_scheme(asked["scheme"]).is_static
    assert len(job.observed) == (len(job.samples) if sees_all else 1)
    assert len(job.samples) == (7 if is_calibrated else 1), "bases come from all of them"


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with large biases of k."""
    fields = {k: v for k, v in tiny_config().to_diff_dict().items() if k not in ("model_type", "head_dim")}
    torch.manual_seed(0)
    model = randomized(Qwen2ForCausalLM(Qwen2Config(**fields)))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_(std=5)
    return save_source(tmp_path_factory.mktemp("biased") / "source", model)


def scheme_of(directory: Path) -> dict[str, Any]:
    """What config.json says of the scheme."""
    return json.loads((directory / "config.json").read_text())["octavo"]["scheme"]


def constants(directory: Path) -> dict[str, torch.Tensor]:
    """Static scales and codebooks of the directory."""
    return {name: t for name, t in quantized_tensors(directory).items() if ".octavo_cache." in name}


def test_a_static_preset(converted: Callable[..., Path]) -> None:
    directory = converted("--scheme", "vllm-fp8-head", *FLOAT_LINEARS)
    found = constants(directory)
    assert scheme_of(directory) == load_scheme("vllm-fp8-head").to_dict()
    parts = {name.rpartition(".")[2]: tuple(t.shape) for name, t in found.items()}
    assert parts == {"key_scale": (2, 1, 1), "value_scale": (2, 1, 1), "query_scale": (4, 1, 1)}
    assert len(found) == 3 * 3 and all((t > 0).all() for t in found.values())
    labels = json.loads((directory / DESCRIPTION).read_text())
    assert {labels[name] for name in found} == {"OCTAVO"} and "kv_cache_type" not in labels


@pytest.mark.parametrize("preset", ["octavo-4", "k4v2"])
def test_a_dynamic_preset_has_no_constants(preset: str, converted: Callable[..., Path]) -> None:
    directory = converted("--scheme", preset, *FLOAT_LINEARS)
    assert constants(directory) == {} and scheme_of(directory)["name"] == preset


@pytest.mark.parametrize("preset", ["ascend-c8", "ascend-fa"])
def test_ascends_presets_are_the_flags_of_ascend(preset: str, converted: Callable[..., Path]) -> None:
    flag = "--use_kvcache_quant" if preset == "ascend-c8" else "--use_fa_quant"
    one, other = converted(flag, "True"), converted("--scheme", preset)
    assert files_below(one) == files_below(other)
    for name in files_below(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    names = [name for name in quantized_tensors(one) if "layers.0.self_attn" in name]
    own = [name.removeprefix("model.layers.0.self_attn.") for name in names if "kv_cache" in name or ".fa_" in name]
    if preset == "ascend-c8":
        assert own == [f"{side}_proj.kv_cache_{part}" for side in "kv" for part in ("scale", "offset")]
    else:
        assert sorted(own) == [f"fa_{side}.{part}" for side in "kqv" for part in ("offset", "scale")]
    assert not any("octavo_cache" in name for name in names)


def test_a_file_with_layers_that_differ(own: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    directory = converted("--scheme", own, *FLOAT_LINEARS)
    names = set(quantized_tensors(directory))
    assert "model.layers.0.self_attn.k_proj.kv_cache_scale" in names
    assert "model.layers.1.self_attn.octavo_cache.key_scale" in names
    assert "model.layers.0.self_attn.octavo_cache.key_scale" not in names
    model = LlamaForCausalLM.from_pretrained(directory).eval()
    layers = model.new_cache().layers
    assert [layer.scheme.window for layer in layers] == [0, 16, 0]
    assert layers[0].scheme == load_scheme("ascend-c8")
    ids = random_ids(1, 60)
    with torch.inference_mode():
        expected = tiny_llama()(ids).logits
        error = rmse_in_std(model(ids).logits, expected)
    assert 1e-4 < error < 0.2


def test_ascends_scheme_with_other_layers_is_described_as_octavos(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "scheme.json"
    file.write_text(json.dumps({**load_scheme("ascend-c8").to_dict(), "layers": {"1": "int8-token"}}))
    target = tmp_path / "out"
    assert main(ARCHITECTURE, convert_flags(source, target, "--scheme", str(file), *FLOAT_LINEARS)) == 0
    assert "kv_cache_type" not in json.loads((target / DESCRIPTION).read_text())
    model = LlamaForCausalLM.from_pretrained(target).eval()
    assert [layer.scheme.name for layer in model.new_cache().layers] == ["ascend-c8", "int8-token", "ascend-c8"]
    with torch.inference_mode():
        model(random_ids(1, 9))


@pytest.mark.parametrize(("dtype", "preset"), [("fp8", "vllm-fp8"), ("fp8_e4m3", "vllm-fp8"), ("fp8_e5m2", "fp8_e5m2")])
def test_kv_cache_dtype_as_vllm_spells_it(dtype: str, preset: str, converted: Callable[..., Path]) -> None:
    directory = converted("--kv_cache_dtype", dtype, *FLOAT_LINEARS)
    assert scheme_of(directory)["name"] == preset
    assert len(constants(directory)) == (0 if preset == "fp8_e5m2" else 9)


def test_scales_from_random_tokens_and_of_one(converted: Callable[..., Path]) -> None:
    flags = ("--kv_cache_dtype", "fp8", *FLOAT_LINEARS)
    data, random = constants(converted(*flags)), constants(converted(*flags, "--kv_scales", "random"))
    assert data.keys() == random.keys() and not all(torch.equal(data[name], random[name]) for name in data)
    ones = converted(*flags, "--kv_scales", "none")
    assert constants(ones) == {} and scheme_of(ones)["key"]["fixed_scale"] == 1.0
    model, ids = LlamaForCausalLM.from_pretrained(ones).eval(), random_ids(1, 30)
    assert not model.scheme.is_static
    with torch.inference_mode():
        expected = tiny_llama()(ids).logits
        error = rmse_in_std(model(ids).logits, expected)
    assert error < 0.3


REFUSALS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--scheme", "int7"), ("int7", "octavo-4")),
    (("--scheme", "/nowhere/scheme.json"), ("/nowhere/scheme.json",)),
    (("--scheme", "int8-token", "--use_fa_quant", "True"), ("--use_fa_quant", "--scheme", "exclude")),
    (("--scheme", "int8-token", "--kv_cache_dtype", "fp8"), ("exclude",)),
    (("--kv_cache_dtype", "int8"), ("--kv_cache_dtype", "fp8_e5m2")),
    (("--scheme", "int8-token", "--kv_scales", "random"), ("--kv_scales random", "no static scales")),
    (("--scheme", "ascend-c8", "--kv_scales", "none"), ("fp8", "int8")),
    (("--scheme", "kvquant-2", "--kv_scales", "none"), ("fp8", "int2")),
    (("--scheme", "octavo-2c", "--kv_scales", "none"), ("octavo-2c", "come from texts")),
    (("--kv_scales", "none"), ("no static scales",)),
    (("--scheme", "float", *FLOAT_LINEARS), ("quantizes nothing",)),
    (("--kv_cache_dtype", "auto", *FLOAT_LINEARS), ("quantizes nothing",)),
    (("--scheme", "kivi-2"), ("groups of 32", "head of 16")),
]


@pytest.mark.parametrize(("flags", "parts"), REFUSALS, ids=lambda value: " ".join(value))
def test_refusals_are_one_line(
    flags: tuple[str, ...], parts: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags))
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2) and files_below(tmp_path) == []
    assert_one_error_line(capsys.readouterr().err, *parts)


BAD_FILES: dict[str, tuple[str, ...]] = {
    "[]": ("object",),
    "{": ("scheme.json",),
    '{"name": "x", "sinks": "4"}': ("sinks",),
    '{"name": "x", "key": {"dtype": "int8", "group_size": "4"}}': ("group_size",),
    '{"name": "x", "layers": {"first": "int8-token"}}': ("first",),
    '{"name": "x", "layers": {"0": "int9"}}': ("int9",),
    '{"name": "x", "layers": {"0": {"window": 3, "wide": 1}}}': ("wide",),
    '{"name": "x", "layers": ["int8-token"]}': ("layers",),
    '{"name": "x", "key": {"granularity": "token", "dynamic": true, "outliers": 16}}': ("outliers", "16"),
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_files_that_hold_no_scheme(text: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scheme.json"
    file.write_text(text)
    flags = convert_flags(source, tmp_path / "out", "--scheme", str(file), *FLOAT_LINEARS)
    assert main(ARCHITECTURE, flags) == 1
    assert files_below(tmp_path) == ["scheme.json"]
    assert_one_error_line(capsys.readouterr().err, *BAD_FILES[text])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directories_load_without_octavo_bit_for_bit(
    dtype: torch.dtype, biased: Path, own: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = []
    of_llama = save_source(tmp_path / "llama", tiny_llama(num_hidden_layers=2).to(dtype))
    of_qwen2 = save_source(tmp_path / "qwen2", Qwen2ForCausalLM.from_pretrained(biased).to(dtype))
    for name, architecture, source in (("llama", ARCHITECTURE, of_llama), ("qwen2", qwen2.ARCHITECTURE, of_qwen2)):
        for scheme in ("octavo-4", "octavo-2c", "kvquant-2", "vllm-fp8-head"):
            target, expected = tmp_path / f"{name} {scheme}", tmp_path / f"{name} {scheme}.safetensors"
            flags = ("--scheme", scheme, *(FLOAT_LINEARS if scheme != "octavo-4" else ()))
            assert main(architecture, convert_flags(source, target, *flags)) == 0
            save_expected(architecture.model_class.from_pretrained(target), expected)
            rows.append((f"{name} {scheme}", str(target), str(expected)))
    found = load_without_octavo(rows, tmp_path_factory.mktemp("modules"))
    assert found == {name: [True, True, True, str(dtype)] for name, *_ in rows}


def test_constants_stay_what_they_are_in_a_model_of_another_dtype(converted: Callable[..., Path]) -> None:
    model = LlamaForCausalLM.from_pretrained(converted("--scheme", "kvquant-2", *FLOAT_LINEARS)).eval()
    before = {name: t.clone() for name, t in model.named_buffers() if "octavo_cache" in name}
    model.half()
    assert before and all(torch.equal(model.get_buffer(name), tensor) for name, tensor in before.items())
    with torch.inference_mode():
        assert torch.isfinite(model(random_ids(1, 30)).logits).all()


DAMAGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "a negative scale": ("key_scale", lambda t: -t, "key_scale"),
    "a scale that is no number": ("value_scale", lambda t: t * float("nan"), "value_scale"),
    "a zero that is infinite": ("key_zero", lambda t: t / 0, "key_zero"),
    "levels that are no numbers": ("key_levels", lambda t: t * float("nan"), "key_levels"),
    "levels that do not ascend": ("key_levels", lambda t: t.flip(0), "key_levels"),
    "too few levels": ("key_levels", lambda t: t[:3], "key_levels"),
    "a scale of another shape": ("key_scale", lambda t: t[:1], "key_scale"),
    "another dtype": ("key_scale", lambda t: t.half(), "key_scale"),
    "a basis that cannot be undone": ("key_basis", lambda t: t * 0, "key_basis cannot be undone"),
    "a mean that is no number": ("key_mean", lambda t: t * float("nan"), "key_mean"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_constants_are_one_line(
    damage: str, converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from octavo.generate import main as run

    part, change, named = DAMAGES[damage]
    scheme = {"value_scale": "vllm-fp8-head", "key_basis": "octavo-2c", "key_mean": "octavo-2c"}.get(part, "kvquant-2")
    directory = Path(shutil.copytree(converted("--scheme", scheme, *FLOAT_LINEARS), tmp_path / "damaged"))
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    name = f"model.layers.1.self_attn.octavo_cache.{part}"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    assert run(ARCHITECTURE, ["--model_path", str(directory), "--prompt", "Rain", "--max_new_tokens", "2"]) == 1
    assert_one_error_line(capsys.readouterr().err, named)
