"""Attention on CUDA GPUs: Triton kernels behind the Python signature of the reference.

Nothing is read back from the device: the grid follows from the capacity, and programs share out the tokens in use.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..shared.codes import FP8_DTYPES
from ..shared.operands import broadcast_strides
from ..shared.triton_helpers import (
    CODE_KINDS,
    FP8_CAPABILITY,
    Launch,
    by_plan,
    cuda_description,
    gpu_of,
    power_of_two,
    triton_supports,
)
from .arguments import LARGEST_COUNT, check_attention, whole_codes_only
from .call import ATTENTION_CALL, AttentionCall, Coded, PositionScores, Visibility
from .cuda_kernels import attention_kernel, merge_kernel
from .cuda_plan import (
    TritonPart,
    blocks_with_positions,
    triton_blocks,
    triton_dots,
    triton_parts,
    triton_splits,
    triton_tiles,
)
from .reference import attention_lse_reference, attention_reference

ATTENTION_CUDA = cuda_description("codes decoded in registers, keys split over programs where queries are few")
LARGEST_WIDTH = 256
"""Of heads, and of rows of the table of scores by position."""
LOG2_E = 1.4426950408889634
MERGED_CHANNELS = 64


Attended = tuple[torch.Tensor, torch.Tensor | None]
Operands = tuple[tuple | None, ...]


def _position_plan(position: PositionScores) -> tuple[Callable[[PositionScores], Operands], int]:
    """What makes of scores by position what the kernel takes, and their width, 0 of none.

    Raises:
        ValueError: they are too wide.
    """
    query, table, start = position
    if query is None:
        return lambda _: (None, None, None), 0
    rows, width = table.shape
    if width > LARGEST_WIDTH:
        raise ValueError(f"attention on CUDA takes scores by position up to {LARGEST_WIDTH} wide, not {width}")
    query_strides, table_strides = query.stride(), (*table.stride(), rows - 1)
    step = start.stride(0) if start.shape[0] > 1 else 0
    return lambda given: ((given.query, *query_strides), (given.table, *table_strides), (given.start, step)), width


def _visibility_plan(
    visibility: Visibility, shape: tuple[int, int, int, int]
) -> tuple[Callable[[Visibility], Operands], str]:
    """What makes of mask and length what the kernel takes, and the kind of the mask, which broadcasts to a shape."""
    mask, _, length, _ = visibility
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    strides = None if mask is None else broadcast_strides(mask, shape)
    step = length.stride(0) if length is not None and length.shape[0] > 1 else 0

    def operands(given: Visibility) -> Operands:
        return (
            None if strides is None else (given.mask, *strides),
            None if given.length is None else (given.length, step),
        )

    return operands, kind


def _side_plan(side: Coded, parts: tuple[TritonPart, TritonPart]) -> Callable[[Coded], Operands]:
    """What makes of K or V what the kernel takes: codes, scale and zero."""
    strides, (scale, zero) = side.codes.stride(), [part.operand for part in parts]

    def operands(given: Coded) -> Operands:
        return (
            (given.codes, *strides),
            None if scale is None else (given.scale, *scale),
            None if zero is None else (given.zero, *zero),
        )

    return operands


def _nothing(call: AttentionCall, wants_lse: bool) -> Attended:
    """Of a call without keys, queries or channels."""
    query = call.query
    batch, heads, queries, width = query.shape
    output = query.new_zeros((batch, queries, heads, width))
    return output, query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32) if wants_lse else None


def _plan(call: AttentionCall, wants_lse: bool) -> Callable[[AttentionCall], Attended]:
    """What attends, of calls like this one; the log-sum-exp only if it is wanted.

    Any strides. With queries of 16 bits, products are of 16 bits and sums of 32, and weights are rounded to 16 bits.

    Raises:
        ValueError: shapes that do not go together, or a head_dim or scores by position wider than 256.
    """
    shape = batch, groups, keys, width = check_attention(call)
    query, key, value, query_scale = call.query, call.key.codes, call.value.codes, call.query_scale
    _, causal, _, window = call.visibility
    heads, queries = query.shape[1:3]
    window = min(window, LARGEST_COUNT)
    if width > LARGEST_WIDTH:
        raise ValueError(f"attention on CUDA takes a head_dim up to {LARGEST_WIDTH}, not {width}")
    positions, position_width = _position_plan(call.position)
    if query.numel() == 0 or keys == 0:
        return lambda given: _nothing(given, wants_lse)
    key_parts, value_parts = triton_parts("key", call.key, shape), triton_parts("value", call.value, shape)
    gpu = gpu_of(query.device)
    quantized, query_scale_strides = "float", None
    if query_scale is not None:
        quantized = CODE_KINDS[key.dtype if key.dtype in FP8_DTYPES else torch.int8]
        query_scale_strides = broadcast_strides(query_scale, (batch, heads, queries, 1))
    native = gpu.capability >= FP8_CAPABILITY
    ratio = heads // groups
    rows = ratio * queries
    key_dot, value_dot = triton_dots(query, key, value, quantized, key_parts[0].form, value_parts[0].form, native)
    half = power_of_two((width + 1) // 2, 32 if key_dot in ("int8", "fp8") else 16)
    bits = max(32 if "fp32" in (key_dot, value_dot) else 0, *(8 * codes.element_size() for codes in (key, value)))
    forms = {part.form for part in (*key_parts, *value_parts)}
    blocks = triton_blocks(rows, half, bits, gpu.capability, forms)
    position_block = power_of_two(position_width, 16)
    if position_width:
        blocks = blocks_with_positions(blocks, half, position_block, gpu.capability)
    both = (key_parts, call.key.group), (value_parts, call.value.group)
    blocks, layouts = triton_tiles(blocks, both, width, half)
    programs = -(-rows // blocks.rows) * batch * groups
    splits = triton_splits(programs, keys, gpu.processors, blocks.rows == 16)
    visible, mask_kind = _visibility_plan(call.visibility, (batch, heads, queries, keys))
    causal = causal and mask_kind == "none" and (queries > 1 or window > 0)
    constants = {
        "RATIO": ratio, "WIDTH": width, "BLOCK_M": blocks.rows, "BLOCK_N": blocks.keys, "BLOCK_H": half,
        "IS_SPLIT": splits > 1, "KEY_KIND": CODE_KINDS.get(key.dtype, "float"),
        "VALUE_KIND": CODE_KINDS.get(value.dtype, "float"), "QUERY_KIND": quantized,
        "KEY_DOT": key_dot, "VALUE_DOT": value_dot, "KEY_SCALE": key_parts[0].form, "KEY_ZERO": key_parts[1].form,
        "VALUE_SCALE": value_parts[0].form, "VALUE_ZERO": value_parts[1].form, "KEY_GROUP": call.key.group,
        "VALUE_GROUP": call.value.group, "KEY_TILE": layouts[0], "VALUE_TILE": layouts[1],
        "CAUSAL": causal, "WINDOW": causal and window > 0, "MASK": mask_kind, "NATIVE": native,
        "WANTS_LSE": wants_lse, "POSITION_WIDTH": position_width, "BLOCK_E": position_block,
    }  # fmt: skip
    launch = Launch(
        attention_kernel, (programs, splits), constants,
        num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers, enable_fp_fusion=True,
    )  # fmt: skip
    merge = _merging(batch * queries * heads, width, splits, wants_lse) if splits > 1 else None
    of_key, of_value = _side_plan(call.key, key_parts), _side_plan(call.value, value_parts)
    numbers = groups, queries, keys, window, call.scaling * LOG2_E
    sizes, query_strides = (batch, queries, heads), query.stride()

    def run(given: AttentionCall) -> Attended:
        query, step = given.query, given.query_scale
        device = query.device
        output = torch.empty((*sizes, width), dtype=query.dtype, device=device)
        lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=device) if wants_lse else None
        parts, parts_lse = output, None
        if merge is not None:
            parts = torch.empty((*sizes, splits, width), dtype=torch.float32, device=device)
            parts_lse = torch.empty((*sizes, splits), dtype=torch.float32, device=device)
        key, key_scale, key_zero = of_key(given.key)
        value, value_scale, value_zero = of_value(given.value)
        launch(
            (query, *query_strides), key, value, parts, parts_lse, lse, key_scale, key_zero, value_scale, value_zero,
            None if step is None else (step, *query_scale_strides), *visible(given.visibility),
            *positions(given.position), *numbers,
        )  # fmt: skip
        if merge is not None:
            merge(parts, parts_lse, output, lse, splits, queries, heads)
        return output, lse

    return run


def _merging(rows: int, width: int, splits: int, wants_lse: bool) -> Launch:
    """The kernel that makes one of what was found over parts of the keys."""
    constants = {
        "WIDTH": width, "BLOCK_S": power_of_two(splits), "BLOCK_C": MERGED_CHANNELS, "WANTS_LSE": wants_lse,
    }  # fmt: skip
    grid = rows, -(-width // MERGED_CHANNELS)
    return Launch(merge_kernel, grid, constants, num_warps=4, enable_fp_fusion=True)


def attention_cuda_supports(call: AttentionCall) -> str | None:
    """None, or why the kernels do not serve a call."""
    return whole_codes_only(call) or triton_supports(call.query)


def _attention_plan(call: AttentionCall) -> Callable[[AttentionCall], Any]:
    attend = _plan(call, False)
    return lambda given: attend(given)[0]


def _attention_lse_plan(call: AttentionCall) -> Callable[[AttentionCall], Any]:
    return _plan(call, True)


def attention_cuda(call: AttentionCall) -> torch.Tensor:
    """`attention_reference` in Triton."""
    return by_plan("attention", attention_reference, _attention_plan, ATTENTION_CALL.flat(call), (call,))


def attention_lse_cuda(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_lse_reference` in Triton."""
    return by_plan("attention_lse", attention_lse_reference, _attention_lse_plan, ATTENTION_CALL.flat(call), (call,))
