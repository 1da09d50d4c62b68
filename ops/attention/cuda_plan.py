"""How the Triton kernels of attention are launched: tiles, forms of scales, types of products, parts of the keys."""

from typing import NamedTuple

import torch

from ..shared.operands import part_strides
from ..shared.triton_helpers import CODE_KINDS, power_of_two
from .call import Coded

MOST_SPLITS, FEWEST_KEYS = 128, 128
"""Of the split of keys over programs: how many parts at most, and how many keys a part has at least."""


class TritonBlocks(NamedTuple):
    """How the kernel cuts its work: rows and keys of a tile, warps, tiles in flight, and most registers of a thread."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def triton_blocks(rows: int, half: int, bits: int, capability: int, forms: set[str]) -> TritonBlocks:
    """Tiles whose operands fit the registers, and shared memory of the smallest GPU of a capability.

    Those of 8 bits and fewer are the fastest of a dozen on an H100, at a head_dim of 128.

    Args:
        rows: queries of all heads of a KV head.
        half: half of head_dim, padded.
        bits: of an element of K or V as it is loaded, 32 where products are in float32.
        forms: of the scales and zeros of K and V.
    """
    has_room = capability in (80, 90, 100, 103)  # 163 KiB and more; others have 99 KiB
    if bits == 32:
        return TritonBlocks(min(64, power_of_two(rows, 16)), 32, 4, 2 if has_room and half <= 64 else 1)
    if rows <= 16:
        if bits == 8 and half <= 64 and "tile" not in forms:
            return TritonBlocks(16, 64, 2, 3)
        # So that four programs fit a multiprocessor: two, which is what the compiler makes of it, wait for each other.
        return TritonBlocks(16, 64 if half <= 64 else 32, 4, 3, 128 if bits == 8 else None)
    if rows <= 64 or half > 64 or capability < 90:
        is_small = half > 64 or (bits == 8 and capability < 90)  # there each warp holds all of a decoded tile
        return TritonBlocks(power_of_two(min(rows, 64)), 32 if is_small else 64, 4, 3 if has_room else 2)
    if bits == 8 and has_room and "tile" not in forms:
        return TritonBlocks(64, 128, 4, 2) if "token" in forms else TritonBlocks(128, 128, 8, 3)
    return TritonBlocks(128, 64, 8, 3 if has_room else 2)


def blocks_with_positions(blocks: TritonBlocks, half: int, position_block: int, capability: int) -> TritonBlocks:
    """Tiles that leave room for rows of the table of scores by position, `position_block` wide in float32."""
    has_room = capability in (80, 90, 100, 103) and half + position_block <= 192
    return blocks._replace(
        rows=min(blocks.rows, max(16, 4096 // position_block)),
        keys=min(blocks.keys, 32),
        warps=4,
        stages=min(blocks.stages, 2 if has_room else 1),
        registers=None,
    )


class TritonPart(NamedTuple):
    """A scale or zero of codes.

    Attributes:
        form: "none", "head", "channel" or "token", for what it varies along, or "tile" for tokens and channels.
        rows, columns: of tokens and of channels.
        operand: what the kernel takes behind its pointer, strides of B, G, rows and columns, channels per column.
    """

    form: str
    rows: int = 1
    columns: int = 1
    operand: tuple | None = None


def _part(name: str, part: torch.Tensor | None, shape: tuple[int, int, int, int], token_group: int) -> TritonPart:
    """A scale or zero of codes of shape `[B, G, S, D]`.

    Raises:
        ValueError: it does not belong to them.
    """
    if part is None:
        return TritonPart("none")
    rows, columns, strides = part_strides(name, part, shape, token_group)
    form = ("head" if columns == 1 else "channel") if rows == 1 else ("token" if columns == 1 else "tile")
    return TritonPart(form, rows, columns, (*strides, shape[3] // columns))


def triton_parts(name: str, side: Coded, shape: tuple[int, int, int, int]) -> tuple[TritonPart, TritonPart]:
    """Scale and zero of K or V, both applied to tiles where one of them has to be."""
    scale = _part(f"{name}_scale", side.scale, shape, side.group)
    zero = _part(f"{name}_zero", side.zero, shape, side.group)
    if "tile" in (scale.form, zero.form):
        return scale._replace(form="tile"), zero._replace(form="tile")
    return scale, zero


def _layout(part: TritonPart, width: int, half: int, token_group: int, block: int) -> int:
    """`LAYOUT` of `_tile_values` for a scale or zero, where a tile is `block` tokens by `half` channels, padded."""
    if part.rows == 1 or token_group % block == 0:
        return -1
    shared = half if part.columns == 1 else min(half, width // part.columns)
    return shared if part.columns == 1 or (width == 2 * half and shared >= 8 and half % shared == 0) else 0


def triton_tiles(
    blocks: TritonBlocks, parts: tuple[tuple[tuple[TritonPart, TritonPart], int], ...], width: int, half: int
) -> tuple[TritonBlocks, list[tuple[int, ...]]]:
    """The layouts of scales and zeros of K and of V on tiles, and tiles that are cut so that there is little of them.

    A tile stays within a group of tokens where groups are large enough.
    """
    for both, token_group in parts:
        if both[0].form == "tile" and max(part.rows for part in both) > 1 and token_group % 16 == 0:
            blocks = blocks._replace(
                keys=min(blocks.keys, token_group & -token_group), registers=blocks.registers and 168
            )
    layouts = [
        tuple(_layout(part, width, half, token_group, blocks.keys) if part.form == "tile" else -1 for part in both)
        for both, token_group in parts
    ]
    if 0 in layouts[0] + layouts[1]:  # fetched ahead they would not fit
        blocks = blocks._replace(keys=16, stages=1, registers=None)
    return blocks, layouts


def _float_dot(values: torch.dtype, query: torch.dtype) -> str:
    """What float K or V is multiplied in: 16 bits where the query has the same, else float32."""
    if values == query and values in (torch.float16, torch.bfloat16):
        return "fp16" if values == torch.float16 else "bf16"
    return "fp32"


def triton_dots(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, quantized: str, scale: str, value_scale: str,
    native: bool,
) -> tuple[str, str]:  # fmt: skip
    """The types in which q is multiplied by K, and the weights by V.

    Codes are exact in float16, so it serves all codes with queries of 16 bits; queries quantized to int8 are multiplied
    by integer codes as they are, and so with fp8, where the GPU can. Weights are multiplied in 16 bits or more: of
    operands in 8 bits, the matrix units read the right one along the sum alone, and V lies across it.
    """
    folded = scale in ("none", "head", "token")
    kinds = [CODE_KINDS.get(codes.dtype, "float") for codes in (key, value)]
    if quantized == "int8" and kinds[0] in ("int8", "int4") and folded:
        key_dot = "int8"
    elif quantized in ("e4m3", "e5m2") and native and folded:
        key_dot = "fp8"
    elif query.dtype == torch.float32:
        key_dot = "fp32"
    elif kinds[0] == "float":
        is_plain = scale == "none" and quantized == "float"
        key_dot = _float_dot(key.dtype, query.dtype) if is_plain else "fp32"
    else:
        key_dot = "fp16"
    if kinds[1] == "float" and value_scale != "tile":
        return key_dot, _float_dot(value.dtype, query.dtype)
    return key_dot, "fp32" if query.dtype == torch.float32 else "fp16"


def triton_splits(programs: int, keys: int, processors: int, are_small: bool) -> int:
    """Parts of the keys: as many as keep all multiprocessors busy, of a size that is worth it.

    No more than start at once, four on a multiprocessor where tiles are small: what is left over would run alone.
    """
    wanted = 4 * processors // programs if are_small or programs < processors else 1
    return max(1, min(wanted, -(-keys // FEWEST_KEYS), MOST_SPLITS))
