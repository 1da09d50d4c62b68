"""Contract tests of the codec on an NPU."""

import pytest
import torch

from octavo.ops import decode, encode, encode_token
from octavo.ops.codec.reference import decode_reference, encode_reference, encode_token_reference
from octavo.ops.shared.codes import SMALLEST_SCALE, WIDTH_STEPS, from_codes, stored_width

from ..tolerances import TOLERANCES
from .npu_double import TorchNpu, installed_double, on_npu

FLOATS = (torch.float16, torch.bfloat16)
BATCH, GROUPS, TOKENS, WIDTH, CAPACITY = 2, 3, 5, 32, 8
STATIC = {
    "head": (GROUPS, 1, 1),
    "group": (GROUPS, 1, 4),
    "channel": (GROUPS, 1, WIDTH),
    "number": (),
    "sequence": (BATCH, GROUPS, 1, WIDTH),
}


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> TorchNpu:
    return installed_double(monkeypatch)


def assert_same_codes(codes: torch.Tensor, expected: torch.Tensor, bits: int = 4) -> None:
    values, expected_values = (from_codes(part, WIDTH, torch.float32, bits) for part in (codes, expected))
    difference = (values - expected_values).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= TOLERANCES["codes"]


def states(dtype: torch.dtype) -> torch.Tensor:
    """Values as a projection leaves them: `[B, S, G, D]` in memory."""
    x = torch.randn((BATCH, TOKENS, GROUPS, WIDTH), generator=torch.Generator().manual_seed(0))
    return x.to(dtype).transpose(1, 2)


