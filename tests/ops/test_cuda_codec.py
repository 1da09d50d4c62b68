"""The codec of CUDA GPUs writes the codes of its reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops import decode, encode, encode_token
from octavo.ops.codec.cuda import decode_cuda, encode_cuda, encode_token_cuda
from octavo.ops.codec.reference import decode_reference, encode_reference, encode_token_reference
from octavo.ops.shared.codes import stored_width

from ..tolerances import TOLERANCES
from .cuda_double import compiled, interpreted, needs_gpu, needs_triton, opcheck_on_gpu

DTYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
FORMATS = (*((dtype, 4) for dtype in DTYPES), (torch.uint8, 3), (torch.uint8, 2))
"""dtype of the tensor of codes, and bits."""
CAPACITY = 12


def storage_of(dtype: torch.dtype, width: int, capacity: int = CAPACITY, bits: int = 4) -> torch.Tensor:
    """Codes `[2, 3, capacity, D]` that are a strided view, all bits set."""
    columns = stored_width(width, dtype, bits)
    return torch.full((2, capacity, 3, columns), 255, dtype=torch.uint8).view(dtype).transpose(1, 2)


def values_of(width: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(2, tokens, 3, width) * 3).to(dtype).transpose(1, 2)


def raw(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous().view(torch.uint8)


def codebook(bits: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Ascending levels, of which two are equal, where codes can have them."""
    levels = (torch.randn(2**bits) * 2).sort().values
    levels[1] = levels[0]
    return levels if dtype == torch.uint8 else None


