"""Attention on an Ascend NPU by npu_fused_infer_attention_score (FIA): float K and V, and int8 codes decoded inside."""

import functools
from typing import Any

import torch

from ..shared.npu_helpers import torch_npu_module, whole_storage
from .call import AttentionCall, Coded

PER_CHANNEL, PER_HEAD, PER_TOKEN, FLOAT = 0, 2, 3, -1
"""The antiquant modes of FIA that our scales are: perchannel, pertensor + perhead, pertoken + perhead; and none."""
PER_TOKEN_OF_ONE_HEAD = 1
"""The mode pertoken, whose scales are for all heads."""
STATIC_MODES = (PER_CHANNEL, PER_HEAD)
COMPRESSED_MASK = 2048
WHOLE_MASK, RIGHT_DOWN_CAUSAL, BAND, EMPTY_ROWS_ARE_ZERO = 1, 3, 4, 2
"""Of FIA: three values of sparse_mode, and the inner_precise that gives zeros to queries which see nothing."""
MOST_BFLOAT16_QUERIES = 16
"""Queries over codes that FIA takes in bfloat16 (aclnnFusedInferAttentionScoreV3)."""


def antiquant_mode(side: Coded) -> int | None:
    """The antiquant mode of a scale `[G, 1, D]`, `[G, 1, 1]` or `[B, G, S, 1]`, FLOAT of none; None: there is no mode.

    With one token stored, `[B, G, 1, 1]` is taken to be per token.
    """
    codes, scale, zero, *_ = side
    if scale is None and codes.is_floating_point():
        return FLOAT
    if scale is None or codes.dtype != torch.int8 or (zero is not None and zero.shape != scale.shape):
        return None
    batch, _, rows, columns = (1,) * (4 - scale.dim()) + scale.shape
    if rows == codes.shape[2] and columns == 1 and scale.shape[:-2] == codes.shape[:2]:
        return PER_TOKEN
    if rows > 1 or batch > 1 or columns not in (1, codes.shape[3]):
        return None
    return PER_HEAD if columns == 1 else PER_CHANNEL


def stored_npu(view: torch.Tensor) -> torch.Tensor:
    """K or V as the ops take it: the whole storage; float states that no cache holds are copied if they have to be."""
    whole = whole_storage(view)
    if whole is None and view.dtype == torch.int8:
        raise ValueError(
            f"codes for the NPU must be the first tokens of contiguous [B, G, capacity, D] storage, not a view of "
            f"strides {view.stride()}"
        )
    return view.contiguous() if whole is None else whole


def fused_declines(call: AttentionCall) -> str | None:
    """None, or why FIA has no mode for a call with a query in float; its limits are checked later, and raise."""
    query, mask = call.query, call.visibility.mask
    name = "npu_fused_infer_attention_score"
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1):
        return f"{name} takes masks in bool [B, 1, Q, S] alone"
    modes = antiquant_mode(call.key), antiquant_mode(call.value)
    if modes == (FLOAT, FLOAT):
        return None
    if None in modes:
        return f"{name} takes codes in int8 with a scale per channel, head or token alone; take a scheme of such"
    queries = query.shape[2]
    are_few = queries == 1 or (queries <= MOST_BFLOAT16_QUERIES and query.dtype == torch.bfloat16)
    if modes == (PER_TOKEN, PER_TOKEN):
        several = f"in bfloat16 up to {MOST_BFLOAT16_QUERIES}; prefill in smaller chunks, or take a static scheme"
        return None if are_few else f"{name} takes several queries over scales per token {several}"
    if modes[0] in STATIC_MODES and modes[1] in STATIC_MODES:
        several = f"in float16, or up to {MOST_BFLOAT16_QUERIES} in bfloat16; load the model in float16"
        is_served = are_few or query.dtype == torch.float16
        return None if is_served else f"{name} takes several queries over static codes {several}"
    return f"{name} takes K and V of one granularity, and these are in different ones; take a scheme of one"


def attend_fused(call: AttentionCall, lengths: list[int]) -> torch.Tensor:
    """FIA over the whole storage, of which it is told the valid lengths; returns `[B, Q, H, D]`."""
    query, sides = call.query, (call.key, call.value)
    batch, heads, queries, width = query.shape
    key, value = (stored_npu(side.codes) for side in sides)
    _check_fused(query, key, value)
    options = {} if queries == 1 else _mask_options(call, key, lengths)
    is_float_prefill = queries > 1 and key.dtype != torch.int8  # codes want BNSD (prompt_flash_attention_tiling.cpp)
    if key.dtype == torch.int8:
        options |= _antiquant(query, sides)
        if queries > 1 and antiquant_mode(sides[0]) == PER_TOKEN:
            lengths = [tokens for tokens in lengths for _ in range(key.shape[1])]
            query, key, value, options = _one_head_each(query, key, value, options)
    output, _ = torch_npu_module().npu_fused_infer_attention_score(
        query.contiguous(),
        key,
        value,
        actual_seq_lengths_kv=[max(1, tokens) for tokens in lengths],
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        scale=call.scaling,
        input_layout="BNSD_BSND" if is_float_prefill else "BNSD",
        **options,
    )
    return output if is_float_prefill else output.view(batch, heads, queries, width).transpose(1, 2).contiguous()


