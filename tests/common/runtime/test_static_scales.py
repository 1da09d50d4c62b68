"""Calibration statistics: saved once, and the source of every static scale."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import save_file
from transformers import Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from octavo.common.convert.calibration.observe import AttentionObserver, calibrate
from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.rotary import hadamard
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.common.runtime.static_scales import (
    Statistics,
    load_statistics,
    rotary_radius,
    scales_of,
    symmetric_scale,
)

from ...support import random_ids, tiny_config, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


def some_statistics(layers: int = 2) -> Statistics:
    """H = 4, G = 2, D = 16."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for name, shape in (
            ("q.radius", (4, 8)),
            ("k.radius", (2, 8)),
            ("v.high", (2, 16)),
        ):
            tensors[f"layers.{layer}.{name}"] = torch.rand(shape, generator=generator) + 0.1
        tensors[f"layers.{layer}.v.low"] = -tensors[f"layers.{layer}.v.high"] / 2
    return Statistics(tensors, {"model_type": "llama", "num_hidden_layers": str(layers), "tokens": "7"})


def test_a_round_trip_loses_nothing(tmp_path: Path) -> None:
    statistics = some_statistics()
    statistics.save(tmp_path / "statistics.safetensors")
    back = load_statistics(tmp_path / "statistics.safetensors")
    assert back.layers == 2 and statistics.metadata.items() <= back.metadata.items()
    assert back.tensors.keys() == statistics.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in statistics.tensors.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named(bad: float, tmp_path: Path) -> None:
    statistics = some_statistics()
    statistics.tensors["layers.1.k.radius"][0, 3] = bad
    statistics.save(tmp_path / "statistics.safetensors")
    with pytest.raises(OctavoError, match=r"layers\.1\.k\.radius holds NaN or Inf"):
        load_statistics(tmp_path / "statistics.safetensors")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="cannot be read"):
        load_statistics(tmp_path / "missing")
    (tmp_path / "text").write_text("no safetensors file at all")
    with pytest.raises(OctavoError, match="cannot be read"):
        load_statistics(tmp_path / "text")
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(OctavoError, match="no Octavo statistics"):
        load_statistics(tmp_path / "other")
    some_statistics().save(tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:-50])
    with pytest.raises(OctavoError, match="cannot be read"):
        load_statistics(tmp_path / "half")
    with pytest.raises(OctavoError, match="cannot be written"):
        some_statistics().save(tmp_path / "no" / "such" / "folder")


def spoiled(change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    tensors = some_statistics().tensors
    change(tensors)
    return tensors


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("layers.1.v.low"), r"layers\.1\.v\.low is missing"),
    "missing end of a range": (lambda t: t.pop("layers.0.v.high"), r"layers\.0\.v\.high is missing"),
    "unknown": (lambda t: t.update({"layers.0.w.max": torch.ones(2, 16)}), r"layers\.0\.w\.max is none"),
    "of a layer too many": (lambda t: t.update({"layers.2.k.max": torch.ones(2, 16)}), r"layers\.2\.k\.max"),
    "negative": (lambda t: t["layers.1.k.radius"][1].neg_(), r"layers\.1\.k\.radius is negative"),
    "a low above its high": (lambda t: t["layers.0.v.low"].fill_(9.0), r"layers\.0\.v\.low exceeds layers\.0\.v\.high"),
    "a vector": (lambda t: t.update({"layers.0.q.max": torch.ones(16)}), r"layers\.0\.q\.max is .* of shape \[16\]"),
    "of another dtype": (lambda t: t.update({"layers.0.q.max": torch.ones(4, 16).half()}), "float16"),
    "a codebook that descends": (
        lambda t: t.update({"layers.0.k.levels.2": torch.tensor([0.0, 1.0, 0.5, 2.0])}),
        r"layers\.0\.k\.levels\.2 holds no codebook",
    ),
    "a mean that is negative": (
        lambda t: t.update({f"linears.a.{part}": -torch.ones(8) for part in ("low", "high", "mean_abs")}),
        r"linears\.a\.mean_abs is negative",
    ),
}


@pytest.mark.parametrize("damage", BAD_TENSORS)
def test_tensors_that_no_statistics_hold(damage: str, tmp_path: Path) -> None:
    change, part = BAD_TENSORS[damage]
    Statistics(spoiled(change), some_statistics().metadata).save(tmp_path / "statistics.safetensors")
    with pytest.raises(OctavoError, match=part):
        load_statistics(tmp_path / "statistics.safetensors")


@pytest.mark.parametrize("layers", ["abc", "", "-1", "2.0", "0", "99999999999", None])
def test_metadata_that_tells_no_number_of_layers(layers: str | None, tmp_path: Path) -> None:
    metadata = {**some_statistics().metadata, "num_hidden_layers": layers}
    metadata = {name: text for name, text in metadata.items() if text is not None}
    Statistics(some_statistics().tensors, metadata).save(tmp_path / "statistics.safetensors")
    with pytest.raises(OctavoError, match="num_hidden_layers"):
        load_statistics(tmp_path / "statistics.safetensors")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_hidden_layers": 3}, "2 layers, and this model has 3"),
        ({"num_key_value_heads": 4}, r"k\.radius is of shape \[2, 8\], and this model's of \[4, 8\]"),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, r"q\.radius is of shape \[4, 8\]"),
        ({"head_dim": 32}, r"of shape \[2, 8\], and this model's of \[2, 16\]"),
    ],
)
def test_statistics_of_another_model(changes: dict[str, int], part: str, tmp_path: Path) -> None:
    some_statistics().save(tmp_path / "statistics.safetensors")
    config = tiny_config(**{"num_hidden_layers": 2, **changes})
    with pytest.raises(OctavoError, match=part):
        QuantizedCache(config, "ascend-c8", statistics=tmp_path / "statistics.safetensors")


