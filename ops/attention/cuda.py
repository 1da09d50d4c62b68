"""Attention on CUDA GPUs: Triton kernels behind the Python signature of the reference.

Nothing is read back from the device: the grid follows from the capacity, and programs share out the tokens in use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    TritonBlocks,
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
_Side = tuple[TritonPart, TritonPart]
"""Scale and zero of K or V."""


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


def _side_plan(side: Coded, parts: _Side) -> Callable[[Coded], Operands]:
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


def _query_kind(call: AttentionCall) -> str:
    """What queries are quantized to, one of `CODE_KINDS`, or "float"."""
    if call.query_scale is None:
        return "float"
    dtype = call.key.codes.dtype
    return CODE_KINDS[dtype if dtype in FP8_DTYPES else torch.int8]


class _Tiling(NamedTuple):
    """How the kernel goes through queries and keys.

    Attributes:
        kinds: `KEY_DOT`, `VALUE_DOT` and `NATIVE` of the kernel.
        blocks: tiles.
        half: half of the channels, padded.
        position_block: width of the table of scores by position, padded.
        layouts: of scales and zeros of K and of V on tiles.
        programs, splits: of queries, and parts of the keys.
    """

    kinds: tuple[str, str, bool]
    blocks: TritonBlocks
    half: int
    position_block: int
    layouts: list[tuple[int, ...]]
    programs: int
    splits: int


def _tiling(
    call: AttentionCall, shape: tuple[int, int, int, int], parts: tuple[_Side, _Side], position_width: int
) -> _Tiling:
    """How the kernel goes through a call of codes of shape `[B, G, S, D]`."""
    batch, groups, keys, width = shape
    query, key, value = call.query, call.key.codes, call.value.codes
    gpu, rows = gpu_of(query.device), query.shape[1] // groups * query.shape[2]
    native = gpu.capability >= FP8_CAPABILITY
    forms = [part.form for side in parts for part in side]
    dots = triton_dots(query, key, value, _query_kind(call), forms[0], forms[2], native)
    half = power_of_two((width + 1) // 2, 32 if dots[0] in ("int8", "fp8") else 16)
    bits = max(32 if "fp32" in dots else 0, *(8 * codes.element_size() for codes in (key, value)))
    blocks = triton_blocks(rows, half, bits, gpu.capability, set(forms))
    position_block = power_of_two(position_width, 16)
    if position_width:
        blocks = blocks_with_positions(blocks, half, position_block, gpu.capability)
    both = (parts[0], call.key.group), (parts[1], call.value.group)
    blocks, layouts = triton_tiles(blocks, both, width, half)
    programs = -(-rows // blocks.rows) * batch * groups
    splits = triton_splits(programs, keys, gpu.processors, blocks.rows == 16)
    return _Tiling((*dots, native), blocks, half, position_block, layouts, programs, splits)


def _attending(
    call: AttentionCall, parts: tuple[_Side, _Side], tiling: _Tiling, mask_kind: str, position_width: int,
    wants_lse: bool,
) -> Launch:  # fmt: skip
    """The kernel that attends, over all of the keys or a part of them."""
    query, key, value, blocks = call.query, call.key.codes, call.value.codes, tiling.blocks
    _, causal, _, window = call.visibility
    causal = causal and mask_kind == "none" and (query.shape[2] > 1 or window > 0)
    (key_scale, key_zero), (value_scale, value_zero) = parts
    key_dot, value_dot, native = tiling.kinds
    constants = {
        "RATIO": query.shape[1] // key.shape[1], "WIDTH": query.shape[3], "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.keys, "BLOCK_H": tiling.half, "IS_SPLIT": tiling.splits > 1,
        "KEY_KIND": CODE_KINDS.get(key.dtype, "float"), "VALUE_KIND": CODE_KINDS.get(value.dtype, "float"),
        "QUERY_KIND": _query_kind(call), "KEY_DOT": key_dot, "VALUE_DOT": value_dot, "KEY_SCALE": key_scale.form,
        "KEY_ZERO": key_zero.form, "VALUE_SCALE": value_scale.form, "VALUE_ZERO": value_zero.form,
        "KEY_GROUP": call.key.group, "VALUE_GROUP": call.value.group, "KEY_TILE": tiling.layouts[0],
        "VALUE_TILE": tiling.layouts[1], "CAUSAL": causal, "WINDOW": causal and window > 0, "MASK": mask_kind,
        "NATIVE": native, "WANTS_LSE": wants_lse, "POSITION_WIDTH": position_width, "BLOCK_E": tiling.position_block,
    }  # fmt: skip
    return Launch(
        attention_kernel, (tiling.programs, tiling.splits), constants,
        num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers, enable_fp_fusion=True,
    )  # fmt: skip


def _plan(call: AttentionCall, wants_lse: bool) -> Callable[[AttentionCall], Attended]:
    """What attends, of calls like this one; the log-sum-exp only if it is wanted.

    Any strides. With queries of 16 bits, products are of 16 bits and sums of 32, and weights are rounded to 16 bits.

    Raises:
        ValueError: shapes that do not go together, or a head_dim or scores by position wider than 256.
    """
    shape = batch, groups, keys, width = check_attention(call)
    heads, queries = call.query.shape[1:3]
    if width > LARGEST_WIDTH:
        raise ValueError(f"attention on CUDA takes a head_dim up to {LARGEST_WIDTH}, not {width}")
    positions, position_width = _position_plan(call.position)
    if call.query.numel() == 0 or keys == 0:
        return lambda given: _nothing(given, wants_lse)
    parts = triton_parts("key", call.key, shape), triton_parts("value", call.value, shape)
    tiling = _tiling(call, shape, parts, position_width)
    visible, mask_kind = _visibility_plan(call.visibility, (batch, heads, queries, keys))
    launch, splits = _attending(call, parts, tiling, mask_kind, position_width, wants_lse), tiling.splits
    merge = _merging(batch * queries * heads, width, splits, wants_lse) if splits > 1 else None
    of_key, of_value = _side_plan(call.key, parts[0]), _side_plan(call.value, parts[1])
    of_step = None if call.query_scale is None else broadcast_strides(call.query_scale, (batch, heads, queries, 1))
    numbers = groups, queries, keys, min(call.visibility.window, LARGEST_COUNT), call.scaling * LOG2_E
    query_strides = call.query.stride()

    def run(given: AttentionCall) -> Attended:
        query = given.query
        output, lse, found, found_lse = _results(query, splits, wants_lse)
        key, key_scale, key_zero = of_key(given.key)
        value, value_scale, value_zero = of_value(given.value)
        launch(
            (query, *query_strides), key, value, found, found_lse, lse, key_scale, key_zero, value_scale, value_zero,
            None if of_step is None else (given.query_scale, *of_step), *visible(given.visibility),
            *positions(given.position), *numbers,
        )  # fmt: skip
        if merge is not None:
            merge(found, found_lse, output, lse, splits, queries, heads)
        return output, lse

    return run


def _results(query: torch.Tensor, splits: int, wants_lse: bool) -> tuple[torch.Tensor | None, ...]:
    """Room for the output and the log-sum-exp, and for those of each part of the keys, which are to be merged.

    Of one part, what is found is the output, and has no log-sum-exp beside that of all.
    """
    batch, heads, queries, width = query.shape
    sizes, settings = (batch, queries, heads), {"dtype": torch.float32, "device": query.device}
    output = torch.empty((*sizes, width), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, queries), **settings) if wants_lse else None
    if splits == 1:
        return output, lse, output, None
    return output, lse, torch.empty((*sizes, splits, width), **settings), torch.empty((*sizes, splits), **settings)


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
