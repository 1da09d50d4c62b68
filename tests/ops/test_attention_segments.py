"""The log-sum-exp of attention on the CPU, and segments of a sequence that are merged by it."""

from dataclasses import replace

import pytest
import torch

from .attention_calls import (
    Call,
    add_positions,
    assert_close,
    assert_lse_close,
    call_of,
    expanded,
    int8_call,
    mask_of,
    part_of,
    unpacked,
)

pytestmark = pytest.mark.usefixtures("build")


def segments_of(call: Call, cuts: tuple[int, ...]) -> list[Call]:
    """The call cut along its keys."""
    keys = call.key.shape[2]
    length = torch.tensor([keys]) if call.length is None else call.length
    segments = []
    for start, stop in zip((0, *cuts), (*cuts, keys), strict=True):
        parts = {name: getattr(call, name)[:, :, start:stop] for name in ("key", "value")}
        for name in ("key_scale", "key_zero", "value_scale", "value_zero"):
            part = getattr(call, name)
            parts[name] = part if part is None or part.shape[-2] == 1 else part[..., start:stop, :]
        parts["mask"] = None if call.mask is None else call.mask[..., start:stop]
        if call.position_start is not None:
            parts["position_start"] = call.position_start + start
        segments.append(replace(call, length=length - start, **parts))
    return segments


def merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Outputs of segments as one, weighted by their log-sum-exp."""
    lses = torch.stack([lse for _, lse in parts])
    weights = (lses - lses.logsumexp(dim=0).clamp_min(-1e30)).exp().transpose(-1, -2)[..., None]
    return (torch.stack([output for output, _ in parts]) * weights).sum(dim=0)


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("lengths", [None, [300, 300], [90, 260], [7, 30]])
@pytest.mark.parametrize("what", ["causal", "window", "small window", "mask", "float mask", "not causal"])
@pytest.mark.parametrize("positions", [False, True])
def test_segments_are_merged_by_their_log_sum_exp(
    what: str, lengths: list[int] | None, queries: int, positions: bool
) -> None:
    call = call_of(torch.int8, torch.int8, queries, keys=300)
    call.key_scale, call.value_scale = (part_of("per token", call, call.key, 1) for _ in range(2))
    call.mask = mask_of({"mask": "bool per head", "float mask": "float"}.get(what, "none"), call)
    call.window = {"window": 200, "small window": 9}.get(what, 0)
    call.causal = what != "not causal"
    call.length = None if lengths is None else torch.tensor(lengths)
    if positions:
        add_positions(call, 32)
    expected, expected_lse = (part.double() for part in call.reference_lse())
    for kernel in (Call.run_lse, Call.reference_lse):
        parts = [kernel(segment) for segment in segments_of(call, (20, 283))]
        assert_close(merged(parts), expected)
        assert_lse_close(torch.stack([lse for _, lse in parts]).logsumexp(dim=0), expected_lse)


def test_segments_of_codes_between_floats() -> None:
    """Float tokens at both ends of a sequence whose middle is in codes."""
    call = call_of(torch.int8, torch.uint8, queries=4, keys=300, batch=1)
    decoded = [
        (unpacked(codes) * expanded(scale, 300, 32, 1)).float()
        for codes, scale in ((call.key, call.key_scale), (call.value, call.value_scale))
    ]
    floats = replace(call, key=decoded[0], value=decoded[1], key_scale=None, value_scale=None)
    (first, _, last), (_, codes, _) = segments_of(floats, (16, 200)), segments_of(call, (16, 200))
    assert_close(merged([segment.run_lse() for segment in (first, codes, last)]), call.oracle())


def test_log_sum_exp_of_a_query_in_float64() -> None:
    call = int8_call()
    output, lse = replace(call, query=call.query.double()).run_lse()
    expected, expected_lse = call.oracle_lse()
    assert lse.dtype == output.dtype == torch.float64
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_log_sum_exp_of_no_keys() -> None:
    call = int8_call(keys=0)
    output, lse = call.run_lse()
    assert not output.any() and (lse == float("-inf")).all()
    for length in ([0, 40], [-3, 40]):
        output, lse = replace(int8_call(), length=torch.tensor(length)).run_lse()
        assert not output[0].any() and (lse[0] == float("-inf")).all() and lse[1].isfinite().all()
