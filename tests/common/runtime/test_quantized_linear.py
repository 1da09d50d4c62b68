"""Quantized linear layers: what they compute and what they hold."""

import copy

import pytest
import torch
from torch import nn

from octavo.common.convert.weights.input_range import coded_rows, input_range
from octavo.common.convert.weights.quantize import quantize_linear
from octavo.common.errors import OctavoError
from octavo.common.runtime import weight_only_linear
from octavo.common.runtime.linear_kinds import QUANTIZED_LINEARS, empty_linear
from octavo.common.runtime.quantized_linear import QuantizedLinear
from octavo.common.runtime.schemes.linear_scheme import (
    EMBEDDING,
    HELD_LABELS,
    INT4_LABELS,
    LINEAR_LABELS,
    W4A16,
    W8A8,
    W8A8_MIXED,
    LinearScheme,
)
from octavo.common.runtime.w8a8_linear import decode_deq_scale
from octavo.ops.shared.codes import unpack_int4

from ...tolerances import TOLERANCES
from ..convert.weights.test_quantize import correlated, every_scheme, layer_of, name_of, seen

pytestmark = pytest.mark.usefixtures("one_thread")

IN_FEATURES, OUT_FEATURES = 96, 40
SCHEMES = pytest.mark.parametrize("scheme", every_scheme(), ids=name_of)


def example(scheme: LinearScheme, has_bias: bool = True) -> tuple[QuantizedLinear, torch.Tensor, nn.Linear]:
    """A filled layer, inputs and the float layer."""
    torch.manual_seed(0)
    x, linear = correlated(IN_FEATURES, 50), nn.Linear(IN_FEATURES, OUT_FEATURES, bias=has_bias)
    return layer_of(linear, seen(x), scheme), x, linear


@SCHEMES
@pytest.mark.parametrize("has_bias", [True, False])
@torch.no_grad()
def test_a_layer_computes_what_its_tensors_say(scheme: LinearScheme, has_bias: bool) -> None:
    layer, x, linear = example(scheme, has_bias)
    inputs, weight = x.clone(), layer.float_weight().double()
    expected = torch.zeros(50, OUT_FEATURES).double()
    if scheme.label == W8A8_MIXED:
        outliers = layer.outlier_columns.long()
        inputs[:, outliers] = 0
        expected += x[:, outliers].double() @ linear.weight[:, outliers].T.double()
        weight[:, outliers] = 0
    coded = coded_rows(inputs, scheme.label, input_range(seen(x), scheme.act_method, label=scheme.label))
    expected += coded.double() @ weight.T + (linear.bias.double() if has_bias else 0)
    difference = (layer(x.view(5, 10, IN_FEATURES)).view(50, OUT_FEATURES) - expected).abs()
    step = float(decode_deq_scale(layer.deq_scale).max()) if scheme.label == W8A8 else 0.0
    assert difference.max() <= 0.51 * step + 1e-5 * expected.abs().max(), "but for the rounding of quant_bias"


@SCHEMES
def test_codes_are_all_that_is_kept_of_a_weight(scheme: LinearScheme) -> None:
    layer, _, _ = example(scheme)
    bits = 4 if scheme.label in INT4_LABELS else 8
    outliers = 16 * OUT_FEATURES * 4 + 16 * 4 if scheme.label == W8A8_MIXED else 0
    of_row = IN_FEATURES + 8 * scheme.num_groups(IN_FEATURES)
    beside = 28 * OUT_FEATURES + 8 + 8 * OUT_FEATURES * scheme.num_groups(IN_FEATURES) + outliers
    beside += (-OUT_FEATURES % 16) * of_row  # packing fills the last panel
    stored = sum(tensor.nbytes for tensor in [*layer.buffers(), *layer.parameters()])
    assert OUT_FEATURES * IN_FEATURES * bits // 8 <= stored <= OUT_FEATURES * IN_FEATURES * bits // 8 + beside
    layer(torch.randn(2, IN_FEATURES))
    kept = [part for part in vars(layer).values() if isinstance(part, torch.Tensor)]
    assert sum(part.nbytes for part in kept) <= 4 * OUT_FEATURES


