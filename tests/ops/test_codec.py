"""The codec on the CPU writes the codes of its reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import encode, encode_token
from octavo.ops.codec.reference import encode_reference, encode_token_reference

pytestmark = pytest.mark.usefixtures("build")
TOKENS, CAPACITY = 33, 64


def values_and_storage(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cache hands to the codec: values that are a transposed view, and codes that are a slice of storage."""
    values = (torch.randn(2, TOKENS, 3, width) * 3).to(dtype).transpose(1, 2)
    return values, torch.zeros((2, 3, CAPACITY, width), dtype=torch.int8)


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([1, 5, 16, 64, 77, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    form=st.sampled_from(["per channel", "per head", "scalar"]),
    has_zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_static_codes_are_those_of_the_reference(
    width: int, dtype: torch.dtype, form: str, has_zero: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    values, storage = values_and_storage(width, dtype)
    expected = storage.clone()
    shape = {"per channel": (3, 1, width), "per head": (3, 1, 1), "scalar": ()}[form]
    scale = torch.rand(shape) * 0.05 + 0.01
    zero = torch.randn(shape) * 10 if has_zero else None
    encode(values, scale, zero, storage[:, :, 5 : 5 + TOKENS])
    encode_reference(values, scale, zero, expected[:, :, 5 : 5 + TOKENS])
    assert torch.equal(storage, expected)  # also where nothing was to be written


@settings(max_examples=40, deadline=None)
@given(
    width=st.sampled_from([1, 5, 16, 64, 77, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_codes_and_scales_per_token_are_those_of_the_reference(width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    values, storage = values_and_storage(width, dtype)
    scales = torch.zeros(2, 3, CAPACITY, 1)
    expected, expected_scales = storage.clone(), scales.clone()
    encode_token(values, storage[:, :, 5 : 5 + TOKENS], scales[:, :, 5 : 5 + TOKENS])
    encode_token_reference(values, expected[:, :, 5 : 5 + TOKENS], expected_scales[:, :, 5 : 5 + TOKENS])
    assert torch.equal(storage, expected)
    assert torch.equal(scales, expected_scales)


def test_halves_go_to_even_and_the_ends_are_clamped() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0, 0.0]).view(1, 1, 1, 8)
    codes = torch.empty((1, 1, 1, 8), dtype=torch.int8)
    encode(values, torch.ones(1, 1, 1), None, codes)
    assert codes.flatten().tolist() == [0, 2, 2, 0, -2, 127, -128, 0]


def test_codes_times_scale_are_within_half_a_step() -> None:
    values = torch.randn(1, 2, 9, 64)
    codes, scale = torch.empty((1, 2, 9, 64), dtype=torch.int8), torch.empty(1, 2, 9, 1)
    encode_token(values, codes, scale)
    assert ((codes * scale - values).abs() <= scale * 0.5001).all()


def test_zeros_keep_a_usable_scale() -> None:
    codes, scale = torch.empty((1, 1, 2, 16), dtype=torch.int8), torch.empty(1, 1, 2, 1)
    encode_token(torch.zeros(1, 1, 2, 16), codes, scale)
    assert not codes.any()
    assert (scale > 0).all()


def test_no_tokens_are_no_work() -> None:
    codes = torch.empty((1, 2, 0, 16), dtype=torch.int8)
    encode(torch.empty(1, 2, 0, 16), torch.ones(2, 1, 16), None, codes)
    encode_token(torch.empty(1, 2, 0, 16), codes, torch.empty(1, 2, 0, 1))


def test_codes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="codes must be int8"):
        encode(torch.randn(1, 2, 3, 16), torch.ones(2, 1, 16), None, torch.empty((1, 2, 4, 16), dtype=torch.int8))


def test_opcheck() -> None:
    values, codes = torch.randn(1, 2, 3, 16), torch.zeros((1, 2, 3, 16), dtype=torch.int8)
    torch.library.opcheck(torch.ops.octavo.encode.default, (values, torch.ones(2, 1, 16), None, codes))
    torch.library.opcheck(torch.ops.octavo.encode_token.default, (values, codes, torch.zeros(1, 2, 3, 1)))
