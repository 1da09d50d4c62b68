"""From float weights and what calibration saw to tensors of quantized linears, against the formulas in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from octavo.common.convert.weights.quantize import output_error, quantize_linear
from octavo.common.errors import OctavoError
from octavo.common.runtime.linear_kinds import empty_linear
from octavo.common.runtime.schemes.linear_scheme import (
    FP8,
    FP8_DYNAMIC,
    LINEAR_LABELS,
    W4A16,
    W4A16_DOUBLE,
    W8A8,
    W8A8_DYNAMIC,
    W8A8_MIXED,
    W8A16,
    LinearInputs,
    LinearScheme,
)
from octavo.common.runtime.w8a8_linear import (
    W8A8DynamicLinear,
    W8A8Linear,
    decode_deq_scale,
    encode_deq_scale,
    outlier_count,
)

from ....metrics import rmse_in_std

pytestmark = pytest.mark.usefixtures("one_thread")


def seen(x: torch.Tensor, rows: int | None = None) -> LinearInputs:
    """What calibration knows of inputs `[T, K]`, of whose tokens it keeps the first `rows`."""
    return LinearInputs(x.amin(0), x.amax(0), x.abs().mean(0), x.square().mean(0), x[:rows], x.T @ x / len(x))


def within(low: float, high: float, in_features: int) -> LinearInputs:
    """Inputs of `in_features` channels that lie between two values and reach them."""
    x = torch.zeros(2, in_features)
    x[0, 0], x[1, 0] = low, high
    return seen(x)


@settings(deadline=None, max_examples=40)
@given(
    seed=some.integers(0, 2**31),
    low=some.floats(-20, 0),
    high=some.floats(0, 20),
    has_bias=some.booleans(),
    dtype=some.sampled_from([torch.float16, torch.bfloat16]),
)
def test_every_tensor_follows_its_formula(
    seed: int, low: float, high: float, has_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(24, 7, bias=has_bias)
    with torch.no_grad():
        linear.weight[3] = 0
    tensors = quantize_linear(linear, within(low, high, 24), LinearScheme(), dtype)
    weight = linear.weight.detach().double()
    eps = float(torch.finfo(torch.float32).eps)
    weight_scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(eps)
    exact, input_scale = max((high - low) / 255, eps), float(tensors["input_scale"])
    torch.testing.assert_close(tensors["weight_scale"].double(), weight_scale, atol=0, rtol=1e-6)
    assert ((tensors["weight"].double() - weight / weight_scale).abs() <= 0.5001).all()
    assert (
        not tensors["weight_offset"].any() and tensors["weight"].abs().max() <= 127 and not tensors["weight"][3].any()
    )
    assert exact * (1 - 1e-6) <= input_scale <= exact * (1 + torch.finfo(dtype).eps) + 2**-24  # a step of float16 there
    assert torch.equal(tensors["input_scale"].to(dtype).float(), tensors["input_scale"])
    assert abs(float(tensors["input_offset"]) - (-low / input_scale - 128)) <= 0.51
    deq_scale = decode_deq_scale(tensors["deq_scale"]).double()
    torch.testing.assert_close(deq_scale, input_scale * weight_scale[:, 0], atol=0, rtol=1e-5)
    bias = linear.bias.detach().double() if has_bias else torch.zeros(7).double()
    stored = torch.int64 if dtype == torch.float16 else torch.float32
    sums = tensors["weight"].double().sum(1)
    wanted = (bias / deq_scale - float(tensors["input_offset"]) * sums).clamp(-(2**31), 2**31 - 1)
    assert ((tensors["quant_bias"].double() - wanted).abs() <= 0.51 + wanted.abs() * 1e-6).all()
    assert ("bias" in tensors) == has_bias and tensors["deq_scale"].dtype == stored


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_layer_computes_what_its_tensors_say(has_bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 20, bias=has_bias), torch.randn(5, 9, 48)
    tensors = quantize_linear(linear, seen(x.flatten(0, 1)), LinearScheme(), torch.float16)
    layer = W8A8Linear(48, 20, has_bias, torch.int64)
    layer.load_state_dict(tensors)
    exact = linear.double()(x.double())
    error = rmse_in_std(layer(x).double(), exact)
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
    layer.load_state_dict(quantize_linear(linear, None, LinearScheme(W8A8_DYNAMIC)))
    exact = linear.double()(x.double())
    error = (layer(x).double() - exact).square().mean(dim=-1).sqrt() / exact.square().mean(dim=-1).sqrt()
    assert error.max() < 0.03


def test_deq_scale_as_msmodelslim_stores_it() -> None:
    scale = torch.tensor([1.0, 0.5, 3.1e-5])
    stored = encode_deq_scale(scale, torch.int64)
    assert stored.tolist() == [0x3F800000, 0x3F000000, int(scale.view(torch.int32)[2])]
    assert torch.equal(decode_deq_scale(stored), scale)
    assert encode_deq_scale(scale, torch.float32) is scale and decode_deq_scale(scale) is scale


def correlated(in_features: int, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """Inputs `[T, K]` whose channels go together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(in_features) + 0.2 * torch.randn(in_features, in_features, generator=generator)
    sizes = 0.2 + 5 * torch.rand(in_features, generator=generator) ** 4
    return torch.randn(tokens, in_features, generator=generator) @ mixing * sizes


