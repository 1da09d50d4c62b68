"""Decoder layers in C against the composition of references, over random layers of every kind that can be stated."""

from collections.abc import Iterator

import pytest
import torch

from octavo.ops.attention.call import Coded
from octavo.ops.decoder.call import (
    GELU_TANH,
    SILU,
    DecoderLayer,
    DecoderPass,
    LayerBiases,
    LayerLinear,
    LayerLinears,
    LayerNorms,
)
from octavo.ops.decoder.cpu import DECODER_KERNEL, decoder_layers_cpu, pack_layer, pack_layers
from octavo.ops.decoder.reference import decoder_layer_reference
from octavo.ops.linear.packed import pack_weight
from tests.tolerances import TOLERANCES

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, ROOM = 64, 96, 4, 2, 32, 64
LINEARS = ("float32", "bfloat16", "w8", "w8 static", "w8 in groups", "w4 in groups")
CACHES = ("float", "static int8", "dynamic int8", "dynamic int4")

pytestmark = pytest.mark.skipif(DECODER_KERNEL.supports() is not None, reason="there is no C compiler")


def linear(kind: str, out_features: int, in_features: int) -> LayerLinear:
    """A random linear of a kind."""
    weight, bias = torch.randn(out_features, in_features) / in_features**0.5, torch.randn(out_features) / 4
    sizes = {"in_features": in_features, "out_features": out_features}
    if not kind.startswith("w"):
        return LayerLinear(weight.to(getattr(torch, kind)), bias=bias, **sizes)
    bits, groups = int(kind[1]), in_features // 32 if kind.endswith("groups") else 1
    grouped = weight.view(out_features, groups, -1)
    scale = grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)
    codes = (grouped / scale[..., None]).round().to(torch.int8).view(out_features, in_features)
    zero = torch.randint(-2, 3, scale.shape).float() if bits == 4 else None
    if kind == "w8 static":
        parts = {"input_scale": torch.tensor([0.02]), "input_offset": torch.tensor([3.0])}
        parts["quant_bias"] = torch.randint(-500, 500, (out_features,), dtype=torch.int32)
        scale, bias = scale * 0.02, None
    else:
        parts = {}
    packed = pack_weight(codes, scale, zero, bits)
    return LayerLinear(packed.codes, packed.scale, packed.zero, bias, bits=bits, groups=groups, **sizes, **parts)


