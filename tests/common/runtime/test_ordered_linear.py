"""Weight-only linears whose columns lie in another order than their input, as act-order leaves them."""

import pytest
import torch
from torch import nn

from octavo import LinearScheme, OctavoError
from octavo.common.convert.source.quantized.weight import CodedWeight
from octavo.common.convert.weights.coded import coded_parts
from octavo.common.runtime.fused_layers import NotFused, layer_linear
from octavo.common.runtime.linear_kinds import empty_linear
from octavo.common.runtime.ordered_linear import OrderedLinear
from octavo.common.runtime.schemes.linear_scheme import W4A16_ORDERED, W8A16_ORDERED

KINDS = pytest.mark.parametrize("label", [W4A16_ORDERED, W8A16_ORDERED])
IN_FEATURES, OUT_FEATURES, GROUPS = 96, 24, 3


def example(label: str, has_bias: bool = True, activations: str = "float") -> tuple[OrderedLinear, CodedWeight]:
    """A filled layer, and the weight that it holds, whose groups are mixed up."""
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (OUT_FEATURES, IN_FEATURES), dtype=torch.int8)
    order = (torch.arange(IN_FEATURES) // 32)[torch.randperm(IN_FEATURES)]
    zero = torch.randint(-3, 3, (OUT_FEATURES, GROUPS)).float()
    weight = CodedWeight(codes, torch.rand(OUT_FEATURES, GROUPS) + 0.1, zero, order)
    bias = torch.randn(OUT_FEATURES) if has_bias else None
    layer = empty_linear(label, IN_FEATURES, OUT_FEATURES, has_bias, num_groups=GROUPS, cpu_activations=activations)
    layer.load_state_dict(coded_parts("a.b", weight, label, bias))
    return layer, weight


@KINDS
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_is_the_weight_that_its_source_decodes(label: str, has_bias: bool) -> None:
    layer, weight = example(label, has_bias)
    assert torch.equal(layer.float_weight(), weight.decoded())
    x = torch.randn(2, 5, IN_FEATURES)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight.decoded(), layer.bias), rtol=1e-4, atol=1e-4)


@KINDS
def test_inputs_are_coded_in_the_groups_of_the_weight(label: str) -> None:
    layer, weight = example(label, activations="int8")
    x = torch.randn(7, IN_FEATURES) * (1 + 20 * (weight.order == 1))
    expected, found = nn.functional.linear(x, weight.decoded(), layer.bias), layer(x)
    assert (found - expected).abs().mean() < 0.01 * expected.std()
    layer.check("a.b")
    assert torch.equal(layer(x), found) and torch.equal(layer.float_weight(), weight.decoded()), "packed"


@KINDS
def test_it_is_left_to_modules(label: str) -> None:
    layer, _ = example(label, activations="int8")
    layer.check("a.b")
    with pytest.raises(NotFused, match="OrderedLinear"):
        layer_linear("a.b", layer)


@KINDS
def test_a_graph_holds_it(label: str) -> None:
    layer, _ = example(label)
    x = torch.randn(3, IN_FEATURES)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@KINDS
def test_an_order_that_names_a_channel_twice_is_damaged(label: str) -> None:
    layer, _ = example(label)
    layer.input_order[0] = layer.input_order[1]
    with pytest.raises(OctavoError, match=r"a\.b\.input_order does not name each of 96 input channels once"):
        layer.check("a.b")


@KINDS
def test_it_keeps_its_order_in_another_dtype(label: str) -> None:
    layer, _ = example(label)
    before = layer.input_order.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.input_order, before) and layer(torch.randn(2, IN_FEATURES).bfloat16()).isfinite().all()


def test_nothing_is_quantized_to_it_by_name() -> None:
    with pytest.raises(OctavoError, match="linear w4a16_ordered: is none of"):
        from octavo import ConvertRequest

        ConvertRequest("a", "b", linear="w4a16_ordered")
    assert LinearScheme(W4A16_ORDERED, 32).label == W4A16_ORDERED