def every_scheme() -> list[LinearScheme]:
    """All labels with all that they can be given."""
    groups = [
        LinearScheme(label, size, way) for label in (W8A16, W4A16) for size in (0, 32, 128) for way in (True, False)
    ]
    fp8 = [LinearScheme(label, per_tensor=one) for label in (FP8, FP8_DYNAMIC) for one in (True, False)]
    double = [LinearScheme(W4A16_DOUBLE, size) for size in (0, 32)]
    return [LinearScheme(label) for label in (W8A8, W8A8_DYNAMIC, W8A8_MIXED)] + groups + double + fp8


def name_of(scheme: LinearScheme) -> str:
    options = [scheme.label, str(scheme.group_size)]
    return "-".join(options + ["affine"] * (not scheme.symmetric) + ["tensor"] * scheme.per_tensor)


def layer_of(linear: nn.Linear, inputs: LinearInputs, scheme: LinearScheme) -> nn.Module:
    """The quantized layer, filled."""
    num_groups = scheme.num_groups(linear.in_features)
    options = {"num_groups": num_groups, "per_tensor": scheme.per_tensor}
    layer = empty_linear(scheme.label, linear.in_features, linear.out_features, linear.bias is not None, **options)
    layer.load_state_dict(quantize_linear(linear, inputs, scheme))
    layer.check("layer")
    return layer


LARGEST_ERROR = {
    W8A16: 0.008,
    W4A16: 0.12,
    W4A16_DOUBLE: 0.12,
    FP8: 0.05,
    FP8_DYNAMIC: 0.05,
    W8A8: 0.06,
    W8A8_DYNAMIC: 0.03,
    W8A8_MIXED: 0.02,
}


@pytest.mark.parametrize("method", ["MinMax", "MSE", "GPTQ"])
@pytest.mark.parametrize("scheme", every_scheme(), ids=name_of)
@pytest.mark.parametrize("in_features", [96, 192])
def test_the_error_that_is_foretold_is_that_of_the_layer(in_features: int, scheme: LinearScheme, method: str) -> None:
    torch.manual_seed(0)
    x, linear = correlated(in_features), nn.Linear(in_features, 48, bias=False)
    scheme = LinearScheme(scheme.label, scheme.group_size, scheme.symmetric, scheme.per_tensor, method)
    with torch.no_grad():
        exact = linear(x)
        error = (layer_of(linear, seen(x), scheme)(x) - exact).square().sum()
        foretold = output_error(linear.weight, seen(x), scheme, (x @ linear.weight.float().T).detach())
    assert foretold.dim() == 0 and float(foretold / exact.square().sum()) ** 0.5 < LARGEST_ERROR[scheme.label]
    if method == "MinMax":
        torch.testing.assert_close(error, foretold, rtol=0.01, atol=0)
    else:
        assert error < 1.01 * foretold


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("label", [W8A16, W4A16])
def test_the_error_that_is_foretold_counts_inputs_in_int8(label: str, group_size: int) -> None:
    torch.manual_seed(0)
    x, linear = correlated(96), nn.Linear(96, 48, bias=False)
    scheme = LinearScheme(label, group_size)
    layer = layer_of(linear, seen(x), scheme)
    layer.cpu_activations = "int8"
    with torch.no_grad():
        error, exact = (layer(x) - linear(x)).square().sum(), linear(x)
        foretold, plain = (
            output_error(linear.weight, seen(x), scheme, exact, quantizes) for quantizes in (True, False)
        )
    torch.testing.assert_close(error, foretold, rtol=0.01, atol=0)
    assert foretold > plain


