"""The vllm-fp8 presets against `compressed-tensors`, which calibrates and simulates what vLLM and SGLang load."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.static_scales import static_scale, symmetric_scale
from octavo.ops.shared.codes import SMALLEST_SCALE

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, TOKENS, WIDTH = 4, 96, 64
STRATEGIES = {"tensor": "vllm-fp8", "attn_head": "vllm-fp8-head"}
SIZES = [1e-3, 0.7, 1.0, 30.0, 1e4]


def arguments(strategy: str) -> QuantizationArgs:
    return QuantizationArgs(num_bits=8, type="float", symmetric=True, dynamic=False, strategy=strategy)


def values_of(size: float, seed: int = 0) -> torch.Tensor:
    """`[1, G, S, D]`, of heads that differ."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, HEADS, TOKENS, WIDTH, generator=generator)
        * torch.tensor([1.0, 3.0, 0.1, 7.0])[:, None, None]
        * size
    )


def theirs(values: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point by the extremes of the values: of all, `[1]`, or of each head, `[G, 1, 1]`."""
    if strategy == "tensor":
        return calculate_qparams(values.min(), values.max(), arguments(strategy))
    low, high = values.amin(dim=(0, 2, 3)), values.amax(dim=(0, 2, 3))
    return calculate_qparams(low[:, None, None], high[:, None, None], arguments(strategy))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scales_are_theirs_to_the_bit(strategy: str, size: float) -> None:
    for seed in range(20):
        values = values_of(size, seed)
        expected, zero = theirs(values, strategy)
        codec = load_scheme(STRATEGIES[strategy]).key
        scale, ours = static_scale(codec, values.amin(dim=(0, 2)), values.amax(dim=(0, 2)))
        assert ours is None and not zero.float().any()
        assert scale.dtype == expected.dtype == torch.float32
        assert torch.equal(scale.flatten(), expected.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_models_in_half_precision_are_ours_rounded_to_it(dtype: torch.dtype) -> None:
    """There, scales are in the dtype of the model: compressed-tensors divides and rounds in one step."""
    values = values_of(1.0).to(dtype)
    expected, _ = theirs(values, "attn_head")
    scale = symmetric_scale(values.abs().amax(dim=(0, 2, 3)), 448)
    assert expected.dtype == dtype
    assert torch.equal(scale.to(dtype), expected.flatten())


def test_scales_of_zeros_are_theirs_and_those_of_next_to_nothing_are_larger() -> None:
    """Both take float32's epsilon for a scale of 0; here that is the floor of every scale."""
    expected, _ = theirs(torch.zeros(1, HEADS, 2, 2), "attn_head")
    assert torch.equal(symmetric_scale(torch.zeros(HEADS), 448), expected.flatten())
    assert symmetric_scale(torch.tensor(1e-6), 448) == SMALLEST_SCALE
    assert theirs(torch.full((1, HEADS, 2, 2), 1e-6), "attn_head")[0].max() < SMALLEST_SCALE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_codes_and_values_are_theirs_to_the_bit(strategy: str, dtype: torch.dtype) -> None:
    """Also of values beyond those that were calibrated, which take the end of the range.

    compressed-tensors divides in the dtype of the values, the codec in float32; so values in half are widened first.
    """
    values = values_of(1.0).to(dtype).float()
    args = arguments(strategy)
    scale, zero = theirs(values, strategy)
    values[..., ::7] *= 3
    expected = quantize(values, scale, zero, args, dtype=torch.float8_e4m3fn)
    store = CodeStore(load_scheme(STRATEGIES[strategy]).key, (scale.view(-1, 1, 1), None))
    codes = store.append(values).codes
    assert (expected.float().abs() == 448).any()
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(store.decoded(0, TOKENS), dequantize(expected, scale, zero, args))
