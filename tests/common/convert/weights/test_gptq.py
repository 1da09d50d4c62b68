"""Error feedback: lower errors of outputs on inputs that go together, and rounding where they do not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from octavo.common.convert.weights import gptq
from octavo.common.convert.weights.gptq import error_feedback, gptq_codes
from octavo.common.convert.weights.quantize import quantize_linear
from octavo.common.errors import OctavoError
from octavo.common.runtime.schemes.linear_scheme import FP8_DYNAMIC, W4A16, W8A8_DYNAMIC, W8A16, LinearScheme

from .test_quantize import correlated, layer_of, seen

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = [
    LinearScheme(W4A16),
    LinearScheme(W4A16, 64, symmetric=False),
    LinearScheme(W4A16, 128),
    LinearScheme(W8A16, 32),
    LinearScheme(W8A8_DYNAMIC),
    LinearScheme(FP8_DYNAMIC),
]


def to_int4(units: torch.Tensor) -> torch.Tensor:
    return units.round().clamp(-8, 7)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.label}-{s.group_size}")
def test_errors_of_outputs_are_lower_on_tokens_that_were_not_seen(scheme: LinearScheme) -> None:
    torch.manual_seed(0)
    x, linear = correlated(192, 3000), nn.Linear(192, 40)
    known, new = x.split((2000, 1000))
    with torch.no_grad():
        exact = linear(new)
        errors = {}
        for method in ("MSE", "GPTQ"):
            chosen = LinearScheme(scheme.label, scheme.group_size, scheme.symmetric, w_method=method)
            layer = layer_of(linear, seen(known), chosen)
            weight = layer.float_weight()  # the inputs of int8 and fp8 layers have errors of their own
            errors[method] = float((new @ weight.T + linear.bias - exact).square().sum())
    assert errors["GPTQ"] < 0.75 * errors["MSE"]


def test_it_is_rounding_where_channels_do_not_go_together() -> None:
    in_features = 160
    x = torch.cat([torch.diag(0.5 + torch.rand(in_features)), torch.zeros(3, in_features)])
    linear = nn.Linear(in_features, 12)
    for scheme in SCHEMES:
        nearest, fed_back = (
            quantize_linear(
                linear, seen(x), LinearScheme(scheme.label, scheme.group_size, scheme.symmetric, w_method=m)
            )
            for m in ("MSE", "GPTQ")
        )
        for name, tensor in nearest.items():
            assert torch.equal(tensor.float(), fed_back[name].float()), (scheme, name)


@pytest.mark.parametrize("block", [5, 24, 128])
def test_it_is_what_the_paper_says_column_by_column(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition: after each column, the rest is the least squares answer to the errors so far."""
    monkeypatch.setattr(gptq, "BLOCK", block)
    torch.manual_seed(0)
    in_features, num_groups, x = 24, 3, correlated(24, 300).double()
    weight = torch.randn(5, in_features).double()
    scale, zero = 0.2 + 0.2 * torch.rand(5, num_groups), torch.randint(-3, 4, (5, num_groups)).float()
    scales, zeros = (part.repeat_interleave(in_features // num_groups, dim=1) for part in (scale, zero))
    hessian = x.T @ x / len(x)
    feedback = error_feedback(hessian.float())
    found = gptq_codes(weight.float(), feedback, scale, zero, to_int4)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(in_features)
    left, expected = weight.clone(), torch.zeros_like(weight)
    rest = feedback.order.flip(0).tolist()
    while rest:
        column, inverse = rest[0], torch.linalg.inv(hessian[rest][:, rest])
        expected[:, column] = to_int4(left[:, column] / scales[:, column] + zeros[:, column])
        decoded = (expected[:, column] - zeros[:, column]) * scales[:, column]
        error = (left[:, column] - decoded) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0][None]
        rest = rest[1:]
    assert feedback.order.tolist() == hessian.diagonal().argsort().tolist()
    assert (found == expected).float().mean() > 0.99


def test_channels_that_are_always_0_take_no_part() -> None:
    torch.manual_seed(0)
    x, weight = correlated(24, 300), torch.randn(5, 24)
    x[:, 3::8] = 0
    scale, zero = torch.full((5, 1), 0.3), torch.zeros(5, 1)
    codes = gptq_codes(weight, error_feedback(x.T @ x), scale, zero, to_int4)
    others = weight.clone()
    others[:, 3::8] += 1.0
    assert torch.equal(codes[:, 3::8], to_int4(weight[:, 3::8] / 0.3))
    same = gptq_codes(others, error_feedback(x.T @ x), scale, zero, to_int4)
    alive = [channel for channel in range(24) if channel % 8 != 3]
    assert torch.equal(codes[:, alive], same[:, alive])


def test_it_is_deterministic_and_leaves_what_it_is_given() -> None:
    x, linear = correlated(300, 50), nn.Linear(300, 20)  # fewer rows than channels, and no multiple of a block
    before, inputs = linear.weight.detach().clone(), seen(x)
    hessian = inputs.hessian.clone()
    scheme = LinearScheme(W8A16, w_method="GPTQ")
    first, second = (quantize_linear(linear, inputs, scheme) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(linear.weight, before) and torch.equal(inputs.hessian, hessian)


def test_inputs_without_a_hessian_are_refused() -> None:
    inputs = replace(seen(torch.randn(9, 32)), hessian=None)
    with pytest.raises(OctavoError, match="needs the mean of x x"):
        quantize_linear(nn.Linear(32, 3), inputs, LinearScheme(W8A16, w_method="GPTQ"))


def test_inputs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(OctavoError, match="NaN or Inf"):
        error_feedback(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]))
    feedback = error_feedback(torch.zeros(8, 8))
    weight = torch.randn(3, 8)
    codes = gptq_codes(weight, feedback, torch.full((3, 1), 0.5), torch.zeros(3, 1), to_int4)
    assert torch.equal(codes, to_int4(weight / 0.5))