def _one_head_each(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The same for B * G sequences of one KV head, for which scales per token and head are scales per token.

    Several queries have no mode for the former. Nothing but a mask is copied.
    """
    batch, groups, capacity, width = key.shape
    options = dict(options)
    for name, part in options.items():
        if name.endswith(("antiquant_scale", "antiquant_offset")):
            options[name] = part.reshape(batch * groups, capacity)
    options |= {"key_antiquant_mode": PER_TOKEN_OF_ONE_HEAD, "value_antiquant_mode": PER_TOKEN_OF_ONE_HEAD}
    if options.get("sparse_mode") == WHOLE_MASK and options["atten_mask"].shape[0] > 1:
        options["atten_mask"] = options["atten_mask"].repeat_interleave(groups, dim=0)
    key, value = (part.view(batch * groups, 1, capacity, width) for part in (key, value))
    return query.reshape(batch * groups, -1, query.shape[2], width), key, value, options


def _check_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Limits of FIA on Atlas A2 and A3 (ascend-op-plugin docs: npu_fused_infer_attention_score)."""
    heads, queries, width = query.shape[1:]
    groups, capacity = key.shape[1:3]
    name = "npu_fused_infer_attention_score"
    if key.shape != value.shape or key.dtype != value.dtype:
        raise NotImplementedError(
            f"{name} takes K and V of one shape and dtype, not {key.dtype} {tuple(key.shape)} and "
            f"{value.dtype} {tuple(value.shape)}"
        )
    if key.dtype not in (query.dtype, torch.int8):
        raise ValueError(f"{name} takes K and V in int8 or in the dtype of q, {query.dtype}, not {key.dtype}")
    alignment = 32 if key.dtype == torch.int8 else 16
    if width % alignment or width > 512:
        raise ValueError(f"{name} takes a head_dim up to 512 that {alignment} divides with {key.dtype}, not {width}")
    if heads > 256 or heads % groups or heads // groups > 64:
        raise ValueError(f"{name} takes up to 256 heads, up to 64 per KV head, not {heads} on {groups}")
    if queries == 1 and capacity > 262144:
        raise ValueError(f"{name} takes up to 262144 keys per sequence at decode, not a cache of {capacity}")


def _mask_options(call: AttentionCall, key: torch.Tensor, lengths: list[int]) -> dict[str, Any]:
    """The arguments of FIA that hide keys from several queries; in its masks True hides.

    A causal mask and the band of a window end with the last query at the last valid key, of each sequence
    (ops-transformer: prompt_flash_attention_tiling.cpp, preTokensPerbatch).
    """
    query, (mask, causal, _, window) = call.query, call.visibility
    queries = query.shape[2]
    if mask is not None:
        shape = (mask.shape[0], 1, queries, key.shape[2])
        hidden = torch.ones(shape, dtype=torch.bool, device=query.device)
        hidden[..., : max(lengths) if mask.shape[3] == 1 else mask.shape[3]] = ~mask
        return {"atten_mask": hidden, "sparse_mode": WHOLE_MASK, "inner_precise": EMPTY_ROWS_ARE_ZERO}
    if not causal:
        return {}
    options = {"atten_mask": _compressed_mask(query.device), "sparse_mode": RIGHT_DOWN_CAUSAL}
    if 0 < window < max(lengths):
        options |= {"sparse_mode": BAND, "pre_tokens": window - 1, "next_tokens": 0}
    if min(lengths) < queries:
        options["inner_precise"] = EMPTY_ROWS_ARE_ZERO
    return options


@functools.cache
def _compressed_mask(device: torch.device) -> torch.Tensor:
    """The `[2048, 2048]` mask from which FIA makes a causal mask or a band of any size."""
    return torch.ones((COMPRESSED_MASK, COMPRESSED_MASK), dtype=torch.bool, device=device).triu_(1)


def _antiquant(query: torch.Tensor, sides: tuple[Coded, Coded]) -> dict[str, Any]:
    """The arguments of FIA that decode codes as `(code + offset) * scale`: its offsets are our zeros negated.

    Scales are `[G, 1, D]` or `[G]` in the dtype of q, or float32 `[B, G, capacity]` per token. Several queries take
    no scales per head, and in float16 K's and V's in one tensor `[2, G, 1, D]`.
    """
    several = query.shape[2] > 1
    mode = min(antiquant_mode(side) for side in sides)  # a scale per head is also one per channel
    mode = PER_CHANNEL if several and mode == PER_HEAD else mode
    scales = [_antiquant_part(side.scale, side.codes, mode, query.dtype) for side in sides]
    offsets = None
    if any(side.zero is not None for side in sides):  # both or neither
        zeros = [torch.zeros_like(scale) if zero is None else -zero for _, scale, zero, *_ in sides]
        offsets = [
            _antiquant_part(zero, side.codes, mode, query.dtype) for zero, side in zip(zeros, sides, strict=True)
        ]
    if several and query.dtype == torch.float16:
        combined = {"antiquant_scale": torch.stack(scales)}
        return combined if offsets is None else {**combined, "antiquant_offset": torch.stack(offsets)}
    options: dict[str, Any] = {"key_antiquant_mode": mode, "value_antiquant_mode": mode}
    options |= {"key_antiquant_scale": scales[0], "value_antiquant_scale": scales[1]}
    if offsets is not None:
        options |= {"key_antiquant_offset": offsets[0], "value_antiquant_offset": offsets[1]}
    return options


def _antiquant_part(part: torch.Tensor, codes: torch.Tensor, mode: int, dtype: torch.dtype) -> torch.Tensor:
    """A scale or offset in the shape and dtype of its mode."""
    groups, width = codes.shape[1], codes.shape[3]
    if mode == PER_TOKEN:
        whole, capacity = whole_storage(part), stored_npu(codes).shape[2]
        if whole is None or whole.shape[2] != capacity:
            padded = part.new_zeros((*part.shape[:2], capacity))
            padded[..., : part.shape[2]] = part[..., 0]
            return padded.float()
        return whole[..., 0].float()
    if mode == PER_HEAD:
        return part.expand(1, groups, 1, 1).reshape(groups).to(dtype)
    return part.expand(1, groups, 1, width).reshape(groups, 1, width).to(dtype)
