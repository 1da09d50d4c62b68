"""The doctor: its formulas against real rounding, what it finds in small checkpoints, and how little it reads."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import octavo
from octavo.common.doctor.diagnosis import BROKEN, KINDS, PEAK, KeyWeights, bits_lost, is_broken
from octavo.common.doctor.report import _passes_at, diagnose, kind_of, main
from octavo.common.doctor.text import render, spans
from octavo.common.errors import OctavoError
from octavo.common.runtime.schemes.kv_scheme import PRESETS, load_scheme
from octavo.common.runtime.static_scales import Statistics, rotary_radius
from tests.support import assert_one_error_line, edit_json

HIDDEN, HEADS, GROUPS, WIDTH, LAYERS = 64, 4, 2, 32, 3
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
Tensors = dict[str, torch.Tensor]


def make_tensors(bias: bool = False, normalized: bool = False, dtype: torch.dtype = torch.float32) -> Tensors:
    """A decoder's tensors as far as they matter here, and one that nobody should read."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"model.embed_tokens.weight": normal(100, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = normal(HIDDEN).abs() + 0.5
        tensors[f"{prefix}.mlp.down_proj.weight"] = normal(HIDDEN, HIDDEN)
        for part, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            tensors[f"{prefix}.self_attn.{part}_proj.weight"] = normal(heads * WIDTH, HIDDEN) / 8
            if bias:
                tensors[f"{prefix}.self_attn.{part}_proj.bias"] = normal(heads * WIDTH) / 8
        if normalized:
            tensors[f"{prefix}.self_attn.k_norm.weight"] = normal(WIDTH).abs() + 0.5
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write(directory: Path, tensors: Tensors, model_type: str = "llama", shards: int = 1, **changes: Any) -> Path:
    """A checkpoint of some tensors, in one file or several with an index."""
    settings = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH,
                "num_hidden_layers": LAYERS, "vocab_size": 100, "sliding_window": None}  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    CONFIGS[model_type](**{**settings, **changes}).save_pretrained(directory)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names, places = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        places |= dict.fromkeys(names[shard::shards], file)
        save_file({name: tensors[name] for name in names[shard::shards]}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def with_big_bias(tensors: Tensors, layer: int = 1, size: float = 150.0) -> Tensors:
    """The tensors with one large value in a bias of K, as in Qwen2."""
    changed = tensors[f"model.layers.{layer}.self_attn.k_proj.bias"].clone()
    changed[WIDTH + 5] = size
    return {**tensors, f"model.layers.{layer}.self_attn.k_proj.bias": changed}


def broken(report: dict[str, Any], scheme: str) -> tuple[list[int], list[int]]:
    """Layers that break a scheme with the bias in the key, and in Octavo."""
    verdict = report["schemes"][scheme]
    return verdict["broken_by"], verdict["broken_in_octavo_by"]


# ---- formulas


def turned(keys: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """Keys `[S, D]` with each rotary pair turned by an angle of its own."""
    generator = torch.Generator().manual_seed(seed)
    first, second = keys.chunk(2, dim=-1)
    angle = torch.rand(first.shape, generator=generator) * 2 * math.pi
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


ROUNDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "token": lambda k: k.abs().amax(-1, keepdim=True) / 127,
    "block": lambda k: (k.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127).expand(-1, -1, 32).flatten(-2),
}


def rounding_error(kind: str, keys: torch.Tensor) -> float:
    """The rms error of 8-bit codes of keys `[S, D]`."""
    if kind == "fp8":
        scale = keys.abs().amax(-1, keepdim=True) / 448
        stored = (keys / scale).to(torch.float8_e4m3fn).float() * scale
    else:
        scale = ROUNDERS[kind](keys)
        stored = (keys / scale).round() * scale
    return float((stored - keys).square().mean().sqrt())


@pytest.mark.parametrize("kind", ["token", "block", "fp8"])
@pytest.mark.parametrize("size", [0.0, 10.0, 100.0, 300.0])
def test_bits_lost_are_those_of_real_rounding(kind: str, size: float) -> None:
    width = 128
    bias = torch.zeros(1, width)
    bias[0, [7, 40]] = torch.tensor([size, -size / 2])
    rms = torch.ones(1, width)
    keys = torch.randn((2000, width), generator=torch.Generator().manual_seed(1))
    measured = math.log2(rounding_error(kind, turned(keys + bias)) / rounding_error(kind, turned(keys)))
    reach = rotary_radius(bias).repeat(1, 2) + PEAK * rms
    predicted = bits_lost(reach, bias, rms)[kind]
    # the error of a float is a share of its power of two, so that it says little within a bit
    assert predicted == pytest.approx(measured, abs=1.0 if kind == "fp8" else 0.7)


def test_a_scale_per_channel_loses_nothing_and_one_for_all_heads_most() -> None:
    bias, rms = torch.zeros(2, 64), torch.tensor([[1.0], [0.1]]).expand(2, 64)
    bias[0, 3] = 50.0
    lost = bits_lost(rotary_radius(bias).repeat(1, 2) + PEAK * rms, bias, rms)
    assert lost["channel"] == 0.0
    assert lost["tensor"] == pytest.approx(math.log2(53 / 0.3), abs=1e-4)
    assert lost["token"] == pytest.approx(math.log2(53 / 3), abs=1e-4)


def test_key_size_is_that_of_normalized_inputs(tmp_path: Path) -> None:
    tensors = make_tensors()
    layer = diagnose(str(write(tmp_path, tensors)))["layers"][0]
    x = torch.randn((4000, HIDDEN), generator=torch.Generator().manual_seed(2))
    x = x / x.square().mean(-1, keepdim=True).sqrt() * tensors["model.layers.0.input_layernorm.weight"]
    keys = (x @ tensors["model.layers.0.self_attn.k_proj.weight"].T).view(-1, GROUPS, WIDTH)
    assert layer["key_size"] == pytest.approx(float(keys[:, 0].square().mean(0).sqrt().mean()), rel=0.03)


def test_every_preset_has_a_kind() -> None:
    kinds = {name: kind_of(load_scheme(name).key) for name in PRESETS if load_scheme(name).key is not None}
    assert set(kinds.values()) <= set(KINDS) == set(BROKEN)
    assert kinds["int8-token"] == kinds["ascend-fa"] == "token" and kinds["ascend-c8"] == "channel"
    assert kinds["fp8-token"] == "fp8"


# ---- findings


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_a_decoder_without_biases_has_nothing_in_the_way(model_type: str, tmp_path: Path) -> None:
    tensors = make_tensors(normalized=model_type == "qwen3")
    report = diagnose(str(write(tmp_path, tensors, model_type)))
    assert all(not verdict["broken_by"] for verdict in report["schemes"].values())
    assert "layers 0-2: nothing in the way" in render(report)
    assert report["recommendation"]["8 bits"]["preset"] == "int8-token"
    assert report["recommendation"]["4 bits"]["preset"] == "octavo-4"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_big_bias_is_found_where_it_is(dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    tensors = with_big_bias(make_tensors(bias=True, dtype=dtype))
    report = diagnose(str(write(tmp_path, tensors, "qwen2", shards)))
    for scheme in ("int8-token", "int4-token", "fp8-token"):
        assert broken(report, scheme) == ([1], [])
    assert broken(report, "ascend-c8") == ([], [])
    assert report["layers"][1]["key_bias"] == pytest.approx(150, rel=0.01)
    assert report["layers"][1]["bias_pair"] > 50 > report["layers"][0]["bias_pair"]
    assert report["facts"]["value_bias"] > 0
    assert "fold_bias" in report["recommendation"]["8 bits"]["reason"]
    text = render(report)
    assert "layers 0, 2: nothing in the way" in text and "bias of K: breaks token" in text


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_bias_stays_where_frequencies_change(rope_type: str, tmp_path: Path) -> None:
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * (WIDTH // 2),
            "long_factor": [1.0] * (WIDTH // 2), "original_max_position_embeddings": 512}  # fmt: skip
    tensors = with_big_bias(make_tensors(bias=True))
    report = diagnose(str(write(tmp_path, tensors, "qwen2", rope_parameters=rope)))
    assert not report["facts"]["bias_can_be_folded"]
    assert broken(report, "int8-token") == ([1], [1])
    assert report["recommendation"]["8 bits"]["preset"] == "octavo-8"
    assert "cannot be folded" in render(report)


def test_an_outlier_channel_breaks_what_no_folding_mends(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["model.layers.2.self_attn.k_proj.weight"][3] *= 1000
    report = diagnose(str(write(tmp_path, tensors)))
    assert broken(report, "int8-token") == ([2], [2])
    assert report["layers"][2]["outlier"] > 500 > report["layers"][1]["outlier"]
    assert report["recommendation"]["8 bits"]["preset"] == "octavo-8"
    assert "outlier channel: breaks token" in render(report)


def test_a_normalized_key_is_judged_by_its_norm(tmp_path: Path) -> None:
    tensors = with_big_bias(make_tensors(bias=True, normalized=True))
    report = diagnose(str(write(tmp_path, tensors, "qwen3", attention_bias=True)))
    assert broken(report, "int8-token") == ([], [])
    norm = tensors["model.layers.0.self_attn.k_norm.weight"]
    assert report["layers"][0]["key_size"] == pytest.approx(float(norm.mean()), rel=1e-5)
    assert "normalized after its projection" in render(report)


def test_statistics_replace_predictions(tmp_path: Path) -> None:
    source = str(write(tmp_path, with_big_bias(make_tensors(bias=True)), "qwen2"))
    radius = torch.ones(GROUPS, WIDTH // 2)
    tensors = {f"layers.{layer}.k.radius": radius for layer in range(LAYERS)}
    outlier = radius.clone()
    outlier[0, 0] = 90.0
    tensors["layers.2.k.folded.radius"] = outlier
    statistics = Statistics(tensors, {"num_hidden_layers": str(LAYERS)})
    report = diagnose(source, statistics)
    assert not is_broken("token", report["layers"][1]["lost"])
    assert is_broken("token", report["layers"][2]["lost_folded"])
    assert report["layers"][2]["outlier"] == pytest.approx(90.0)
    assert "weights and calibration statistics" in render(report)


def test_facts_of_layers_heads_and_sizes(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    settings = {"sliding_window": 16, "use_sliding_window": True, "layer_types": kinds, "tie_word_embeddings": True}
    facts = diagnose(str(write(tmp_path, make_tensors(), "qwen2", **settings)))["facts"]
    assert facts["layer_types"] == {"full_attention": 1, "sliding_attention": 2} and facts["sliding_window"] == 16
    assert facts["tied_embeddings"] and facts["query_heads_per_kv_head"] == 2
    assert facts["cache_bytes_per_token"]["float16"] == 2 * 2 * GROUPS * WIDTH * LAYERS
    assert facts["cache_bytes_per_token"]["int8"] == 2 * GROUPS * (WIDTH + 4) * LAYERS
    assert facts["weight_bytes"] == sum(4 * tensor.numel() for tensor in make_tensors().values())


def test_layers_slide_where_there_is_a_window(tmp_path: Path) -> None:
    """As the cache has it: without one, layers that are called sliding keep all their tokens."""
    settings = {"sliding_window": None, "layer_types": ["sliding_attention"] * LAYERS}
    facts = diagnose(str(write(tmp_path, make_tensors(), "qwen2", **settings)))["facts"]
    assert facts["layer_types"] == {"full_attention": LAYERS}
    assert isinstance(facts["cache_passes_weights_at"]["float16"], int)


@pytest.mark.parametrize("full, sliding, expected", [(2, 0, 500), (2, 2, 300), (1, 1, 900), (0, 2, None), (0, 20, 50)])
def test_length_at_which_the_cache_passes_the_weights(full: int, sliding: int, expected: int | None) -> None:
    assert _passes_at(10_000, 10, full, sliding, window={2: 200}.get(full, 100)) == expected


def test_layers_that_the_cache_refuses_are_named_and_not_read(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in make_tensors().items() if "layers.1.self_attn" not in name}
    source = write(tmp_path, tensors, "qwen2")
    edit_json(source / "config.json", layer_types=["full_attention", "linear_attention", "full_attention"])
    report = diagnose(str(source))
    assert [layer["layer"] for layer in report["layers"]] == [0, 2]
    assert report["recommendation"]["8 bits"]["preset"] is None
    assert "1 linear_attention (refused by the cache)" in render(report)


def test_a_head_that_fits_nothing_is_said(tmp_path: Path) -> None:
    tensors = {name: tensor[: tensor.shape[0] // WIDTH * 20] if "_proj.weight" in name and "attn" in name else tensor
               for name, tensor in make_tensors().items()}  # fmt: skip
    text = render(diagnose(str(write(tmp_path, tensors, head_dim=20))))
    assert "20: no power of two" in text and "no multiple of 8" in text and "no multiple of 32" in text
    assert "for 4 bits: octavo-4" in text


def test_spans() -> None:
    assert spans([0, 1, 2, 8]) == "0-2, 8" and spans([]) == "none" and spans([3]) == "3"


# ---- what it reads


def test_it_reads_biases_norms_and_k_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, make_tensors(bias=True), "qwen2")
    seen: list[str] = []
    read = KeyWeights.read
    monkeypatch.setattr(KeyWeights, "read", lambda self, name, *shape: (seen.append(name), read(self, name, *shape))[1])
    diagnose(str(source))
    parts = ("input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
    assert sorted(seen) == sorted(f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in parts)
    seen.clear()
    diagnose(str(write(tmp_path / "normalized", make_tensors(normalized=True), "qwen3")))
    assert set(seen) == {f"model.layers.{layer}.self_attn.k_norm.weight" for layer in range(LAYERS)}


def test_a_shard_larger_than_memory_is_no_matter(tmp_path: Path) -> None:
    source = write(tmp_path, make_tensors(), shards=2)
    index = source / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**places, "lm_head.weight": "model-huge.safetensors"}}))
    columns = 16 * 2**30
    header = {"lm_head.weight": {"dtype": "F16", "shape": [1, columns], "data_offsets": [0, 2 * columns]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (source / "model-huge.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * columns)
    assert diagnose(str(source))["facts"]["weight_bytes"] > 2 * columns


# ---- errors and output


def _drop(name: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        del tensors[name]
        save_file(tensors, source / "model.safetensors")

    return change


def _replace(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        save_file({**tensors, name: value}, source / "model.safetensors")

    return change


def _truncate(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a layer is missing": (_drop(K_PROJ), f"{K_PROJ} is missing"),
    "other names": (
        _drop("model.layers.0.self_attn.q_proj.weight"),
        "model.layers.0.self_attn.q_proj.weight is missing",
    ),
    "truncated": (_truncate, "truncated or damaged"),
    "nan": (_replace(K_PROJ, torch.full((GROUPS * WIDTH, HIDDEN), math.nan)), "holds NaN or Inf"),
    "shape": (_replace(K_PROJ, torch.ones(8, HIDDEN)), f"{K_PROJ} is [8, 64] and config.json makes it [64, 64]"),
    "layer norm": (_replace("model.layers.0.input_layernorm.bias", torch.ones(HIDDEN)), "RMSNorm"),
    "codes": (_replace(K_PROJ, torch.ones(GROUPS * WIDTH, HIDDEN, dtype=torch.int8)), "I8"),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), "no model*.safetensors"),
    "no config": (lambda source: (source / "config.json").unlink(), "holds no config.json"),
    "quantized": (lambda source: edit_json(source / "config.json", quantization_config={}), "quantized already"),
    "unknown": (lambda source: edit_json(source / "config.json", model_type="nobody"), "config.json"),
    "gemma": (
        lambda source: edit_json(source / "config.json", model_type="gemma"),
        "'gemma': the zoo states no anatomy of it",
    ),
    "no decoder": (
        lambda source: edit_json(source / "config.json", model_type="bert", num_key_value_heads=None),
        "'bert': the zoo states no anatomy of it",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_errors_are_one_line(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write(tmp_path, make_tensors())
    change, message = DAMAGES[damage]
    change(source)
    assert main(["--model_path", str(source)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_error_line(captured.err, message)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    source = str(write(tmp_path, make_tensors()))
    with pytest.raises(OctavoError, match="is of 2 layers"):
        diagnose(source, Statistics({}, {"num_hidden_layers": "2"}))
    wrong = {"layers.0.k.radius": torch.ones(1, 4)}
    with pytest.raises(OctavoError, match="another model"):
        diagnose(source, Statistics(wrong, {"num_hidden_layers": "3"}))


def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 2
    assert_one_error_line(capsys.readouterr().err, "--model_path")
    assert main(["--model_path", str(tmp_path / "nowhere")]) == 1
    assert_one_error_line(capsys.readouterr().err, "no such directory")
    assert main(["--model_path", str(tmp_path), "--statistics", str(tmp_path / "none")]) == 1
    assert_one_error_line(capsys.readouterr().err, "statistics file")


def test_both_outputs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = str(write(tmp_path, with_big_bias(make_tensors(bias=True)), "qwen2"))
    assert main(["--model_path", source, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out) == diagnose(source)
    assert main(["--model_path", source]) == 0
    assert capsys.readouterr().out == render(diagnose(source)) + "\n"


def test_the_public_name_takes_a_directory(tmp_path: Path) -> None:
    found = octavo.diagnose(str(write(tmp_path, make_tensors())))
    assert found["recommendation"]["8 bits"]["preset"] in found["schemes"]