def storages(codes: torch.dtype, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Two equal storages with garbage in them."""
    shape = (BATCH, GROUPS, CAPACITY, stored_width(WIDTH, codes, bits))
    return torch.full(shape, 99, dtype=codes), torch.full(shape, 99, dtype=codes)


@pytest.mark.parametrize("dtype", [torch.float32, *FLOATS])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("granularity", STATIC)
@pytest.mark.parametrize(
    ("code", "bits"),
    [(torch.int8, 8), (torch.uint8, 4), (torch.uint8, 3), (torch.uint8, 2)],
    ids=["int8", "int4", "int3", "int2"],
)
def test_encode(
    npu: TorchNpu, dtype: torch.dtype, affine: bool, granularity: str, code: torch.dtype, bits: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(STATIC[granularity], generator=generator) * 0.03 + 0.005  # some values clip
    if code == torch.uint8:
        scale = scale * 12 * 2 ** (4 - bits)
    reach = 90 if code == torch.int8 else 6 / 2 ** (4 - bits)
    zero = (torch.rand(scale.shape, generator=generator) * 2 - 1) * reach if affine else None
    codes, expected = storages(code, bits)
    on_npu(encode, states(dtype), scale, zero, codes[:, :, 2:7], None, bits)
    encode_reference(states(dtype), scale, zero, expected[:, :, 2:7], None, bits)
    assert npu.ops() == ["npu_quantize"]
    assert_same_codes(codes, expected, bits)


@pytest.mark.parametrize("code", [torch.int8, torch.uint8], ids=["int8", "int4"])
def test_encode_writes_where_it_is_told(npu: TorchNpu, code: torch.dtype) -> None:
    scale, position = torch.full((GROUPS, 1, WIDTH), 0.02 if code == torch.int8 else 0.4), torch.tensor([3])
    codes, expected = storages(code)
    on_npu(encode, states(torch.bfloat16), scale, None, codes, position)
    encode_reference(states(torch.bfloat16), scale, None, expected, position)
    assert npu.ops() == ["npu_quantize", "scatter_update_"]
    assert_same_codes(codes, expected)


def test_encode_with_a_scale_per_token_takes_the_reference(npu: TorchNpu) -> None:
    scale = torch.rand((BATCH, GROUPS, TOKENS, 4)) * 0.02 + 0.01
    codes, expected = storages(torch.int8)
    on_npu(encode, states(torch.float16), scale, None, codes[:, :, :TOKENS])
    encode_reference(states(torch.float16), scale, None, expected[:, :, :TOKENS])
    assert npu.calls == [] and torch.equal(codes, expected)


@pytest.mark.parametrize("bits", WIDTH_STEPS)
def test_codebooks_take_the_reference(npu: TorchNpu, bits: int) -> None:
    levels, scale, position = torch.randn(2**bits).sort().values, torch.rand(GROUPS, 1, WIDTH) + 0.5, torch.tensor([3])
    codes, expected = storages(torch.uint8, bits)
    on_npu(encode, states(torch.float16), scale, None, codes, position, bits, levels)
    encode_reference(states(torch.float16), scale, None, expected, position, bits, levels)
    assert npu.calls == []
    assert_same_codes(codes, expected, bits)
    decoded = on_npu(decode, codes, scale, None, 1, bits, levels)
    assert torch.equal(decoded, decode_reference(codes, scale, None, 1, bits, levels))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("position", [None, 3])
def test_encode_token(npu: TorchNpu, dtype: torch.dtype, groups: int, affine: bool, position: int | None) -> None:
    x = states(dtype).clone()
    x[0, 1, 2], x[1, 2, 3] = 0, 1.5
    results = []
    for kernel in (lambda *arguments: on_npu(encode_token, *arguments), encode_token_reference):
        codes, _ = storages(torch.int8)
        scale, zero = torch.full((2, BATCH, GROUPS, CAPACITY, groups), 7.0)
        at = None if position is None else torch.tensor([position])
        stop = CAPACITY if position is not None else TOKENS
        parts = [part[:, :, :stop] for part in (codes, scale, zero)]
        kernel(x, parts[0], parts[1], parts[2] if affine else None, at)
        results.append((codes, scale, zero))
    (codes, scale, zero), (expected, expected_scale, expected_zero) = results
    op = "npu_dynamic_quant_asymmetric" if affine else "npu_dynamic_quant"
    assert npu.ops() == [op] + ["scatter_update_"] * (0 if position is None else 3 if affine else 2)
    assert_same_codes(codes, expected)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(zero, expected_zero, rtol=1e-6, atol=1e-4)
    assert (scale[0, 1, 2 + (position or 0)] == SMALLEST_SCALE).all()


@pytest.mark.parametrize(
    ("code", "bits", "scales"),
    [
        (torch.uint8, 4, torch.float32),
        (torch.uint8, 3, torch.float32),
        (torch.uint8, 2, torch.float32),
        (torch.int8, 8, torch.float16),
    ],
)
def test_encode_token_by_the_reference(npu: TorchNpu, code: torch.dtype, bits: int, scales: torch.dtype) -> None:
    codes, expected = storages(code, bits)
    scale, expected_scale = torch.zeros((2, BATCH, GROUPS, CAPACITY, 2), dtype=scales)
    position = torch.tensor([1])
    on_npu(encode_token, states(torch.float16), codes, scale, None, position, bits)
    encode_token_reference(states(torch.float16), expected, expected_scale, None, position, bits)
    assert npu.calls == []
    assert_same_codes(codes, expected, bits)
    torch.testing.assert_close(scale, expected_scale)


def test_decode_takes_the_reference(npu: TorchNpu) -> None:
    codes = torch.randint(-128, 128, (BATCH, GROUPS, TOKENS, WIDTH), dtype=torch.int8)
    scale, zero = torch.rand((2, BATCH, GROUPS, 3, WIDTH))
    assert torch.equal(on_npu(decode, codes, scale, zero, 2), decode_reference(codes, scale, zero, 2))
    assert npu.calls == []


def test_limits(npu: TorchNpu) -> None:
    codes, _ = storages(torch.int8)
    scale = torch.ones(BATCH, GROUPS, TOKENS, 1)
    with pytest.raises(ValueError, match="K and V in float16 or bfloat16"):
        on_npu(encode_token, states(torch.float32), codes[:, :, :TOKENS], scale)


def test_nothing_to_encode(npu: TorchNpu) -> None:
    x = torch.zeros((BATCH, GROUPS, 0, WIDTH), dtype=torch.float16)
    codes, _ = storages(torch.int8)
    on_npu(encode, x, torch.ones(GROUPS, 1, 1), None, codes[:, :, :0])
    on_npu(encode_token, x, codes[:, :, :0], torch.ones(BATCH, GROUPS, 0, 1))
    assert npu.calls == []
