"""Linears of int4 whose scales and zero points are in 8 bits: what they compute, hold, and refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

from octavo.common.convert.weights.quantize import quantize_linear
from octavo.common.errors import OctavoError
from octavo.common.runtime.double_linear import W4A16DoubleLinear
from octavo.common.runtime.linear_kinds import empty_linear
from octavo.common.runtime.schemes.linear_scheme import W4A16, W4A16_DOUBLE, LinearInputs, LinearScheme

pytestmark = pytest.mark.usefixtures("one_thread")

IN, OUT, GROUP = 96, 40, 32


def seen(x: torch.Tensor) -> LinearInputs:
    return LinearInputs(x.amin(0), x.amax(0), x.abs().mean(0), x.square().mean(0), x, x.T @ x / len(x))


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT).requires_grad_(False)


@pytest.fixture
def parts(linear: nn.Linear) -> dict[str, torch.Tensor]:
    return quantize_linear(linear, None, LinearScheme(W4A16_DOUBLE, group_size=GROUP))


def loaded(parts: dict[str, torch.Tensor], activations: str = "float") -> W4A16DoubleLinear:
    layer = W4A16DoubleLinear(IN, OUT, True, IN // GROUP)
    layer.load_state_dict(parts)
    layer.cpu_activations = activations
    layer.check("layer")
    return layer


def test_the_weight_follows_the_formula(parts: dict[str, torch.Tensor]) -> None:
    packed = parts["weight"].view(OUT, IN // 32, 16)
    codes = torch.cat([packed & 15, packed >> 4], dim=-1).view(OUT, -1, GROUP).double() - 8
    scale = (parts["weight_scale"].float() * parts["row_scale"]).half().double()[..., None]
    expected = (codes - parts["weight_offset"].double()[..., None] / 16) * scale
    assert torch.equal(loaded(parts).float_weight().double(), expected.view(OUT, IN))


@pytest.mark.parametrize(("activations", "tolerance"), [("float", 1e-5), ("int8", 0.02)])
def test_outputs_are_those_of_the_weight(parts: dict[str, torch.Tensor], activations: str, tolerance: float) -> None:
    layer, x = loaded(parts, activations), torch.randn(5, IN)
    expected = nn.functional.linear(x, layer.float_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_what_was_loaded_can_be_had_again_bit_for_bit(parts: dict[str, torch.Tensor], activations: str) -> None:
    layer, x = loaded(parts, activations), torch.randn(2, IN)
    expected = layer(x)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half()):
        found = other.state_dict()
        assert all(torch.equal(found[name], part) for name, part in parts.items() if name != "bias")
    assert torch.equal(layer(x), expected)


def test_a_scale_that_is_set_by_hand_counts(parts: dict[str, torch.Tensor]) -> None:
    layer = loaded(parts, "int8")
    before = layer.float_weight()
    layer.row_scale = layer.row_scale * 2
    torch.testing.assert_close(layer.float_weight(), 2 * before, atol=1e-5, rtol=1e-3)


def test_scales_in_codes_cost_nothing_and_zeros_between_codes_spare_error(linear: nn.Linear) -> None:
    x = torch.randn(300, IN)

    def loss(label: str, method: str) -> float:
        scheme = LinearScheme(label, group_size=GROUP, symmetric=False, w_method=method)
        layer = empty_linear(label, IN, OUT, True, num_groups=IN // GROUP)
        layer.load_state_dict(quantize_linear(linear, seen(x), scheme))
        return float((layer(x) - linear(x)).square().mean())

    for method in ("MinMax", "MSE", "GPTQ"):
        assert loss(W4A16_DOUBLE, method) < loss(W4A16, method)
    assert loss(W4A16_DOUBLE, "GPTQ") < loss(W4A16_DOUBLE, "MSE") < loss(W4A16_DOUBLE, "MinMax")


def test_a_weight_that_lies_on_such_a_grid_is_kept(linear: nn.Linear) -> None:
    """Blocks of 32 of 16 equidistant values, as of GGUF's Q4_1, whose scales differ; zero lies between codes."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (OUT, IN // GROUP, GROUP), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    row = torch.rand(OUT, 1, 1, generator=generator) / 100 + 1e-3
    scale = row * torch.randint(100, 256, (OUT, IN // GROUP, 1), generator=generator) / 255
    scale[:, 0] = row[:, 0]
    weight = (codes - 7.5625) * scale
    linear.weight.copy_(weight.view(OUT, IN))
    for method in ("MinMax", "MSE"):
        scheme = LinearScheme(W4A16_DOUBLE, group_size=GROUP, w_method=method)
        found = loaded(quantize_linear(linear, seen(torch.randn(300, IN)), scheme)).float_weight()
        torch.testing.assert_close(found, linear.weight, atol=1e-5, rtol=1e-3)


def test_a_row_and_a_group_of_zeros(linear: nn.Linear) -> None:
    linear.weight[3] = 0
    linear.weight[5, :GROUP] = 0
    for method in ("MinMax", "MSE"):
        scheme = LinearScheme(W4A16_DOUBLE, group_size=GROUP, w_method=method)
        layer = loaded(quantize_linear(linear, seen(torch.randn(300, IN)), scheme), "int8")
        assert not layer.float_weight()[3].any() and not layer.float_weight()[5, :GROUP].any()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [("weight_scale", 0, "layer.weight_scale holds codes of 0"), ("row_scale", -1, "layer.row_scale is no positive")],
)
def test_damaged_parts_are_named(parts: dict[str, torch.Tensor], part: str, value: int, message: str) -> None:
    parts[part][0, 0] = value
    with pytest.raises(OctavoError, match=message):
        loaded(parts)