def side(kind: str, batch: int) -> tuple[Coded, bool]:
    """Empty storage of K or V, and whether its scales are dynamic."""
    shape = (batch, KV_HEADS, ROOM, HEAD_DIM)
    if kind == "float":
        return Coded(torch.zeros(shape)), False
    if kind == "static int8":
        scale = torch.rand(KV_HEADS, 1, HEAD_DIM) / 20 + 0.02
        return Coded(torch.zeros(shape, dtype=torch.int8), scale, torch.randn(KV_HEADS, 1, HEAD_DIM)), False
    parts = torch.ones(*shape[:3], 1), torch.zeros(*shape[:3], 1)
    if kind == "dynamic int8":
        return Coded(torch.zeros(shape, dtype=torch.int8), parts[0]), True
    return Coded(torch.zeros((*shape[:3], HEAD_DIM // 2), dtype=torch.uint8), *parts), True


def random_layer(linears: str, cache: str, batch: int, **changes: object) -> DecoderLayer:
    """A random layer whose linears and cache are of these kinds; `changes` are fields."""
    width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    sizes = [(width, HIDDEN), (kv_width, HIDDEN), (kv_width, HIDDEN), (HIDDEN, width)]
    sizes += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    (keys, is_dynamic), (values, _) = side(cache, batch), side(cache, batch)
    angles = torch.arange(ROOM)[:, None] * 10000 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    norms = LayerNorms(torch.rand(HIDDEN) + 0.5, torch.rand(HIDDEN) + 0.5)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    layer = DecoderLayer(
        norms, LayerLinears(*[linear(linears, *size) for size in sizes]), keys, values, None, LayerBiases(), table,
        HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, is_key_dynamic=is_dynamic, is_value_dynamic=is_dynamic,
    )  # fmt: skip
    return layer._replace(**changes)


def passes(batch: int) -> Iterator[tuple[torch.Tensor, int]]:
    """States of a prompt, of single tokens, and of more than a block of rows, and the tokens before."""
    stored = 0
    for tokens in (5, 1, 1, 9, 1, 40):
        yield torch.randn(batch, tokens, HIDDEN), stored
        stored += tokens


def copy_of(layer: DecoderLayer) -> DecoderLayer:
    """The layer over storage of its own."""

    def copied(coded: Coded) -> Coded:
        return coded._replace(**{name: part.clone() for name, part in coded._asdict().items() if name == "codes" or (
            name in ("scale", "zero") and part is not None)})  # fmt: skip

    return layer._replace(key_codes=copied(layer.key_codes), value_codes=copied(layer.value_codes))


def check(layers: list[DecoderLayer], batch: int, **changes: object) -> None:
    """Run passes through layers both ways and compare the states; `changes` are fields of the passes."""
    others = [copy_of(layer) for layer in layers]
    packed = pack_layers([pack_layer(layer) for layer in layers], [0] * len(layers))
    for hidden, stored in passes(batch):
        positions = torch.arange(stored, stored + hidden.shape[1]).expand(batch, -1).contiguous()
        call = DecoderPass(hidden, positions, None, None, None, stored)._replace(**changes)
        expected = hidden
        for layer in others:
            expected = decoder_layer_reference(call._replace(hidden=expected), layer)
        found = call._replace(hidden=hidden.clone())
        decoder_layers_cpu(found, packed, len(layers))
        error = (found.hidden - expected).norm() / expected.norm()
        assert error < TOLERANCES["decoder layer"] * len(layers), f"{hidden.shape[1]} tokens behind {stored}"
        for layer, other in zip(layers, others, strict=True):  # go on from the same codes
            for mine, theirs in ((layer.key_codes, other.key_codes), (layer.value_codes, other.value_codes)):
                for name in ("codes", "scale", "zero"):
                    if getattr(mine, name) is not None:
                        getattr(theirs, name).copy_(getattr(mine, name))


@pytest.fixture(params=[1, 2, 5], ids="threads={}".format, autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads of the kernel, more than some layers have work for."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("linears", LINEARS)
@pytest.mark.parametrize("cache", CACHES)
def test_every_linear_over_every_cache(linears: str, cache: str) -> None:
    torch.manual_seed(0)
    check([random_layer(linears, cache, 1)], 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_several_layers_and_sequences(batch: int) -> None:
    torch.manual_seed(0)
    check([random_layer("w8", "static int8", batch) for _ in range(3)], batch)


def _norms(**names: int) -> LayerNorms:
    weights = {name: torch.randn(size) / 4 for name, size in names.items()}
    return LayerNorms(torch.randn(HIDDEN) / 4, torch.randn(HIDDEN) / 4, offset=1.0, eps=1e-5, **weights)


def _biases() -> LayerBiases:
    columns = torch.tensor([1, 5, 17, 21])
    key, value = torch.randn(KV_HEADS * HEAD_DIM) * 5, torch.randn(KV_HEADS * HEAD_DIM)
    return LayerBiases(key, columns, torch.randn(2 * ROOM, 4), value)


VARIANTS = {
    "GELU": {"activation": GELU_TANH},
    "SiLU, and residual factor": {"activation": SILU, "residual_scale": 0.3},
    "window": {"window": 7},
    "no RoPE": {"rotation": None},
    "RoPE of a part of a head": {"rotation": torch.randn(ROOM, 8)},
    "rotated by Hadamard": {"rotate_key": True, "rotate_value": True},
    "norms of heads": {"norms": _norms(query=HEAD_DIM, key=HEAD_DIM)},
    "four norms, 1 + w": {"norms": _norms(attention_output=HIDDEN, mlp_output=HIDDEN)},
    "queries in int8": {"query_scale": torch.full((HEADS, 1, 1), 0.05)},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cache", ["static int8", "dynamic int8"])
def test_variants(name: str, cache: str) -> None:
    torch.manual_seed(0)
    check([random_layer("w8", cache, 2, **VARIANTS[name])], 2)


def test_folded_biases() -> None:
    torch.manual_seed(0)
    layer = random_layer("float32", "static int8", 2, biases=_biases())
    check([layer], 2, bias_start=torch.tensor([0, 3]))


def test_one_linear_for_several() -> None:
    torch.manual_seed(0)
    layer = random_layer("w8", "dynamic int8", 1)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    both = {"query": linear("w8", width, HIDDEN), "gate": linear("w4 in groups", 2 * INNER, HIDDEN)}
    missing = dict.fromkeys(("key", "value", "up"), LayerLinear())
    check([layer._replace(linears=layer.linears._replace(**both, **missing))], 1)


def test_masks_hide_padding() -> None:
    torch.manual_seed(0)
    layer, batch, tokens = random_layer("w8", "dynamic int8", 2), 2, 9
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1).clone()
    seen[1, :, :, :4] = False
    call = DecoderPass(torch.randn(batch, tokens, HIDDEN), torch.arange(tokens).expand(2, -1).contiguous(), None, seen,
                       None, 0)  # fmt: skip
    expected = decoder_layer_reference(call, copy_of(layer))
    decoder_layers_cpu(call, pack_layers([pack_layer(layer)], [0]), 1)
    assert (call.hidden - expected).norm() < TOLERANCES["decoder layer"] * expected.norm()


def test_a_nan_stays_in_its_sequence() -> None:
    torch.manual_seed(0)
    layer = random_layer("w8", "dynamic int8", 2)
    hidden = torch.randn(2, 3, HIDDEN)
    hidden[1, 1, 5] = float("nan")
    call = DecoderPass(hidden, torch.arange(3).expand(2, -1).contiguous(), None, None, None, 0)
    decoder_layers_cpu(call, pack_layers([pack_layer(layer)], [0]), 1)
    assert call.hidden[0].isfinite().all()
    assert call.hidden[1, 1:].isnan().all()
