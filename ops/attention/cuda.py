"""Attention on CUDA GPUs: Triton kernels behind the Python signature of the reference.

Nothing is read back from the device: the grid follows from the capacity, and programs share out the tokens in use.
"""

import torch

from ..shared.codes import FP8_DTYPES
from ..shared.operands import broadcast_strides
from ..shared.triton_helpers import (
    CODE_KINDS,
    FP8_CAPABILITY,
    cuda_description,
    gpu_of,
    on_device,
    power_of_two,
    raw_codes,
    strided,
    triton_supports,
)
from .arguments import LARGEST_COUNT, check_attention, whole_codes_only
from .call import AttentionCall, PositionScores
from .cuda_kernels import attention_kernel, merge_kernel
from .cuda_plan import (
    blocks_with_positions,
    triton_blocks,
    triton_dots,
    triton_parts,
    triton_splits,
    triton_tiles,
)

ATTENTION_CUDA = cuda_description("codes decoded in registers, keys split over programs where queries are few")
LARGEST_WIDTH = 256
"""Of heads, and of rows of the table of scores by position."""
LOG2_E = 1.4426950408889634
MERGED_CHANNELS = 64


def _position_operands(position: PositionScores) -> tuple[tuple[tuple | None, ...], int]:
    """Checked arguments of scores by position as the kernel takes them, and their width, 0 of none.

    Raises:
        ValueError: they are too wide.
    """
    query, table, start = position
    if query is None:
        return (None, None, None), 0
    rows, width = table.shape
    if width > LARGEST_WIDTH:
        raise ValueError(f"attention on CUDA takes scores by position up to {LARGEST_WIDTH} wide, not {width}")
    first = (start, start.stride(0) if start.shape[0] > 1 else 0)
    return (strided(query), (*strided(table), rows - 1), first), width


def _attend_triton(call: AttentionCall, wants_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_lse_reference` in Triton; the log-sum-exp only if it is wanted.

    Any strides. With queries of 16 bits, products are of 16 bits and sums of 32, and weights are rounded to 16 bits.

    Raises:
        ValueError: shapes that do not go together, or a head_dim or scores by position wider than 256.
    """
    shape = batch, groups, keys, width = check_attention(call)
    query, key, value, query_scale = call.query, call.key.codes, call.value.codes, call.query_scale
    mask, causal, length, window = call.visibility
    heads, queries = query.shape[1:3]
    window = min(window, LARGEST_COUNT)
    if width > LARGEST_WIDTH:
        raise ValueError(f"attention on CUDA takes a head_dim up to {LARGEST_WIDTH}, not {width}")
    position, position_width = _position_operands(call.position)
    output = query.new_empty((batch, queries, heads, width))
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device) if wants_lse else None
    if output.numel() == 0 or keys == 0:
        return output.zero_(), None if lse is None else lse.fill_(float("-inf"))
    key_parts, value_parts = triton_parts("key", call.key, shape), triton_parts("value", call.value, shape)
    gpu = gpu_of(query.device)
    quantized = "float"
    if query_scale is not None:
        quantized = CODE_KINDS[key.dtype if key.dtype in FP8_DTYPES else torch.int8]
        query_scale = (query_scale, *broadcast_strides(query_scale, (batch, heads, queries, 1)))
    native = gpu.capability >= FP8_CAPABILITY
    ratio = heads // groups
    rows = ratio * queries
    key_dot, value_dot = triton_dots(query, key, value, quantized, key_parts[0].form, value_parts[0].form, native)
    half = power_of_two((width + 1) // 2, 32 if key_dot in ("int8", "fp8") else 16)
    bits = max(32 if "fp32" in (key_dot, value_dot) else 0, *(8 * codes.element_size() for codes in (key, value)))
    blocks = triton_blocks(rows, half, bits, gpu.capability)
    position_block = power_of_two(position_width, 16)
    if position_width:
        blocks = blocks_with_positions(blocks, half, position_block, gpu.capability)
    both = (key_parts, call.key.group), (value_parts, call.value.group)
    blocks, layouts = triton_tiles(blocks, both, width, half)
    programs = -(-rows // blocks.rows) * batch * groups
    splits = triton_splits(programs, keys, gpu.processors, blocks.rows == 16)
    parts, parts_lse = output, None
    if splits > 1:
        parts = torch.empty((*output.shape[:3], splits, width), dtype=torch.float32, device=query.device)
        parts_lse = torch.empty((*output.shape[:3], splits), dtype=torch.float32, device=query.device)
    mask_kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    if mask is not None:
        strides = broadcast_strides(mask, (batch, heads, queries, keys))
        mask = (mask.view(torch.uint8) if mask_kind == "bool" else mask, *strides)
    if length is not None:
        length = (length, length.stride(0) if length.shape[0] > 1 else 0)
    causal = causal and mask is None and (queries > 1 or window > 0)
    with on_device(query):
        attention_kernel[(programs, splits)](
            strided(query), strided(raw_codes(key)), strided(raw_codes(value)), parts, parts_lse, lse,
            key_parts[0].operand, key_parts[1].operand, value_parts[0].operand, value_parts[1].operand,
            query_scale, mask, length, *position,
            groups, queries, keys, window, call.scaling * LOG2_E,
            RATIO=ratio, WIDTH=width, BLOCK_M=blocks.rows, BLOCK_N=blocks.keys, BLOCK_H=half, IS_SPLIT=splits > 1,
            KEY_KIND=CODE_KINDS.get(key.dtype, "float"), VALUE_KIND=CODE_KINDS.get(value.dtype, "float"),
            QUERY_KIND=quantized, KEY_DOT=key_dot, VALUE_DOT=value_dot,
            KEY_SCALE=key_parts[0].form, KEY_ZERO=key_parts[1].form,
            VALUE_SCALE=value_parts[0].form, VALUE_ZERO=value_parts[1].form,
            KEY_GROUP=call.key.group, VALUE_GROUP=call.value.group, KEY_TILE=layouts[0], VALUE_TILE=layouts[1],
            CAUSAL=causal, WINDOW=causal and window > 0, MASK=mask_kind, NATIVE=native,
            WANTS_LSE=wants_lse, POSITION_WIDTH=position_width, BLOCK_E=position_block,
            num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(batch * queries * heads, -(-width // MERGED_CHANNELS))](
                parts, parts_lse, output, lse, splits, queries, heads,
                WIDTH=width, BLOCK_S=power_of_two(splits), BLOCK_C=MERGED_CHANNELS, WANTS_LSE=wants_lse,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return output, lse


def attention_cuda_supports(call: AttentionCall) -> str | None:
    """None, or why the kernels do not serve a call."""
    return whole_codes_only(call) or triton_supports(call.query)


def attention_cuda(call: AttentionCall) -> torch.Tensor:
    """`attention_reference` in Triton."""
    return _attend_triton(call, False)[0]


def attention_lse_cuda(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_lse_reference` in Triton."""
    return _attend_triton(call, True)