def assert_same_codes(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(raw(actual), raw(expected))


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    width=st.sampled_from([16, 64, 80, 77, 128]),
    code=st.sampled_from(FORMATS),
    values=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    columns=st.sampled_from(["per channel", "per head", "groups", "per token"]),
    has_zero=st.booleans(),
    has_levels=st.booleans(),
    appends=st.booleans(),
    capability=st.sampled_from([80, 90]),
    seed=st.integers(0, 1000),
)
def test_static_codes_are_those_of_the_reference(
    width: int,
    code: tuple[torch.dtype, int],
    values: torch.dtype,
    columns: str,
    has_zero: bool,
    has_levels: bool,
    appends: bool,
    capability: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    dtype, bits = code
    width = 64 if width % 2 and dtype == torch.uint8 else width
    groups = width // 8 if width % 8 == 0 else width
    shape = {
        "per channel": (3, 1, width), "per head": (3, 1, 1), "groups": (3, 1, groups), "per token": (2, 3, 5, 1)
    }[columns]  # fmt: skip
    levels = codebook(bits, dtype) if has_levels else None
    scale = torch.rand(shape) + 0.2 if dtype == torch.uint8 else torch.rand(shape) * 0.05 + 0.01
    zero = torch.randn(shape) * 3 if has_zero else None
    x = values_of(width, 5, values)
    storage = storage_of(dtype, width, bits=bits)
    expected = storage.clone()
    with interpreted(capability):
        if appends:
            encode_cuda(x, scale, zero, storage, torch.tensor([4]), bits, levels)
        else:
            encode_cuda(x, scale, zero, storage[:, :, 4:9], None, bits, levels)
    encode_reference(x, scale, zero, expected, torch.tensor([4]), bits, levels)
    assert_same_codes(storage, expected)  # also where nothing was to be written


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    width=st.sampled_from([16, 64, 80, 77, 96, 128]),
    code=st.sampled_from(FORMATS),
    values=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale_dtype=st.sampled_from([torch.float32, torch.float16]),
    columns=st.sampled_from([1, 2, 3, 4, 5]),
    is_affine=st.booleans(),
    appends=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_codes_and_scales_per_token_are_those_of_the_reference(
    width: int,
    code: tuple[torch.dtype, int],
    values: torch.dtype,
    scale_dtype: torch.dtype,
    columns: int,
    is_affine: bool,
    appends: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    dtype, bits = code
    width = 64 if width % 2 and dtype == torch.uint8 else width
    columns = columns if width % columns == 0 else 1
    x = values_of(width, 5, values)
    given_parts, expected_parts = (
        [torch.zeros(2, 3, CAPACITY, columns, dtype=scale_dtype) for _ in range(2 if is_affine else 1)]
        for _ in range(2)
    )
    storage = storage_of(dtype, width, bits=bits)
    expected = storage.clone()
    position = torch.tensor([4])
    with interpreted():
        if appends:
            encode_token_cuda(x, storage, *(*given_parts, None)[:2], position, bits)
        else:
            views = [part[:, :, 4:9] for part in (storage, *given_parts)]
            encode_token_cuda(x, *(*views, None)[:3], None, bits)
    encode_token_reference(x, expected, *(*expected_parts, None)[:2], position, bits)
    for part, expected_part in zip(given_parts, expected_parts, strict=True):
        assert torch.equal(part, expected_part)
    assert_same_codes(storage, expected)


@needs_triton
@settings(max_examples=15, deadline=None)
@given(
    width=st.sampled_from([16, 80, 77, 128]),
    code=st.sampled_from(FORMATS),
    has_levels=st.booleans(),
    form=st.sampled_from([(1, 1), (1, -1), (7, 1), (7, 4), (3, -1)]),
    has_zero=st.booleans(),
    capability=st.sampled_from([80, 90]),
    seed=st.integers(0, 1000),
)
def test_decoded_values_are_those_of_the_reference(
    width: int,
    code: tuple[torch.dtype, int],
    has_levels: bool,
    form: tuple[int, int],
    has_zero: bool,
    capability: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    dtype, bits = code
    levels = codebook(bits, dtype) if has_levels else None
    width = 64 if width % 2 else width
    codes = torch.randint(0, 256, storage_of(dtype, width, 7, bits).shape, dtype=torch.uint8).view(dtype)
    rows, columns = form[0], width if form[1] == -1 else form[1]
    scale, zero = torch.rand(2, 3, rows, columns), torch.randn(2, 3, rows, columns) if has_zero else None
    token_group = 3 if rows == 3 else 1
    with interpreted(capability):
        actual = decode_cuda(codes, scale, zero, token_group, bits, levels)
    torch.testing.assert_close(
        actual, decode_reference(codes, scale, zero, token_group, bits, levels), rtol=0, atol=0, equal_nan=True
    )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_codes_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """Every float16 there is, all ties among them, as float32."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float().view(1, 1, -1, 128)
    codes, expected = (torch.zeros(x.shape, dtype=dtype) for _ in range(2))
    with interpreted():
        encode_cuda(x, torch.ones(()), None, codes)
    encode_reference(x, torch.ones(()), None, expected)
    is_number = ~x.isnan()
    assert torch.equal(raw(codes)[is_number], raw(expected)[is_number])
    assert codes.float()[~is_number].isnan().all()


@needs_triton
def test_halves_go_to_even_and_the_ends_are_clamped() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0, 0.0]).view(1, 1, 1, 8)
    codes = torch.empty((1, 1, 1, 8), dtype=torch.int8)
    with interpreted():
        encode_cuda(values, torch.ones(1, 1, 1), None, codes)
    assert codes.flatten().tolist() == [0, 2, 2, 0, -2, 127, -128, 0]


@needs_triton
def test_tokens_beyond_the_storage_touch_nothing() -> None:
    whole = torch.full((1, 1, 9, 16), 77, dtype=torch.int8)
    scale = torch.full((1, 1, 9, 1), 77.0)
    with interpreted():
        encode_token_cuda(torch.randn(1, 1, 4, 16), whole[:, :, :6], scale[:, :, :6], None, torch.tensor([4]))
    assert (whole[:, :, 6:] == 77).all() and (scale[:, :, 6:] == 77).all() and (whole[:, :, :4] == 77).all()
    assert (scale[:, :, 4:6] != 77).all()


@needs_triton
def test_what_is_no_number_shows_in_the_scale() -> None:
    x = torch.ones(1, 1, 2, 16)
    x[0, 0, 1, 3] = float("nan")
    codes, scale = torch.zeros((1, 1, 2, 16), dtype=torch.int8), torch.zeros(1, 1, 2, 2)
    with interpreted():
        encode_token_cuda(x, codes, scale)
    assert scale.isnan().flatten().tolist() == [False, False, True, False]


@needs_triton
@pytest.mark.parametrize("zero_dtype", [torch.float32, torch.float16])
def test_zeros_in_float16_of_nearly_equal_values_are_finite(zero_dtype: torch.dtype) -> None:
    x = torch.tensor([5.0, -5.0, 1e-3, 0.0])[:, None] * (1 + 1e-4 * torch.rand(4, 16)).repeat_interleave(2, 1)
    x = x.view(1, 1, 4, 32)
    parts = [torch.zeros((1, 1, 4, 16), dtype=torch.uint8), torch.zeros(1, 1, 4, 4).half(), torch.zeros(1, 1, 4, 4)]
    parts[2] = parts[2].to(zero_dtype)
    expected = [part.clone() for part in parts]
    with interpreted():
        encode_token_cuda(x, *parts)
    encode_token_reference(x, *expected)
    assert all(torch.equal(*pair) for pair in zip(parts, expected, strict=True))
    assert parts[2].isfinite().all()


@needs_triton
def test_no_tokens_are_no_work_and_other_shapes_are_refused() -> None:
    with interpreted():
        encode_cuda(torch.empty(1, 2, 0, 16), torch.ones(2, 1, 16), None, torch.empty((1, 2, 0, 16), dtype=torch.int8))
        assert decode_cuda(torch.empty((1, 2, 0, 16), dtype=torch.int8), None, None).shape == (1, 2, 0, 16)
        with pytest.raises(ValueError, match="codes must be int8"):
            encode_cuda(
                torch.randn(1, 2, 3, 16), torch.ones(2, 1, 16), None, torch.empty((1, 2, 4, 16), dtype=torch.int8)
            )
        with pytest.raises(ValueError, match="does not belong"):
            encode_cuda(
                torch.randn(1, 2, 3, 16), torch.ones(2, 1, 5), None, torch.empty((1, 2, 3, 16), dtype=torch.int8)
            )


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int) -> None:
    x = torch.empty(1, 4, 8, 128, dtype=torch.bfloat16).transpose(1, 2)
    scale, position = torch.ones(8, 1, 128), torch.zeros(1, dtype=torch.long)
    with compiled(capability) as kernels:
        for dtype in DTYPES:
            codes = torch.empty((1, 8, 64, 64 if dtype == torch.uint8 else 128), dtype=dtype)
            encode_cuda(x, scale, scale, codes, position)
            decode_cuda(codes, scale, scale)
        for bits in (2, 3, 4):
            packed, levels = torch.empty((1, 8, 64, 16 * bits), dtype=torch.uint8), torch.empty(2**bits)
            encode_cuda(x, scale, None, packed, position, bits, levels)
            decode_cuda(packed, scale, None, 1, bits, levels)
            encode_token_cuda(x, packed, torch.empty(1, 8, 64, 2), None, position, bits)
        columns = torch.empty((1, 8, 64, 2), dtype=torch.float16)
        encode_token_cuda(x, codes, columns, None, position)
        codes = torch.empty((1, 8, 64, 64), dtype=torch.uint8)
        encode_token_cuda(x, codes, columns, columns, position)
    assert len(kernels) == 19


@needs_gpu
@pytest.mark.parametrize(("dtype", "bits"), FORMATS)
@pytest.mark.parametrize("tokens", [1, 700])
def test_on_a_gpu(dtype: torch.dtype, bits: int, tokens: int) -> None:
    """Real shapes; division of the GPU is IEEE, so codes are those of the CPU but for contraction."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, tokens, 128).bfloat16()
    levels = codebook(bits, dtype)
    on_gpu_levels = None if levels is None else levels.cuda()
    storage = torch.zeros((2, 8, 1024, stored_width(128, dtype, bits)), dtype=torch.uint8).view(dtype)
    scale, column_scale = torch.rand(8, 1, 128) * 0.05 + 0.01, torch.zeros(2, 8, 1024, 2)
    position = torch.tensor([300])
    on_gpu = storage.cuda()
    encode(x.cuda(), scale.cuda(), None, on_gpu, position.cuda(), bits, on_gpu_levels)
    encode_reference(x, scale, None, storage, position, bits, levels)
    differing = (raw(on_gpu.cpu()) != raw(storage)).float().mean()
    assert differing <= TOLERANCES["codes"]
    on_gpu_scale = column_scale.cuda()
    encode_token(x.cuda(), on_gpu, on_gpu_scale, None, position.cuda(), bits)
    encode_token_reference(x, storage, column_scale, None, position, bits)
    torch.testing.assert_close(on_gpu_scale.cpu(), column_scale)
    assert (raw(on_gpu.cpu()) != raw(storage)).float().mean() <= TOLERANCES["codes"]
    decoded = decode(on_gpu, scale.cuda(), None, 1, bits, on_gpu_levels)
    torch.testing.assert_close(decoded.cpu(), decode_reference(on_gpu.cpu(), scale, None, 1, bits, levels))


@needs_gpu
def test_opcheck_on_a_gpu() -> None:
    values, codes = torch.randn(1, 2, 3, 16).cuda(), torch.zeros((1, 2, 3, 16), dtype=torch.int8).cuda()
    opcheck_on_gpu(torch.ops.octavo.encode.default, (values, torch.ones(2, 1, 16).cuda(), None, codes))
    opcheck_on_gpu(torch.ops.octavo.encode_token.default, (values, codes, torch.zeros(1, 2, 3, 1).cuda()))
    opcheck_on_gpu(torch.ops.octavo.decode.default, (codes, None, None))
    packed, levels = codes.view(torch.uint8)[..., :6].contiguous(), torch.rand(8).sort().values.cuda()
    arguments = (values, torch.ones(2, 1, 16).cuda(), None, packed, None, 3, levels)
    opcheck_on_gpu(torch.ops.octavo.encode.default, arguments)
    opcheck_on_gpu(torch.ops.octavo.decode.default, (packed, None, None, 1, 3, levels))