def test_statistics_of_another_architecture() -> None:
    config = tiny_config(num_hidden_layers=2)
    some_statistics().check_model(config)
    with pytest.raises(OctavoError, match="model_type is 'llama', and this model's 'qwen3'"):
        some_statistics().check_model(Qwen3Config(**{**config.to_dict(), "model_type": "qwen3"}))


def test_scales_per_channel_bound_the_pair(statistics: Statistics | None = None) -> None:
    statistics = some_statistics()
    scales = scales_of(load_scheme("ascend-c8"), statistics)
    for layer, scale in enumerate(scales):
        radius, largest = (statistics.tensors[f"layers.{layer}.{name}"] for name in ("k.radius", "v.high"))
        assert scale.key[0].shape == scale.value[0].shape == (2, 1, 16) and scale.query is None
        assert scale.key[1] is None and scale.value[1] is None
        for channel in range(16):
            torch.testing.assert_close(scale.key[0][:, 0, channel] * 127, radius[:, channel % 8])
        torch.testing.assert_close(scale.value[0][:, 0] * 127, largest)


def test_scales_per_head_take_the_largest() -> None:
    statistics = some_statistics()
    for layer, scale in enumerate(scales_of(load_scheme("ascend-fa"), statistics)):
        assert scale.query.shape == (4, 1, 1) and scale.key[0].shape == scale.value[0].shape == (2, 1, 1)
        for found, name in ((scale.query, "q.radius"), (scale.key[0], "k.radius"), (scale.value[0], "v.high")):
            torch.testing.assert_close(found[:, 0, 0] * 127, statistics.tensors[f"layers.{layer}.{name}"].amax(1))


def test_dynamic_schemes_and_float_layers_have_no_scales() -> None:
    assert all(s.key is s.value is s.query is None for s in scales_of(load_scheme("int8-token"), some_statistics()))
    scheme = Scheme.from_dict({**load_scheme("ascend-fa").to_dict(), "float_layers": [0]})
    first, second = scales_of(scheme, some_statistics())
    assert first.key is first.query is None and second.query is not None


def test_a_channel_of_zeros_has_a_usable_scale() -> None:
    assert (symmetric_scale(torch.zeros(3)) > 0).all()


def observer() -> AttentionObserver:
    """Of an attention without biases."""
    return AttentionObserver((None, None), torch.ones(8), 1.0)


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    """RoPE of transformers on `[1, heads, 1, D]`."""
    cos, sin = LlamaRotaryEmbedding(tiny_config(head_dim=x.shape[-1]))(x, torch.tensor([[position]]))
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


@settings(deadline=None, max_examples=60)
@given(seed=some.integers(0, 2**31), position=some.integers(0, 131_071), other=some.integers(0, 131_071))
def test_a_radius_holds_at_every_position(seed: int, position: int, other: int) -> None:
    """What was observed at one position bounds each channel at any other; the largest |k| of a channel does not."""
    x = torch.randn((1, 2, 1, 16), generator=torch.Generator().manual_seed(seed)) * 10
    torch.testing.assert_close(rotary_radius(rotated(x, position)), rotary_radius(x), atol=1e-4, rtol=1e-4)
    seen = observer()
    seen(rotated(x, position), rotated(x, position), x)
    bound = seen.tensors()["k.radius"].repeat(1, 2)
    assert (rotated(x, other)[0, :, 0].abs() <= bound * 1.0001).all()


def test_a_maximum_after_rope_does_not_hold_at_another_position() -> None:
    x = torch.zeros((1, 1, 1, 16))
    x[..., 0] = 5.0
    seen = observer()
    seen(rotated(x, 0), rotated(x, 0), x)
    later = rotated(x, 2)[0, :, 0].abs()
    assert (later > rotated(x, 0)[0, :, 0].abs()).any()
    assert (later <= seen.tensors()["k.radius"].repeat(1, 2) * 1.0001).all()


def test_short_calibration_does_not_clip_long_prompts() -> None:
    """Calibrated on 40 tokens, the codes of the same tokens at position 3,000 are not at their limits."""
    model, ids = tiny_llama(), random_ids(1, 40)
    statistics = calibrate(model, [], [{"input_ids": ids}])
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.inference_mode():
        model(ids)
    key = seen[0].view(1, 40, 2, 16).transpose(1, 2)
    scale = scales_of(load_scheme("ascend-c8"), statistics)[0].key[0]
    at_max = (
        torch.cat([rotated(key[:, :, i : i + 1], i) for i in range(40)], dim=2).abs().amax(dim=2, keepdim=True) / 127
    )
    for offset in range(0, 3000, 301):
        later = torch.cat([rotated(key[:, :, i : i + 1], offset + i) for i in range(40)], dim=2)
        assert ((later / scale).abs().round() <= 127).all()
    assert ((later / at_max).abs().round() > 127).any(), "maxima after RoPE would clip"


def test_scales_of_rotated_heads_bound_their_length() -> None:
    statistics = some_statistics()
    states = statistics.tensors["layers.1.k.radius"][:, None]  # one token, its pairs at their largest
    rotated = hadamard(torch.cat((states, torch.zeros_like(states)), dim=-1))
    scale = scales_of(load_scheme("vllm-fp8-head"), statistics)[1].key[0]
    assert (rotated.abs() <= 448 * scale * (1 + 1e-6)).all()
    plain = scales_of(dataclasses.replace(load_scheme("vllm-fp8-head"), rotate_key=False), statistics)[1].key[0]
    assert (scale > plain).all()