@pytest.mark.parametrize("scheme", every_scheme(), ids=name_of)
def test_a_large_weight_is_done_in_pieces(scheme: LinearScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, linear = correlated(64, 100), nn.Linear(64, 50).bfloat16()
    exact = (x @ linear.weight.float().T).detach()
    for method in ("MinMax", "MSE", "GPTQ"):
        chosen = LinearScheme(scheme.label, scheme.group_size, scheme.symmetric, scheme.per_tensor, method)
        whole = quantize_linear(linear, seen(x), chosen)
        error = output_error(linear.weight, seen(x), chosen, exact)
        with monkeypatch.context() as patch:
            patch.setattr("octavo.common.convert.weights.weight_quantizer.ROWS", 16)
            patch.setattr("octavo.common.convert.weights.quantize.ROWS", 16)
            pieces = quantize_linear(linear, seen(x), chosen)
            torch.testing.assert_close(output_error(linear.weight, seen(x), chosen, exact), error, rtol=1e-3, atol=0)
        assert whole.keys() == pieces.keys() and whole["bias"].dtype == torch.bfloat16
        for name, tensor in whole.items():
            same = (tensor.float() == pieces[name].float()).float().mean()
            assert tensor.is_contiguous() and same > 0.99, name


def error_of(scheme: LinearScheme, linear: nn.Linear, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((layer_of(linear, seen(x), scheme)(x) - linear(x)).square().sum())


@pytest.mark.parametrize("label", [W8A16, W4A16])
def test_groups_zeros_and_searched_ranges_lower_the_error(label: str) -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(400, 256), nn.Linear(256, 64, bias=False)
    with torch.no_grad():  # heavy tails beside a mean
        linear.weight.mul_(16).pow_(3).add_(0.3 * linear.weight.abs().max() * torch.rand(64, 1))
    errors = [error_of(LinearScheme(label, size), linear, x) for size in (0, 256, 128, 64, 32)]
    assert errors[0] == errors[1] and all(less < more for more, less in itertools.pairwise(errors[1:]))
    assert error_of(LinearScheme(label, 0, symmetric=False), linear, x) < errors[0]
    assert error_of(LinearScheme(label, 64, symmetric=False), linear, x) < errors[3]
    minmax, searched = (LinearScheme(W4A16, 128, w_method=method) for method in ("MinMax", "MSE"))
    assert error_of(searched, linear, x) < 0.9 * error_of(minmax, linear, x)


@pytest.mark.parametrize(("in_features", "num_groups"), [(96, 1), (576, 6), (4096, 32), (1536, 12), (160, 5)])
def test_groups_divide_what_128_does_not(in_features: int, num_groups: int) -> None:
    scheme = LinearScheme(W4A16, 128, symmetric=False)
    tensors = quantize_linear(nn.Linear(in_features, 3), None, scheme)
    assert tensors["weight_scale"].shape == tensors["weight_offset"].shape == (3, num_groups)
    assert tensors["weight"].shape == (3, in_features // 2) and tensors["weight"].dtype == torch.uint8


def test_affine_codes_reach_the_ends_of_a_weight_and_hold_zero() -> None:
    weight = torch.tensor([[-1.0, 0.0, 2.0, 0.5], [0.5, 1.0, 0.25, 2.0], [0.0, 0.0, 0.0, 0.0]]).repeat(1, 8)
    linear = nn.Linear(32, 3, bias=False)
    linear.weight = nn.Parameter(weight)
    for label, levels in ((W4A16, 15), (W8A16, 255)):
        layer = layer_of(linear, within(-1, 1, 32), LinearScheme(label, symmetric=False))
        torch.testing.assert_close(layer.weight_scale[:2, 0], torch.tensor([3.0, 2.0]) / levels)
        assert (layer.float_weight() - weight).abs().max() <= 0.51 * layer.weight_scale.max()
        assert torch.equal(layer.float_weight() == 0, weight == 0)
        assert layer.weight_offset.frac().eq(0).all()


def test_int4_is_symmetric_about_0_with_its_lowest_code_to_spare() -> None:
    linear = nn.Linear(64, 16, bias=False)
    layer = layer_of(linear, within(-1, 1, 64), LinearScheme(W4A16, 32))
    largest = linear.weight.detach().view(16, 2, 32).abs().amax(-1)
    torch.testing.assert_close(layer.weight_scale, largest / 7)
    assert not layer.weight_offset.any()


@pytest.mark.parametrize("per_tensor", [True, False])
def test_fp8_scales(per_tensor: bool) -> None:
    linear, x = nn.Linear(32, 4, bias=False), torch.randn(9, 32)
    tensors = quantize_linear(linear, seen(x), LinearScheme(FP8, per_tensor=per_tensor))
    extent = linear.weight.detach().abs()
    largest = extent.max().view(1, 1) if per_tensor else extent.amax(1, keepdim=True)
    torch.testing.assert_close(tensors["weight_scale"], largest / 448)
    torch.testing.assert_close(tensors["input_scale"], x.abs().max().view(1) / 448)
    assert tensors["weight"].dtype == torch.float8_e4m3fn and "weight_offset" not in tensors


@pytest.mark.parametrize(("in_features", "count"), [(8, 8), (64, 16), (1024, 16), (1025, 32), (4096, 64), (14336, 224)])
def test_outlier_columns_are_told_by_in_features(in_features: int, count: int) -> None:
    assert outlier_count(in_features) == count


@pytest.mark.parametrize("method", ["MinMax", "GPTQ"])
def test_outliers_stay_in_float(method: str) -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(200, 64), nn.Linear(64, 8)
    worst = torch.tensor([5, 17, 40])
    x[:, worst] *= 100
    layer = layer_of(linear, seen(x), LinearScheme(W8A8_MIXED, w_method=method))
    outliers = layer.outlier_columns.long()
    assert set(worst.tolist()) <= set(outliers.tolist()) and outliers.diff().gt(0).all()
    assert not layer.weight[:, outliers].any()
    assert torch.equal(layer.outlier_weight, linear.weight.detach()[:, outliers])
    exact = linear(x)
    dynamic = layer_of(linear, seen(x), LinearScheme(W8A8_DYNAMIC))
    assert (layer(x) - exact).std() < 0.1 * (dynamic(x) - exact).std()


def test_dead_channels_weigh_nothing_and_break_nothing() -> None:
    x = correlated(64)
    x[:, ::2] = 0
    linear = nn.Linear(64, 8)
    for label in LINEAR_LABELS:
        for method in ("MSE", "GPTQ"):
            tensors = quantize_linear(linear, seen(x), LinearScheme(label, w_method=method))
            assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
            assert (tensors["weight_scale"] > 0).all()


def test_what_cannot_be_quantized_is_refused() -> None:
    linear = nn.Linear(40, 8)
    for scheme in (LinearScheme(), LinearScheme(FP8), LinearScheme(W8A8_MIXED), LinearScheme(W4A16, w_method="GPTQ")):
        with pytest.raises(OctavoError, match="needs inputs"):
            quantize_linear(linear, None, scheme)
    for scheme in (LinearScheme(W4A16), LinearScheme(W8A16, 32)):
        with pytest.raises(OctavoError, match="32"):
            quantize_linear(linear, None, scheme)
