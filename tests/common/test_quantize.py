"""From float weights and statistics to W8A8 tensors, against the formulas in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from octavo.common.linear import W8A8DynamicLinear, W8A8Linear, decode_deq_scale, encode_deq_scale
from octavo.common.observe import InputObserver
from octavo.common.quantize import (
    AUTOMATIC,
    HISTOGRAM,
    MIN_MAX,
    input_range,
    outlier_score,
    quantize_linear,
    quantize_weight,
)
from octavo.common.statistics import Statistics

pytestmark = pytest.mark.usefixtures("one_thread")


def observed(values: torch.Tensor) -> Statistics:
    """Statistics of one linear, "x"."""
    observer = InputObserver()
    observer(values)
    return Statistics({f"linears.x.{part}": tensor for part, tensor in observer.tensors().items()}, {})


def squared_error(values: torch.Tensor, low: float, high: float) -> float:
    """Of int8 codes over a range, in float64."""
    scale = max((high - low) / 255, 1e-12)
    offset = round(-low / scale) - 128
    codes = (values.double() / scale + offset).round().clamp(-128, 127)
    return float(((codes - offset) * scale - values.double()).square().sum())


INPUTS = {
    "normal": lambda g: torch.randn(20_000, generator=g),
    "heavy tails": lambda g: torch.randn(20_000, generator=g) ** 3,
    "one outlier": lambda g: torch.cat([torch.randn(20_000, generator=g), torch.tensor([40.0])]),
    "positive": lambda g: torch.rand(20_000, generator=g) ** 4,
    "negative": lambda g: -torch.rand(20_000, generator=g),
    "constant": lambda g: torch.full((100,), 0.3),
}


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_histogram_range_is_inside_and_costs_less(inputs: str) -> None:
    values = INPUTS[inputs](torch.Generator().manual_seed(0))
    statistics = observed(values)
    all_low, all_high = input_range(statistics, "x", MIN_MAX)
    assert (all_low, all_high) == (min(0.0, float(values.min())), max(0.0, float(values.max())))
    low, high = input_range(statistics, "x", HISTOGRAM)
    assert all_low <= low <= 0 <= high <= all_high
    assert squared_error(values, low, high) <= squared_error(values, all_low, all_high) * 1.01
    if inputs in ("heavy tails", "one outlier"):
        assert squared_error(values, low, high) < 0.98 * squared_error(values, all_low, all_high)


def test_the_automatic_method_keeps_extreme_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    mild = torch.cat([torch.randn(20_000, generator=generator), torch.tensor([40.0])])
    extreme = torch.cat([torch.randn(20_000, generator=generator), torch.tensor([80.0])])
    for values, same_as in ((mild, HISTOGRAM), (extreme, MIN_MAX)):
        statistics = observed(values)
        assert input_range(statistics, "x", AUTOMATIC) == input_range(statistics, "x", same_as)
    assert outlier_score(observed(mild), "x") < 50 < outlier_score(observed(extreme), "x")
    assert outlier_score(observed(torch.zeros(5)), "x") == 0


@settings(deadline=None, max_examples=40)
@given(
    seed=some.integers(0, 2**31),
    low=some.floats(-20, 0),
    high=some.floats(0, 20),
    has_bias=some.booleans(),
    dtype=some.sampled_from([torch.int64, torch.float32]),
)
def test_every_tensor_follows_its_formula(
    seed: int, low: float, high: float, has_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(24, 7, bias=has_bias)
    with torch.no_grad():
        linear.weight[3] = 0
    tensors = quantize_linear(linear, low, high, dtype)
    weight = linear.weight.detach().double()
    eps = float(torch.finfo(torch.float32).eps)
    weight_scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(eps)
    input_scale = max((high - low) / 255, eps)
    torch.testing.assert_close(tensors["weight_scale"].double(), weight_scale, atol=0, rtol=1e-6)
    assert ((tensors["weight"].double() - weight / weight_scale).abs() <= 0.5001).all()
    assert tensors["weight"].abs().max() <= 127 and not tensors["weight"][3].any()
    assert float(tensors["input_scale"]) == pytest.approx(input_scale, rel=1e-6)
    assert abs(float(tensors["input_offset"]) - (-low / input_scale - 128)) <= 0.51
    deq_scale = decode_deq_scale(tensors["deq_scale"]).double()
    torch.testing.assert_close(deq_scale, input_scale * weight_scale[:, 0], atol=0, rtol=1e-5)
    bias = linear.bias.detach().double() if has_bias else torch.zeros(7).double()
    sums = tensors["weight"].double().sum(1)
    wanted = (bias / deq_scale - float(tensors["input_offset"]) * sums).clamp(-(2**31), 2**31 - 1)
    assert ((tensors["quant_bias"].double() - wanted).abs() <= 0.51 + wanted.abs() * 1e-6).all()
    assert ("bias" in tensors) == has_bias and tensors["deq_scale"].dtype == dtype


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_layer_computes_what_its_tensors_say(has_bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 20, bias=has_bias), torch.randn(5, 9, 48)
    tensors = quantize_linear(linear, float(x.min()), float(x.max()), torch.int64)
    layer = W8A8Linear(48, 20, has_bias, torch.int64)
    layer.load_state_dict(tensors)
    exact = linear.double()(x.double())
    error = (layer(x).double() - exact).square().mean().sqrt() / exact.std()
    assert error < 0.02
    scale, offset = tensors["input_scale"].double(), tensors["input_offset"].double()
    codes = (x.double() / scale + offset).round().clamp(-128, 127)
    decoded = (codes - offset) * scale @ (tensors["weight"].double() * tensors["weight_scale"].double()).T
    if has_bias:
        decoded = decoded + linear.bias
    half_a_step = (decode_deq_scale(tensors["deq_scale"]) * 0.51).double()
    assert ((layer(x).double() - decoded).abs() <= half_a_step + 1e-5).all(), "only quant_bias is rounded"


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_dynamic_layer_scales_each_token_by_itself(has_bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 20, bias=has_bias), torch.randn(5, 9, 48)
    x[0, 0] *= 1000  # an outlier costs no other token anything
    layer = W8A8DynamicLinear(48, 20, has_bias)
    layer.load_state_dict(quantize_weight(linear))
    exact = linear.double()(x.double())
    error = (layer(x).double() - exact).square().mean(dim=-1).sqrt() / exact.square().mean(dim=-1).sqrt()
    assert error.max() < 0.03


def test_deq_scale_as_msmodelslim_stores_it() -> None:
    scale = torch.tensor([1.0, 0.5, 3.1e-5])
    stored = encode_deq_scale(scale, torch.int64)
    assert stored.tolist() == [0x3F800000, 0x3F000000, int(scale.view(torch.int32)[2])]
    assert torch.equal(decode_deq_scale(stored), scale)
    assert encode_deq_scale(scale, torch.float32) is scale and decode_deq_scale(scale) is scale


def test_scales_keep_their_dtype_when_the_model_changes_its_own() -> None:
    layer = W8A8Linear(4, 3, True, torch.float32).half()
    assert layer.input_scale.dtype == layer.deq_scale.dtype == torch.float32
