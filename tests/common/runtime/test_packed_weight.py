"""Weights that are packed on the CPU: held once, and what was loaded wherever anybody reads them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from octavo.common.convert.weights.quantize import quantize_linear
from octavo.common.errors import OctavoError
from octavo.common.runtime.linear_kinds import empty_linear
from octavo.common.runtime.packed_weight import PackedLinear
from octavo.common.runtime.quantized_embedding import QuantizedEmbedding
from octavo.common.runtime.quantized_linear import QuantizedLinear
from octavo.common.runtime.schemes.linear_scheme import (
    W4A16,
    W8A8,
    W8A8_DYNAMIC,
    W8A16,
    WEIGHT_ONLY,
    LinearScheme,
)
from octavo.ops.linear.cpu import LINEAR_KERNEL
from octavo.ops.linear.packed import Packed
from octavo.ops.linear.packed_cpu import linear_packed_reference
from octavo.ops.linear.reference import linear_w8a8_dynamic_reference
from octavo.ops.shared import fallback

from ...tolerances import TOLERANCES
from ..convert.weights.test_quantize import correlated, layer_of, name_of, seen

pytestmark = pytest.mark.usefixtures("one_thread")
IN_FEATURES, OUT_FEATURES = 96, 40
SCHEMES = pytest.mark.parametrize(
    "scheme",
    [
        LinearScheme(W8A8),
        LinearScheme(W8A8_DYNAMIC),
        LinearScheme(W8A16),
        LinearScheme(W8A16, 32),
        LinearScheme(W8A16, 32, symmetric=False),
        LinearScheme(W4A16, 32),
        LinearScheme(W4A16, symmetric=False),
    ],
    ids=name_of,
)


def example(scheme: LinearScheme) -> tuple[QuantizedLinear, dict[str, torch.Tensor], torch.Tensor]:
    """A layer that is to be packed, its tensors before it is, and inputs."""
    torch.manual_seed(0)
    x = correlated(IN_FEATURES, 50)
    layer = layer_of(nn.Linear(IN_FEATURES, OUT_FEATURES), seen(x), scheme)
    if scheme.label in WEIGHT_ONLY:
        layer.cpu_activations = "int8"
    return layer, {name: tensor.clone() for name, tensor in layer.state_dict().items()}, x


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


COPIES: dict[str, Callable[[QuantizedLinear], QuantizedLinear]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@SCHEMES
@torch.no_grad()
def test_tensors_are_those_that_were_loaded(scheme: LinearScheme) -> None:
    layer, tensors, x = example(scheme)
    weight = layer.float_weight()
    output = layer(x)
    assert layer._buffers["weight"] is None and layer.pack() is not None, "there is no second copy"
    assert_same(layer.state_dict(), tensors)
    for name, tensor in tensors.items():
        assert torch.equal(getattr(layer, name), tensor)
    assert torch.equal(layer.float_weight(), weight)
    assert torch.equal(layer(x), output)


@SCHEMES
@pytest.mark.parametrize("way", COPIES)
@torch.no_grad()
def test_copies_stand_for_themselves(scheme: LinearScheme, way: str) -> None:
    layer, tensors, x = example(scheme)
    output = layer(x)
    other = COPIES[way](layer)
    assert_same(other.state_dict(), tensors)
    assert torch.equal(other(x), output)
    other.to(torch.bfloat16)
    if way != "copy":
        other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert_same(layer.state_dict(), tensors)
    assert torch.equal(layer(x), output)


@SCHEMES
@torch.no_grad()
def test_a_shallow_copy_packs_for_itself(scheme: LinearScheme) -> None:
    layer, tensors, x = example(scheme)
    layer.unpack()
    other = copy.copy(layer)
    output = other(x)
    assert layer._panels is None
    assert_same(layer.state_dict(), tensors)
    assert torch.equal(layer(x), output)


@SCHEMES
@torch.no_grad()
def test_moves_and_loads_unpack(scheme: LinearScheme) -> None:
    layer, tensors, x = example(scheme)
    output = layer(x)
    assert torch.equal(layer.to(torch.bfloat16).to(torch.float32).weight, tensors["weight"])
    torch.testing.assert_close(layer(x), output, atol=0.01, rtol=0.01)  # but for the bias, which was rounded
    on_meta = copy.deepcopy(layer).to("meta")
    assert on_meta.weight.is_meta and on_meta.pack() is None
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["weight"].zero_()
    layer.load_state_dict(changed)
    assert not layer.weight.any() and layer._panels is None
    layer(x)
    layer.weight = tensors["weight"]
    assert torch.equal(layer.weight, tensors["weight"]) and layer._panels is None


@SCHEMES
@torch.no_grad()
def test_what_a_kernel_is_given_is_the_layer(scheme: LinearScheme) -> None:
    layer, _, x = example(scheme)
    expected = layer(x)
    given = layer.packed()
    assert isinstance(given, PackedLinear) and given.codes.data_ptr() == layer.pack().codes.data_ptr()
    packed = Packed(given.codes, given.scale, given.zero, given.bits, given.out_features, given.in_features)
    if scheme.label != W8A8:
        found = linear_packed_reference(x, packed, given.bias, given.x_group)
    else:
        codes = (x / given.input_scale + given.input_offset).round().clamp(-128, 127)
        sums = codes.double() @ layer.weight.double().T + given.quant_bias
        found = (sums * layer._decoded_deq_scale()).float()
    torch.testing.assert_close(found, expected, atol=TOLERANCES["linear"], rtol=TOLERANCES["linear"])
    assert (given.input_scale is None) == (scheme.label != W8A8)


@SCHEMES
@pytest.mark.parametrize("is_packed", [True, False])
@torch.no_grad()
def test_layers_compile_whole(scheme: LinearScheme, is_packed: bool) -> None:
    layer, _, x = example(scheme)
    expected = copy.deepcopy(layer)(x)
    _ = layer.pack() if is_packed else layer.unpack()
    torch._dynamo.reset()
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (layer._panels is not None) == is_packed, "nothing is packed while a graph is made"


def test_what_is_left_out_of_a_bias_is_left_out_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in (LinearScheme(W8A8), LinearScheme(W8A16, 32)):
        layer, _, _ = example(scheme)
        layer.fold_bias()
        bias = layer.packed().bias
        assert torch.equal(bias, -layer.left_out) if scheme.label == W8A8 else bias is None


def test_float_inputs_and_other_kinds_are_not_packed() -> None:
    for label in ("W8A8_MIXED", "WFP8AFP8"):
        layer, _, x = example(LinearScheme(label))
        layer(x)
        assert layer.packed() is None and layer._buffers["weight"] is not None
    layer, _, x = example(LinearScheme(W8A16, 32))
    layer.cpu_activations = "float"
    layer(x)
    assert layer.packed() is None


def test_int4_of_a_byte_each_comes_back_so() -> None:
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES)
    parts = quantize_linear(linear, None, LinearScheme(W4A16, 32))
    packed, plain = (
        empty_linear(W4A16, IN_FEATURES, OUT_FEATURES, True, num_groups=3, is_packed=is_packed, cpu_activations="int8")
        for is_packed in (True, False)
    )
    packed.load_state_dict(parts)
    from octavo.ops.shared.codes import unpack_int4

    plain.load_state_dict(parts | {"weight": unpack_int4(parts["weight"], 32)})
    x = torch.randn(3, IN_FEATURES)
    assert torch.equal(packed(x), plain(x))
    assert plain.weight.dtype == torch.int8 and torch.equal(plain.weight, unpack_int4(packed.weight, 32))


@pytest.mark.parametrize("vocabulary", [32, 37])
def test_rows_of_a_packed_embedding(vocabulary: int) -> None:
    parts = quantize_linear(nn.Linear(64, vocabulary, bias=False), None, LinearScheme(W8A16, 32))
    embedding = QuantizedEmbedding(vocabulary, 64, 2)
    embedding.load_state_dict({name: parts[name] for name in ("weight", "weight_scale")})
    embedding.cpu_activations = "int8"
    ids = torch.arange(vocabulary).view(1, -1)
    rows, product = embedding(ids), embedding.product(torch.randn(2, 64))
    assert product.shape == (2, vocabulary) and embedding._panels is not None
    assert torch.equal(embedding(ids), rows)
    assert torch.equal(embedding(torch.tensor(5)), rows[0, 5]) and embedding(ids[:, :0]).shape == (1, 0, 64)


@pytest.mark.parametrize("kind", ["last linear", "embedding"])
def test_what_codes_leave_of_the_inputs_of_a_last_linear_is_multiplied_as_well(kind: str) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 40, bias=kind == "last linear"), torch.randn(5, 64)
    layer = layer_of(linear, seen(x), LinearScheme(W8A16, 32))
    if kind == "embedding":
        layer = QuantizedEmbedding(40, 64, 2)
        layer.load_state_dict({"weight": (linear.weight * 500).to(torch.int8), "weight_scale": torch.rand(40, 2)})
    layer.cpu_activations = "int8"
    expected = nn.functional.linear(x, layer.float_weight(), linear.bias)
    assert layer.adds_remainder == (kind == "embedding")

    errors = []
    for layer.adds_remainder in (False, True):
        found = layer.product(x) if kind == "embedding" else layer(x)
        errors.append(float((found - expected).detach().abs().mean()))
    assert errors[1] < errors[0] / 50


@SCHEMES
@torch.no_grad()
def test_a_tensor_that_is_set_takes_effect(scheme: LinearScheme) -> None:
    """Whichever it is: what was packed, or found out of the one before, is made again."""
    layer, tensors, x = example(scheme)
    for name in tensors:
        changed = {part: tensor.clone() for part, tensor in tensors.items()}
        changed[name] = tensors[name].flip(0) + (1 if name in ("weight_offset", "input_offset") else 0)
        expected = copy.deepcopy(layer)
        expected.load_state_dict(changed)
        layer(x)
        setattr(layer, name, changed[name])
        assert torch.equal(layer(x), expected(x)), name
        assert_same(layer.state_dict(), changed)
        layer.load_state_dict(tensors)


@torch.no_grad()
def test_activations_may_be_changed_once_it_is_packed() -> None:
    layer, _, x = example(LinearScheme(W4A16, 32))
    integers = layer(x)
    layer.cpu_activations = "float"
    assert layer._buffers["weight"] is not None, "it is read as it was loaded"
    floats = layer(x)
    torch.testing.assert_close(floats, x @ layer.float_weight().T + layer.bias, atol=1e-4, rtol=1e-4)
    assert not torch.equal(floats, integers)
    layer.cpu_activations = "int8"
    assert torch.equal(layer(x), integers) and layer._panels is not None
    with pytest.raises(OctavoError, match="cpu_activations is 'int4', which is none of int8, float"):
        layer.cpu_activations = "int4"


@SCHEMES
@pytest.mark.filterwarnings("ignore:octavo. .* runs as the reference:RuntimeWarning")
@torch.no_grad()
def test_nothing_is_packed_without_a_compiler(scheme: LinearScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels are for the kernel alone: sums of W8A8 stay exact, and no call unpacks a weight."""
    monkeypatch.setattr(fallback, "_FELL_BACK", set())
    monkeypatch.setattr(LINEAR_KERNEL, "_loaded", {})
    monkeypatch.setattr(LINEAR_KERNEL, "failure", "no C compiler here")
    layer, tensors, x = example(scheme)
    found = layer(x)
    assert layer.packed() is None and layer._buffers["weight"] is not None
    if scheme.label == W8A8_DYNAMIC:
        parts = tensors["weight"], tensors["weight_scale"].view(-1), tensors["bias"]
        assert torch.equal(found, linear_w8a8_dynamic_reference(x, *parts))