@SCHEMES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_and_scales_keep_their_dtype(scheme: LinearScheme, dtype: torch.dtype) -> None:
    layer, x, _ = example(scheme)
    before, expected = layer.state_dict(), layer(x)
    layer.to(dtype)
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == (dtype if name in layer.OF_MODEL else before[name].dtype), name
        assert name in layer.OF_MODEL or torch.equal(tensor.float(), before[name].float())
    found = layer(x.to(dtype)).float()
    assert found.isfinite().all() and (found - expected).std() < 0.1 * expected.std()


@SCHEMES
def test_a_damaged_scale_is_named(scheme: LinearScheme) -> None:
    for value in (0.0, float("nan"), -1.0):
        for part in ("weight_scale", "input_scale", "row_scale"):
            layer, _, _ = example(scheme)
            if part not in layer.PARTS or not getattr(layer, part).is_floating_point():
                continue
            getattr(layer, part).view(-1)[-1] = value
            with pytest.raises(OctavoError, match=rf"a\.b\.{part} is no positive number"):
                layer.check("a.b")


def test_other_damage_is_named() -> None:
    layer, _, _ = example(LinearScheme(W8A8_MIXED))
    layer.outlier_columns[0] = IN_FEATURES
    with pytest.raises(OctavoError, match=r"outlier_columns are no columns"):
        layer.check("a.b")
    layer, _, _ = example(LinearScheme(W4A16, symmetric=False))
    layer.weight_offset[0] = float("inf")
    with pytest.raises(OctavoError, match="offset"):
        layer.check("a.b")


def test_zeros_go_to_the_op_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    real = weight_only_linear.linear_weight_only
    monkeypatch.setattr(
        weight_only_linear, "linear_weight_only", lambda *arguments: given.append(arguments[3]) or real(*arguments)
    )
    layer, x, linear = example(LinearScheme(W4A16, 32))
    layer(x)
    layer.load_state_dict(quantize_linear(linear, None, LinearScheme(W4A16, 32, symmetric=False)))
    layer(x)
    assert given[0] is None and given[1] is layer.weight_offset


def test_tensors_that_are_loaded_later_count() -> None:
    for scheme in every_scheme():
        layer, x, _ = example(scheme)
        other = layer_of(nn.Linear(IN_FEATURES, OUT_FEATURES), seen(2 * x), scheme)
        layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x)), scheme


@SCHEMES
@torch.no_grad()
def test_layers_compile_whole(scheme: LinearScheme) -> None:
    layer, x, _ = example(scheme)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@SCHEMES
@torch.no_grad()
def test_a_bias_that_is_left_out_is_what_is_missing(scheme: LinearScheme) -> None:
    layer, x, linear = example(scheme)
    expected = layer(x)
    layer.fold_bias()
    tolerance = TOLERANCES["linear"] * 100
    torch.testing.assert_close(layer(x) + layer.left_out, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(layer.left_out, linear.bias)
    half = linear.bias.detach() * (torch.arange(OUT_FEATURES) % 2)
    layer.fold_bias(lambda _: half)
    torch.testing.assert_close(layer(x) + half, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_int4_that_is_not_packed() -> None:
    layer, x, _ = example(LinearScheme(W4A16, 32, symmetric=False))
    state = layer.state_dict()
    state["weight"] = unpack_int4(state["weight"], 32)
    other = empty_linear(W4A16, IN_FEATURES, OUT_FEATURES, True, num_groups=3, is_packed=False)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), layer(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(other.float_weight(), layer.float_weight())


def test_there_is_a_class_for_every_label() -> None:
    assert tuple(sorted(QUANTIZED_LINEARS)) == tuple(sorted((*LINEAR_LABELS, *HELD_LABELS, EMBEDDING)))
    assert all(label == kind.LABEL for label, kind in QUANTIZED_LINEARS.items())
