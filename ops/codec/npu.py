"""The codec on an Ascend NPU: ops of torch_npu behind the Python signatures of the references."""

import torch

from ..shared.codes import INT8_MIN, SMALLEST_SCALE, code_range, pack_codes
from ..shared.fallback import fell_back
from ..shared.npu_helpers import (
    is_static,
    npu_description,
    position_in_storage,
    quantize_static,
    refuse_fp8,
    require_npu_float,
    torch_npu_module,
    write_tokens,
)
from .arguments import check_encode, check_encode_token
from .reference import decode_reference, encode_reference, encode_token_reference

ENCODE_NPU = npu_description(
    "npu_quantize; by the reference (PyTorch): packing of 2 to 4 bits, codebooks, scales that vary along the tokens; "
    "fp8 raises"
)
ENCODE_TOKEN_NPU = npu_description(
    "npu_dynamic_quant and its asymmetric twin; by the reference (PyTorch): 2 to 4 bits, float16 scales; fp8 raises"
)
DECODE_NPU = "reference (PyTorch); fp8 raises"


def encode_npu_supports(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, levels: torch.Tensor | None
) -> str | None:
    """None, or why npu_quantize does not make these codes."""
    if levels is not None:
        return "npu_quantize has no codebooks; take a scheme without them"
    if not all(part is None or is_static(part, x.shape[-2]) for part in (scale, zero)):
        return "npu_quantize takes no scales that vary along the tokens; take a static scheme, or one per token in int8"
    return None


def encode_npu(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    position: torch.Tensor | None = None,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> None:
    """`encode_reference` by npu_quantize (ascend-op-plugin docs: npu_quantize, scatter_update_).

    Codes of 2 to 4 bits are those of int8, clamped further and packed; npu_quantize's own int4 takes no division, and
    in which order it packs is not documented. Codebooks and scales that vary along the tokens take the reference.

    Args:
        x: `[B, G, S, D]`, float32, float16 or bfloat16.
        scale, zero: float32, `[B or 1, G, 1, W]` where W divides D, or without leading dimensions.
        codes: int8 `[B, G, S, D]` or uint8 `[B, G, S, D * bits / 8]`, may be a strided view; overwritten.
        position, bits, levels: as in the reference.

    Raises:
        NotImplementedError: codes in fp8.
        ValueError: what does not go together, as the reference says.
        IndexError: more tokens than the storage has.
        RuntimeError: torch_npu cannot be imported.
    """
    check_encode(x, scale, zero, codes, position, bits, levels)
    refuse_fp8(codes)
    if x.numel() == 0:
        return
    position = position_in_storage(position, x.shape[2], codes)
    if fell_back("encode", "NPU", encode_npu_supports(x, scale, zero, levels)):
        encode_reference(x, scale, zero, codes, position, bits, levels)
        return
    new = quantize_static(x, scale, zero)
    if codes.dtype == torch.uint8:
        low, high = code_range(torch.uint8, bits)
        new = pack_codes(new.clamp(int(low), int(high)), bits, x.shape[-1])
    write_tokens(codes, new, position)


def encode_token_npu_supports(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> str | None:
    """None, or why npu_dynamic_quant does not make these codes."""
    if codes.dtype != torch.int8:
        return "npu_dynamic_quant does not pack 2 to 4 bits; take a scheme in int8"
    if not all(part is None or part.dtype == torch.float32 for part in (scale, zero)):
        return "npu_dynamic_quant gives scales in float32 only; take a scheme that keeps them so"
    return None


def encode_token_npu(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    bits: int = 4,
) -> None:
    """`encode_token_reference` by npu_dynamic_quant and npu_dynamic_quant_asymmetric (documents of these names).

    Both return a float32 scale and take no float32 x. So the reference serves float16 scales, by which the codes are
    to be rounded. It serves 2 to 4 bits too: the packing of int4 in the ops' int32 is not documented.

    Differs from the reference where the scale of a token or group would be below 2^-23: it is not raised to that floor.
    What the ops make of a group of zeros, or affine of equal values, is not documented, so its codes, scale and zero
    are set here. The zero of npu_dynamic_quant_asymmetric is `127 - max / scale`, which is ours but for rounding.

    Args:
        x: `[B, G, S, D]`, float16 or bfloat16.
        codes: int8 `[B, G, S, D]` or uint8 `[B, G, S, D * bits / 8]`, may be a strided view; overwritten.
        scale, zero: float32 or float16 `[B, G, S, W]` where W divides D, may be strided views; overwritten.
        position, bits: as in the reference.

    Raises:
        NotImplementedError: codes in fp8.
        ValueError: x in another dtype; what does not go together, as the reference says.
        IndexError: more tokens than the storage has.
        RuntimeError: torch_npu cannot be imported.
    """
    check_encode_token(x, codes, scale, zero, position, bits)
    require_npu_float("K and V", x)
    refuse_fp8(codes)
    if x.numel() == 0:
        return
    position = position_in_storage(position, x.shape[2], codes)
    if fell_back("encode_token", "NPU", encode_token_npu_supports(codes, scale, zero)):
        encode_token_reference(x, codes, scale, zero, position, bits)
        return
    rows = x.reshape(-1, x.shape[-1] // scale.shape[-1])
    new_codes, new_scale, new_zero = _dynamic_codes(rows, affine=zero is not None)
    shape = (*x.shape[:-1], scale.shape[-1])
    write_tokens(codes, new_codes.view(x.shape), position)
    write_tokens(scale, new_scale.view(shape), position)
    if zero is not None:
        write_tokens(zero, new_zero.view(shape), position)


def _dynamic_codes(rows: torch.Tensor, affine: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of rows `[M, N]`, with float32 scales and zeros `[M]`."""
    npu = torch_npu_module()
    if affine:
        codes, scale, zero = npu.npu_dynamic_quant_asymmetric(rows)
        flat_code = INT8_MIN
    else:
        codes, scale = npu.npu_dynamic_quant(rows)
        zero, flat_code = torch.zeros_like(scale), 0
    is_flat = scale == 0
    flat_zero = flat_code - rows[:, 0].float() / SMALLEST_SCALE  # all values of the row are equal
    return (
        codes.masked_fill(is_flat.unsqueeze(-1), flat_code),
        scale.masked_fill(is_flat, SMALLEST_SCALE),
        torch.where(is_flat, flat_zero, zero),
    )


def decode_npu_supports() -> str:
    """Why no op of the NPU decodes."""
    return "npu_anti_quant writes float16 and bfloat16, and the values are float32"


def decode_npu(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_group: int = 1,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode_reference`, on the device: npu_anti_quant writes float16 and bfloat16 only.

    Raises:
        NotImplementedError: codes in fp8.
    """
    refuse_fp8(codes)
    fell_back("decode", "NPU", decode_npu_supports())
    return decode_reference(codes, scale, zero, token_group, bits, levels)
